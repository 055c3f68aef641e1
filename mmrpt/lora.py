"""Low-rank adapters (LoRA) inside of a policy's model, by peft: put in, saved, read back, and set aside for a while.

peft replaces linear layers where they stand, so class and attribute paths of the model stay what they were. Adapters
are float32 whatever the weights beneath them are.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmrpt.families import MERGERS, MODEL_FILES, OTHER_RELEASE, TOWERS, base_model, model_folder
from mmrpt.settings import LoraSettings, Settings, SettingsError

if TYPE_CHECKING:
    from mmrpt.policy import Policy

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # peft's name of the one adapter that a model has here
PREFIX = "base_model.model."  # of the names in a file of adapters, which peft's wrapper of a model gives


def check_lora(settings: Settings) -> None:
    """Raises SettingsError where other settings contradict model.lora, or it asks for what is not installed."""
    model, lora = settings.model, settings.model.lora
    if not (lora.rank or lora.quantized):
        return
    wanted = f"model.lora.rank is {lora.rank}" if lora.rank else "model.lora.quantized is true"
    if model.path is None:
        raise SettingsError(
            f"{wanted} and model.path is null: adapters and 4-bit weights are for a pretrained model; set model.path."
        )
    if not lora.rank:
        raise SettingsError(f"{wanted} and model.lora.rank is 0: weights of 4 bits cannot be trained; set a rank.")
    if model.freeze:
        raise SettingsError(
            f"{wanted} and model.freeze is {list(model.freeze)}: beneath adapters every weight stays as it is. Leave "
            "model.freeze out, and say by model.lora.targets what gets adapters."
        )
    for phase, optimiser in (("warmup", settings.warmup.optimiser), ("rl", settings.rl.optimiser)):
        if optimiser.kind != "adamw":
            raise SettingsError(
                f"{wanted} and {phase}.optimiser.kind is {optimiser.kind}: Muon makes the update of a whole matrix "
                "orthogonal, and an adapter is the product of two; use adamw."
            )
    for package in ("peft", "bitsandbytes") if lora.quantized else ("peft",):
        imported(package, "qlora" if lora.quantized else "lora")


def imported(package: str, extra: str) -> Any:
    """The optional package. Raises SettingsError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SettingsError(
            f"model.lora needs the package {package} ({error}): pip install {package}, or pip install 'mmrpt[{extra}]'."
        ) from error


# ---------------------------------------------------------------- putting adapters in


def add_adapters(policy: Policy, lora: LoraSettings, base: str, revision: str | None, seed: int) -> None:
    """New adapters, which change nothing yet, in a policy opened from `base`; all other weights are frozen.

    Draws depend on `seed` alone. Raises SettingsError for targets that the model does not have or that are not its
    layers' to adapt.
    """
    peft = imported("peft", "lora")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        target_modules=target_modules(policy, lora.targets),
        # A folder by its full path: adapters are opened from anywhere.
        base_model_name_or_path=str(Path(base).absolute()) if Path(base).is_dir() else base,
        revision=revision,
    )
    _inject(policy.model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_weights(policy.model).items():
            if ".lora_A." in name:  # as peft draws them; lora_B is zero
                drawn = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
                parameter.copy_(drawn)


def check_adapters(policy: Policy, lora: LoraSettings, path: str) -> None:
    """Raises SettingsError unless the adapters that came with the folder `path` are those that `lora` asks for."""
    config, own = policy.model.peft_config[NAME], set(adapter_weights(policy.model))
    found, wanted = (config.r, config.lora_alpha), (lora.rank, lora.alpha or 2 * lora.rank)
    if found != wanted:
        raise SettingsError(
            f"model.path is {path}, adapters with model.lora.rank={found[0]} model.lora.alpha={found[1]}, and "
            f"model.lora asks for rank {wanted[0]} and alpha {wanted[1]}: give theirs to train them on."
        )
    layers = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in own}
    if different := sorted(layers ^ target_layers(policy, lora.targets)):
        raise SettingsError(
            f"model.path is {path}, adapters of {len(layers)} layers, which are not those of model.lora.targets="
            f"{lora.targets} (the first that is among one alone: {different[0]}): give theirs to train them on."
        )


def target_modules(policy: Policy, targets: str | tuple[str, ...]) -> str | list[str]:
    """What peft's LoraConfig is to adapt: a pattern of whole names for "decoder" and "all", or the given endings."""
    layers = target_layers(policy, targets)
    if not isinstance(targets, str):
        return list(targets)
    # Blocks differ by their number alone.
    return "|".join(sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in layers}))


def target_layers(policy: Policy, targets: str | tuple[str, ...]) -> set[str]:
    """Names of the layers to adapt, as they are without adapters.

    Raises SettingsError for an ending that no module has or that the embedding or the lm head has.
    """
    model = policy.model
    named = model.named_modules()  # with adapters, a layer is what peft put in its place and what is inside of that
    names = {module: name.removesuffix(".base_layer") for name, module in named if ".lora_" not in name}
    if isinstance(targets, str):
        part = {"decoder": policy.text_model, "all": base_model(model)}[targets]
        layers = {names[m] for m in part.modules() if m in names and isinstance(m, nn.Linear)}
        if not layers:
            raise ValueError(f"{type(model).__name__} has no linear layers in {targets}. {OTHER_RELEASE}")
        return layers
    words = {names[model.get_input_embeddings()], names[model.get_output_embeddings()]}
    layers = set()
    for target in targets:
        hit = {name for name in names.values() if name == target or name.endswith(f".{target}")}
        if not hit:
            raise SettingsError(
                f"model.lora.targets names {target!r}, which no module of {type(model).__name__} is called: expected "
                "endings such as q_proj or down_proj, or decoder, or all."
            )
        if own := words & hit:
            raise SettingsError(
                f"model.lora.targets names {target!r}, which is {', '.join(own)}: embedding and lm head get no "
                "adapters, since the losses read the head's weights themselves; leave it out."
            )
        layers |= hit
    return layers


