"""Visual mass of any transformers VLM whose language model uses the attention interface.

    enable_visual_mass(model)                         # once: the text model attends through this module
    with record_visual_mass(model) as record:
        model(**inputs)
    record.stacked()                                  # (L, B, T): mass on image tokens, per layer and text token

Where nothing is recorded the registered attention is transformers' own SDPA attention. A recorded layer that builds no
graph, or whose graph is kept, runs `attention_with_visual_mass` in its place. Under gradient checkpointing the layer is
recomputed in the backward pass, after the recording; so that both runs build the same graph, such layers keep SDPA and
the mass comes from a second pass without gradients. Dropout inside attention is handled the same way: the mass is that
of the probabilities before dropout.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmrpt_kernels.attention import attention_with_visual_mass, masked_attention_with_visual_mass
from mmrpt_kernels.attention.api import AttentionWithMass
from mmrpt_kernels.common.checks import check
from mmrpt_kernels.integrations.caches import find_cache
from mmrpt_kernels.integrations.recording import KeyWeights, VisualMassRecord, Window, read_mask

__all__ = ["VisualMassRecord", "enable_visual_mass", "record_visual_mass", "register_attention"]

DEFAULT_NAME = "mmrpt_visual_mass"
_NAMES: set[str] = set()
_RECORDING: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_WINDOW: ContextVar[Window | None] = ContextVar("mmrpt_visual_mass_window", default=None)
# Recordings under way in the process: a plain number, on which torch.compile guards; it cannot trace a ContextVar.
_num_recordings = 0
# Tensors that layers pass and that change no score: the mask and the rotated queries and keys hold what they say.
_IN_THE_MASK = frozenset(
    ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    + ("token_type_ids", "mm_token_type_ids", "num_items_in_batch")
)
# What transformers' SDPA attention takes by name; other tensors it ignores.
_SERVED_BY_SDPA = _IN_THE_MASK | set(inspect.signature(sdpa_attention_forward).parameters)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    weights: torch.Tensor,
    window: Window | None,
    **settings,
) -> AttentionWithMass:
    """Our attention on (B, H, T, D) tensors, under the mask that SDPA would have used."""
    num_rows, num_keys = query.shape[2], key.shape[2]
    is_causal = settings.pop("is_causal")
    causal = num_rows > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None and causal and num_keys > num_rows:
        # SDPA's flag is top-left aligned: the rest of a static cache is still empty.
        key, value, weights = key[:, :, :num_rows], value[:, :, :num_rows], weights[:, :num_rows]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    only_read = {"mass_requires_grad": window is not None and window.differentiable}
    if attention_mask is None:
        return attention_with_visual_mass(q, k, v, weights, causal=causal, **only_read, **settings)
    mask, padding = (read_mask if window is None else window.read_mask)(attention_mask, num_keys)
    if padding is None:
        return masked_attention_with_visual_mass(q, k, v, weights, mask, **settings)
    padding = padding.expand(q.shape[0], -1)
    return attention_with_visual_mass(q, k, v, weights, causal=True, key_padding_mask=padding, **only_read, **settings)


def _plain(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    settings: dict,
    kwargs: dict,
) -> torch.Tensor:
    """(B, T, Hq, D): attention without a mass: SDPA, or ours for a soft cap, which SDPA lacks."""
    scaling, is_causal = settings["softmax_scale"], settings["is_causal"]
    if not settings["softcap"]:
        _check_unused(kwargs, _SERVED_BY_SDPA, "SDPA would ignore it; give this model its own attention back")
        sdpa = (module, query, key, value, attention_mask, dropout, scaling, is_causal)
        return sdpa_attention_forward(*sdpa, **kwargs)[0]
    check(dropout == 0.0, f"dropout: got {dropout} with a soft cap, expected 0; set attention_dropout=0")
    _check_unused(kwargs, _IN_THE_MASK, "it is not supported with a soft cap; give this model its own attention back")
    nothing = key.new_zeros((key.shape[0], key.shape[2]), dtype=torch.bool)
    return _attend(module, query, key, value, attention_mask, nothing, None, **settings).out.contiguous()


def _check_unused(kwargs: dict, served: Collection[str], remedy: str) -> None:
    """Refuse tensors that a layer passes and nothing here reads, under whatever name: sinks, biases, chosen keys.

    Families name them as they like (s_aux, sinks, position_bias, head_mask), and those with sparse attention put the
    chosen keys into the mask for the names "eager" and "sdpa" alone, else into an argument (indices, block_indices).
    """
    for name, value in kwargs.items():
        check(
            not isinstance(value, torch.Tensor) or name in served,
            f"{name}: got a tensor among an attention layer's arguments, expected none: {remedy}",
        )


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The registered attention: SDPA, and the mass in the second slot for layers that a recording wants.

    query (B, Hq, T, D); key, value (B, Hkv, S, D); returns out (B, T, Hq, D), mass or None. With `packed_rows` of
    `PackedRows` the tensors hold the tokens of R rows as one, which attend under the mask of those rows.
    """
    packed_rows = kwargs.pop("packed_rows", None)
    if packed_rows is not None:
        query, key, value = (packed_rows.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
    window = _WINDOW.get() if _num_recordings else None
    layer = None if window is None else window.layers.get(module)
    settings = {"softmax_scale": scaling, "softcap": softcap or 0.0, "is_causal": is_causal}
    tensors = (module, query, key, value, attention_mask)
    if layer is None:
        out = _plain(*tensors, dropout, settings, kwargs)
        return (out if packed_rows is None else packed_rows.pack(out)), None
    check(
        packed_rows is None,
        "packed_rows: got packed rows in a recorded layer, expected padded ones; record a forward pass of padded rows",
    )
    _check_unused(kwargs, _IN_THE_MASK, "it is not supported in recorded layers; leave this layer out of layers=")
    weights = window.weights_for(layer, query.shape[2], key)
    apart = dropout > 0.0 or (window.recomputes and torch.is_grad_enabled())
    with torch.set_grad_enabled(torch.is_grad_enabled() and (window.differentiable or not apart)):
        reported = {"head_reduction": window.head_reduction, "backend": window.backend}
        found = _attend(*tensors, weights, window, **settings, **reported)
    out = _plain(*tensors, dropout, settings, kwargs) if apart else found.out.contiguous()
    return out, window.store(layer, found.mass)


def register_attention(name: str = DEFAULT_NAME) -> str:
    """Register the attention and its mask function under `name`; again is harmless. Returns the name.

    Raises:
        ValueError: a name that transformers treats specially.
    """
    check(
        "flash" not in name and "flex" not in name and name not in ("eager", "sdpa"),
        f"name: got {name!r}, expected one without 'flash' or 'flex' and other than 'eager' and 'sdpa', which "
        f"transformers dispatches by itself; use {DEFAULT_NAME!r}",
    )
    AttentionInterface.register(name, _attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)  # without it padding would be ignored in silence
    _NAMES.add(name)
    return name


def enable_visual_mass(model: nn.Module, name: str = DEFAULT_NAME) -> nn.Module:
    """Let the text model of `model` attend through the registered attention; vision towers keep theirs. Returns model.

    Args:
        model: a transformers model, also inside DistributedDataParallel or PEFT.

    Raises:
        ValueError: the model does not use the attention interface.
    """
    register_attention(name)
    inner = _unwrapped(model)
    text_config = inner.config.get_text_config()
    inner.set_attn_implementation(name if text_config is inner.config else {"text_config": name})
    check(
        text_config._attn_implementation == name and bool(_attention_modules(inner)),
        f"model: got {type(inner).__name__}, whose text model does not take a registered attention, expected one on "
        "transformers' AttentionInterface; check that its attention modules call ALL_ATTENTION_FUNCTIONS",
    )
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers."""
    while not hasattr(model, "config") and hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _attention_modules(model: nn.Module) -> dict[nn.Module, int]:
    """Modules with a layer index whose config names a registered attention -> the index."""
    found = {}
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation in _NAMES and isinstance(getattr(module, "layer_idx", None), int):
            found[module] = module.layer_idx
    return found


def _wanted_modules(model: nn.Module, layers: Sequence[int] | None) -> dict[nn.Module, int]:
    """The attention modules of the wanted layers; negative numbers count from the last layer."""
    modules = _attention_modules(model)
    check(
        bool(modules),
        f"model: got {type(model).__name__} without a layer on the recording attention, expected it to be enabled; "
        "call enable_visual_mass(model) first",
    )
    if layers is None:
        return modules
    present = set(modules.values())
    num_layers = max(present) + 1
    wanted = {layer + num_layers if layer < 0 else layer for layer in layers}
    check(
        bool(wanted) and wanted <= present,
        f"layers: got {list(layers)}, expected some of {sorted(present)} (negative numbers count from the last); "
        "choose layers of the text model",
    )
    return {module: layer for module, layer in modules.items() if layer in wanted}


def _calls_all(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The models inside `model` that hold all of `layers`: its base model, its text model."""
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [module for module in inner if set(layers) <= set(module.modules())]


def _recomputes(model: nn.Module) -> bool:
    """Whether a backward pass would run layers again."""
    flagged = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    name = next(
        (name for name in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(inner, name)), ""
    )
    check(
        bool(name) and (bool(flagged) or not getattr(inner, name)),
        f"{type(inner).__name__}: got {f'{name}=True' if name else 'no is_activation_checkpointing'} and no layer with "
        "gradient_checkpointing set, expected transformers 4.57 to 5.24, where a layer tells so; install one of them",
    )
    wrapped = any(type(module).__name__ == "CheckpointWrapper" for module in model.modules())
    return wrapped or any(module.training for module in flagged)


def _open_window(window: Window, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook."""
    if window.depth == 0:
        embeds = kwargs.get("inputs_embeds")
        input_ids = kwargs.get("input_ids")
        if input_ids is None and args and isinstance(args[0], torch.Tensor) and not args[0].is_floating_point():
            input_ids = args[0]
        tokens = input_ids if input_ids is not None else embeds
        check(
            tokens is not None,
            "record_visual_mass: got a forward pass with neither input_ids nor inputs_embeds, expected one; "
            "pass them by keyword",
        )
        window.recomputes = torch.is_grad_enabled() and _recomputes(module)
        check(
            not (window.recomputes and window.differentiable),
            "differentiable: got True under gradient checkpointing, expected one of the two: recorded masses would "
            "lose their graph; turn checkpointing off or record with differentiable=False",
        )
        window.open(tokens.shape[1], find_cache(args, kwargs), input_ids)
        _WINDOW.set(window)
    window.depth += 1


def _close_window(window: Window, output: object) -> None:
    """Forward hook; after an error too, then without an output."""
    window.depth = max(0, window.depth - 1)
    if window.depth == 0 and _WINDOW.get() is window:
        _WINDOW.set(None)
        if output is not None:
            window.close()


@contextmanager
def record_visual_mass(
    model: nn.Module,
    *,
    key_weights: KeyWeights = None,
    layers: Sequence[int] | None = None,
    head_reduction: str = "mean",
    query_mask: torch.Tensor | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> Iterator[VisualMassRecord]:
    """Record the visual mass of every forward pass of `model` inside the block; the record holds the last one.

    Recorded are calls of the model and of the models inside it that hold all recorded layers: its base model
    (`model.model`), its text model. generate() is a forward pass for the prompt
    and one for each token: afterwards the record holds the last token's masses, (B, 1). For all tokens of an answer,
    run one forward pass over prompt and answer.

    Args:
        model: a transformers model after `enable_visual_mass(model)`; may be wrapped (DDP, PEFT).
        key_weights: which keys count. None: tokens equal to config.image_token_id. (B, S) or (B, S, G) bool or float:
            for all keys of the sequence; later ones count 0. A callable: input_ids (B, T) -> (B, T[, G]) for the tokens
            of one forward pass, cached ones are remembered.
        layers: indices of text layers, negative ones from the end; None = all. Others run SDPA at no extra cost.
        head_reduction: "mean" over the query heads or "none".
        query_mask: (B, T) bool: rows wanted, others are 0. Not with generate(), whose T changes.
        differentiable: keep the graph of the masses; not together with gradient checkpointing.
        backend: of the attention operator, see `mmrpt_kernels.backends`.

    Raises:
        ValueError: the model is not enabled or already recorded, unknown layers, no image token id; at a forward pass:
            weights or masks that do not fit it.
    """
    inner = _unwrapped(model)
    modules = _wanted_modules(inner, layers)
    check(
        not any(module in _RECORDING for module in modules),
        "model: got one that is being recorded already, expected one recording at a time; ask one for all layers",
    )
    check(
        head_reduction in ("mean", "none"),
        f"head_reduction: got {head_reduction!r}, expected 'mean' or 'none'; reduce anything else from 'none' yourself",
    )
    image_token_id = getattr(inner.config, "image_token_id", getattr(inner.config, "image_token_index", None))
    check(
        key_weights is not None or image_token_id is not None,
        f"key_weights: got None for {type(inner).__name__}, whose config has no image_token_id, expected weights; "
        "pass a tensor (B, S) or a function of input_ids",
    )
    global _num_recordings
    record = VisualMassRecord()
    all_layers = sorted(set(_attention_modules(inner).values()))
    wanted = (key_weights, image_token_id, head_reduction, query_mask, differentiable, backend)
    window = Window(modules, all_layers, record, *wanted)
    hooks = []
    for root in {model, inner, *_calls_all(inner, modules)}:
        hooks.append(
            root.register_forward_pre_hook(
                lambda module, args, kwargs: _open_window(window, module, args, kwargs), with_kwargs=True
            )
        )
        hooks.append(root.register_forward_hook(lambda _, __, out: _close_window(window, out), always_call=True))
    _RECORDING.update(modules)
    _num_recordings += 1
    try:
        yield record
    finally:
        _num_recordings -= 1
        for hook in hooks:
            hook.remove()
        for module in modules:
            _RECORDING.discard(module)
