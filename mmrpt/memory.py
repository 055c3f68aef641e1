"""Device memory of a run, measured without the device, weights or data: the trainer's own code runs on tensors that
have shapes alone, and a ledger notes when their storages come and go.

torch's FakeTensors stand for the weights and all that is computed from them; token ids, masks and grids are small and
real, so that code which branches on them does so as in a run. Autograd, autocast, checkpointing and the optimisers are
torch's own: what they hold, and when they let go of it, is not modelled here but happens. Seen is what PyTorch's
allocator gives out for tensors; not seen are scratch memory of math libraries, CUDA's context and gaps between blocks.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForImageTextToText, PretrainedConfig

from mmrpt.policy import QwenVLPolicy
from mmrpt.policy.qwen_vl import FAMILIES
from mmrpt_kernels.lm_head.chunk_sizes import sized_for

WEIGHTS, GRADIENTS, OPTIMISER = "weights", "gradients", "optimiser"
HALVES = "half-precision weights"  # copies that autocast makes for a pass
VISION, DECODER, LOSS, BACKWARD = "vision tower", "decoder", "head and loss", "backward pass"
PARTS = (WEIGHTS, OPTIMISER, GRADIENTS, HALVES, VISION, DECODER, LOSS, BACKWARD)
# Real results above this become shapes too: attention masks of long rows.
LARGEST_REAL = 1 << 22

# Bytes of a weight in NF4: half of one, a byte for 64 of them, and a float32 for 256 of those.
FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)

aten = torch.ops.aten
ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
TAKES_INDICES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
# What code branches on or indexes with, where there are no values: a search ends, and id 0 is drawn, which ends no
# answer.
NOTHING_FOUND = (aten.any.default, aten.argmax.default, aten.searchsorted.Tensor)


class Ledger(TorchDispatchMode):
    """Bytes of live storages by part, and the parts at the moment when their sum was highest.

    Inside `with ledger:` each storage that an operation makes counts until it is freed, under the part that is being
    worked on: what `part` says, and whether autograd runs backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = VISION
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._total = self._highest = 0
        self._storages: dict[int, tuple[str, int]] = {}
        self._weights: set[int] = set()

    def hold(self, tensors: Iterable[Tensor], part: str, share: float | None = None) -> None:
        """Counts tensors under a part, also those that are counted already, as a share of their size; None: as they are
        counted, else in full."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (known := self._storages.get(storage._cdata)) is None:
                self._add(storage, part, 1.0 if share is None else share)
            else:
                size = known[1] if share is None else int(share * storage.nbytes())
                self.live[known[0]] -= known[1]
                self.live[part] += size
                self._total += size - known[1]
                self._storages[storage._cdata] = (part, size)
            if part == WEIGHTS:
                self._weights.add(storage._cdata)

    def restart(self) -> None:
        """The peak is that of what follows."""
        self._highest, self.peak = self._total, dict(self.live)

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":  # of a tensor's device, which is asked more often than anything is computed
            return function(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fake = any(isinstance(t, FakeTensor) for t in given)
        if fake and function is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if fake and function in TAKES_INDICES:
            args = (args[0], [index for mask in args[1] for index in _indices(mask)], *args[2:])
        if fake and function.namespace == "mmrpt_kernels":  # what is inside counts too
            with self:
                return function.redispatch(ON_CPU, *args, **kwargs)
        result = function(*args, **kwargs)
        if fake and function in NOTHING_FOUND:
            result = torch.zeros(result.shape, dtype=result.dtype)
        result = tree_map(lambda t: self._lightened(t, given), result)
        cast = function is aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        part = BACKWARD if torch._C._current_graph_task_id() != -1 else self.part
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._add(storage, HALVES if cast else part)
        return result

    def _lightened(self, result: Any, given: Sequence[Tensor]) -> Any:
        large = isinstance(result, Tensor) and not isinstance(result, FakeTensor) and result.numel() > LARGEST_REAL
        if not large or any(result.untyped_storage()._cdata == t.untyped_storage()._cdata for t in given):
            return result
        return shape_of(result)

    def _add(self, storage: torch.UntypedStorage, part: str, share: float = 1.0) -> None:
        key, size = storage._cdata, int(share * storage.nbytes())
        self._storages[key] = (part, size)
        self.live[part] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self.peak = self._total, dict(self.live)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.live[part] -= size
        self._total -= size


def _indices(mask: Tensor | None) -> list[Tensor | None]:
    """What an index means in places: a mask's, all of them where it has no values."""
    if mask is None or mask.dtype != torch.bool:
        return [mask]
    real = torch.ones(mask.shape, dtype=torch.bool) if isinstance(mask, FakeTensor) else mask
    return list(real.nonzero().unbind(1))