def _inject(model: nn.Module, config: Any) -> None:
    """Puts the config's adapters into the model, in float32; nothing else has a gradient after it."""
    peft = imported("peft", "lora")
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    except ValueError as error:  # a target that is not a linear layer
        raise SettingsError(f"peft refuses model.lora.targets: {error}") from error
    own = {id(parameter) for parameter in adapter_weights(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
        if id(parameter) in own:
            parameter.data = parameter.data.float()


# ---------------------------------------------------------------- their weights


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by the names that a file of peft's has; empty where the model has none."""
    mark = f".{NAME}."
    named = model.named_parameters() if getattr(model, "peft_config", None) else ()
    return {PREFIX + name.replace(mark, "."): parameter for name, parameter in named if mark in name}


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapters' weights; empty where the model has none."""
    return {name: parameter.detach().clone() for name, parameter in adapter_weights(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into the model's adapters in place. Raises ValueError unless they are of the same names."""
    own = adapter_weights(model)
    if different := sorted(own.keys() ^ weights.keys()):
        raise ValueError(
            f"{len(different)} adapters are not on both sides, the first {different[0]}: expected LoRA matrices of the "
            f"{len(own)} names that the model has, without DoRA, biases or layers saved whole."
        )
    for name, parameter in own.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}.")
        parameter.copy_(weights[name])


@contextmanager
def with_weights(policy: Policy, weights: Mapping[str, Tensor]) -> Iterator[Policy]:
    """Inside, the policy's adapters have other weights, for passes without gradient; then their own again.

    The parameters themselves stay, with their gradients and what an optimiser keeps of them.
    """
    own = adapter_weights(policy.model)
    before, training = {name: parameter.data for name, parameter in own.items()}, policy.model.training
    policy.model.eval()
    try:
        _point_to(own, weights)
        with torch.no_grad():
            yield policy
    finally:
        _point_to(own, before)
        policy.model.train(training)


def _point_to(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data = weights[name]
    torch.clear_autocast_cache()  # an outer autocast keeps what it cast a parameter to


# ---------------------------------------------------------------- on disk


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes config and weights: of a model with adapters theirs alone, as peft does; the config names the model."""
    if not (weights := copied(model)):
        model.save_pretrained(folder)
        return
    model.peft_config[NAME].save_pretrained(folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapters(model: nn.Module, folder: Path) -> None:
    """Copies the weights of a folder of adapters into the model's own, in place."""
    put_back(model, load_file(folder / WEIGHTS))


def open_adapters(model: nn.Module, folder: Path) -> None:
    """Puts the adapters of a folder into the model that they were made for."""
    config = imported("peft", "lora").PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # as saved ones are marked
    _inject(model, config)
    read_adapters(model, folder)


def merge(model: nn.Module) -> None:
    """Adds the adapters to the weights beneath them, in their type, and leaves an ordinary model."""
    layer = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    for name, module in list(model.named_modules()):
        if isinstance(module, layer):
            module.merge(safe_merge=True)  # refuses what is not finite
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config


def base_folder(folder: Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of the model beneath a folder of adapters; `folder` itself where it holds none. `files`: of
    `model_folder`.

    Raises FileNotFoundError or OSError, naming both, where that model is not there.
    """
    if not (folder / CONFIG).is_file():
        return folder
    config = imported("peft", "lora").PeftConfig.from_pretrained(str(folder))
    try:
        return model_folder(config.base_model_name_or_path, config.revision, files)
    except OSError as error:
        raise type(error)(
            f"the adapters in {folder} are for the model {config.base_model_name_or_path}: {error} Where it has moved, "
            f"write its new place into base_model_name_or_path of {folder / CONFIG}."
        ) from error


# ---------------------------------------------------------------- 4 bits


def quantization(dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a decoder in 4-bit NF4; `dtype` is that of its products and of the rest."""
    imported("bitsandbytes", "qlora")
    imported("accelerate", "qlora")  # by which transformers places such weights
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # The losses read the head's weights; the vision tower is small, and what it sees is what is trained.
        llm_int8_skip_modules=["lm_head", *(f"model.{name}" for name in (*TOWERS, *MERGERS))],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def check_quantized(policy: Policy) -> None:
    """Raises ValueError unless all of the decoder's linear layers and nothing else are in 4 bits: which layers these
    are is told by their names."""
    four_bit = imported("bitsandbytes", "qlora").nn.Linear4bit
    found = {m for m in policy.model.modules() if isinstance(m, four_bit)}
    wanted = {m for m in policy.text_model.modules() if isinstance(m, nn.Linear)}  # which Linear4bit is too
    if found != wanted or not found:
        raise ValueError(
            f"{len(found)} layers of {type(policy.model).__name__} are in 4 bits, expected its decoder's "
            f"{len(wanted)} and no other. {OTHER_RELEASE}"
        )
    for module in found:
        # A pass without gradient on a CPU with bfloat16 instructions would bring weights into an order for inference
        # alone, after which none has a gradient.
        module.support_avx512bf16_for_cpu = False