SHAPES = FakeTensorMode(allow_non_fake_inputs=True)


def shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype without data, which counts as one on the CPU."""
    with SHAPES:
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def check_served(config: PretrainedConfig) -> None:
    """Raises ValueError for a model of other families, whose images have no size that its config tells."""
    model_type = type(config).model_type  # 4.57's instance answers with its text model's, once loaded
    if model_type not in FAMILIES:
        raise ValueError(
            f"memory is estimated for {', '.join(FAMILIES)}, and the model is a {model_type}: start the run with few "
            "steps and look at the device's memory."
        )


def shape_policy(
    config: PretrainedConfig, dtype: torch.dtype, side: int, prepare: Callable[[QwenVLPolicy], None]
) -> QwenVLPolicy:
    """A policy of shapes: what `Policy.load` gives for a model of this config, in no time and memory.

    `prepare` does to it what is done to a loaded one (adapters, frozen parts, checkpointing). Its tokenizer knows no
    words; images are PIL images of the size that the model shall see, of at most `side` pixels a side.
    """
    config = copy.deepcopy(config)
    vision = config.vision_config
    if hasattr(vision, "window_size"):
        # Windows are attended to one by one, thousands of calls, which hold together what one large window holds.
        vision.window_size = max(side, vision.window_size)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    policy = QwenVLPolicy(model, _Tokenizer(config), _ImageProcessor(vision))
    prepare(policy)
    shapes: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = shapes.setdefault(tensor, _like(tensor))
    return policy


def _like(tensor: Tensor) -> Tensor:
    shape = shape_of(tensor)
    return nn.Parameter(shape, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape


class _Tokenizer:
    """What a policy asks of its tokenizer before the first text comes."""

    eos_token, eos_token_id, pad_token_id = "<|im_end|>", 1, 1
    all_special_tokens, added_tokens_decoder = ("<|im_end|>",), {}

    def __init__(self, config: PretrainedConfig) -> None:
        self.size = config.get_text_config().vocab_size

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, **options: Any) -> dict[str, list]:
        return {"input_ids": [], "offset_mapping": []}

    def apply_chat_template(self, turns: Sequence[dict], **options: Any) -> str:
        return turns[-1]["content"][-1]["text"] + self.eos_token

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.eos_token_id

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.eos_token


class _ImageProcessor:
    """Rows of patches for images whose sides are multiples of a token's."""

    def __init__(self, vision: PretrainedConfig) -> None:
        self.patch_size, self.merge_size = vision.patch_size, vision.spatial_merge_size
        self.values = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        self.size = {"shortest_edge": 1, "longest_edge": 1 << 40}

    def __call__(self, images: Sequence[Image.Image], **options: Any) -> dict[str, Tensor]:
        grids = [[1, image.height // self.patch_size, image.width // self.patch_size] for image in images]
        patches = sum(rows * columns for _, rows, columns in grids)
        return {
            "pixel_values": shape_of(torch.empty(patches, self.values, device="meta")),
            "image_grid_thw": torch.tensor(grids),
        }


@contextmanager
def measured(policy: QwenVLPolicy, device_type: str, *, quantized: bool = False) -> Iterator[Ledger]:
    """A ledger that holds the weights of a policy of shapes, and knows of what its memory is used for.

    device_type: whose budgets of memory the lm head keeps. quantized: the decoder's frozen matrices count as 4-bit
    ones, and the largest is there besides as products take it.
    """
    ledger, model = Ledger(), policy.model
    if quantized:
        layers = [m.weight for m in policy.text_model.modules() if isinstance(m, nn.Linear)]
        frozen = [weight for weight in layers if not weight.requires_grad]
        ledger.hold(frozen, WEIGHTS, FOUR_BITS / frozen[0].element_size())
        widest = shape_of(max(frozen, key=Tensor.numel))
        ledger.hold([widest], HALVES)
    ledger.hold([*model.parameters(), *model.buffers()], WEIGHTS)

    def work_on(part: str) -> Callable[..., None]:
        return lambda *_: setattr(ledger, "part", part)

    decoder = policy.text_model
    hooks = [
        decoder.register_forward_pre_hook(work_on(DECODER)),
        decoder.register_forward_hook(work_on(LOSS)),
        *(
            p.register_post_accumulate_grad_hook(lambda p: ledger.hold([p.grad], GRADIENTS))
            for p in model.parameters()
            if p.requires_grad
        ),
    ]
    try:
        with warnings.catch_warnings(), sized_for(device_type), ledger:
            # The lm head asks whether two tensors share memory; without data neither has any.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield ledger
    finally:
        for hook in hooks:
            hook.remove()
