"""What `python -m mmrpt.train --dry-run` prints: sizes, the memory of each phase, and what would lower it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from transformers import AutoConfig, PretrainedConfig

from mmrpt.engines.estimate import DEMO_TEXT, HIDDEN, IMAGES, TEXT, Estimate, estimate, largest_image, largest_pixels
from mmrpt.engines.run import check_dtype, prepare_machine
from mmrpt.families import model_folder
from mmrpt.lora import base_folder, check_lora
from mmrpt.memory import PARTS
from mmrpt.scale import shrink
from mmrpt.settings import TIMED_CONTROLS, Settings
from mmrpt.sources import open_given
from mmrpt.world.tiny_vlm import SPECIAL_TOKENS, tiny_config

GIB = 2**30
# Of the device's memory: what the allocator's gaps, CUDA's context and the scratch of math libraries leave.
USABLE = 0.95
LARGE = 100_000_000  # parameters of a model whose memory is worth the seconds of an estimate
CONFIGS = ("config.json", "adapter_config.json")
ASKING = ("evaluation", "validation")  # phases of evaluation.batch_size questions at once
HUB = "hf:"  # what names of data on the hub begin with


def dry_run(
    settings: Settings, with_overrides: Callable[..., Settings], *, gpu_memory: float | None = None
) -> Estimate:
    """Prints the table. `with_overrides` gives the settings with others changed, for advice; `gpu_memory`, in GiB, is
    that of a GPU which is not here. Raises SettingsError, OSError or ValueError as a run would."""
    check_lora(settings)
    check_dtype(settings)
    device = prepare_machine(settings, settings.device if gpu_memory is None else "cpu")
    kind = device.type if gpu_memory is None else "cuda"
    memory = device_memory(device) if gpu_memory is None else int(gpu_memory * GIB)
    if settings.data.pairs is not None and not settings.data.pairs.startswith(HUB):
        print(f"pairs: {len(open_given(settings, hold=False)):,} rows in {settings.data.pairs}")
    config = model_config(settings)
    found = estimate(settings, config, kind)
    print("\n".join(_head(settings, config, found)), "", _table(found), "", sep="\n")
    print(peak_line(found, memory))
    if settings.engine == "trl":
        print("engine is trl: this is the native engine's memory on one device; FSDP divides weights and moments.")
    if found.peak > USABLE * memory:
        print("\n".join(_advice(settings, with_overrides, config, kind, found)))
    return found


def peak_line(found: Estimate, memory: int) -> str:
    """The peak beside the bytes that the device has."""
    share = found.peak / memory
    return f"memory: {_size(found.peak)} in {found.largest}, {share:.0%} of the device's {_size(memory)}"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def tell_memory(settings: Settings, parameters: int, device: torch.device) -> None:
    """Prints the estimate in one line, as a run does at its start; of a small model nothing."""
    if parameters < LARGE:
        return
    try:
        print(peak_line(estimate(settings, model_config(settings), device.type), device_memory(device)), flush=True)
    except Exception as error:  # a run that would work must not end because it was not foreseen
        print(f"memory: no estimate ({type(error).__name__}: {error})", flush=True)


def model_config(settings: Settings) -> PretrainedConfig:
    """The config of the model that a run would open; of a hub name nothing else is downloaded."""
    model = settings.model
    if model.path is None:
        ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
        return tiny_config(settings.demo.tiny, ids, settings.demo.tiny.vocab_size)
    folder = model_folder(model.path, model.revision, CONFIGS)
    config = AutoConfig.from_pretrained(base_folder(folder, CONFIGS))
    if settings.scale == "tiny":
        shrink(config, words=config.get_text_config().vocab_size)
    return config


def device_memory(device: torch.device) -> int:
    """Bytes of the device that this process has or can get; of a CPU all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _head(settings: Settings, config: PretrainedConfig, found: Estimate) -> list[str]:
    side = largest_image(settings, config.vision_config).width
    rollout = settings.rollout
    steps = {"warm-up": settings.warmup.steps, "RL": settings.rl.steps}
    controls = settings.control.phases
    steps |= {name: settings.rl.steps for name in controls if name not in TIMED_CONTROLS}
    by_time = [f"RL's seconds of {name}" for name in controls if name in TIMED_CONTROLS]
    text = DEMO_TEXT if settings.model.path is None else TEXT
    return [
        f"model: {settings.model.path or 'the tiny model'}, {found.parameters:,} parameters, {found.trained:,} trained",
        "steps: " + ", ".join([*(f"{count} of {name}" for name, count in steps.items()), *by_time]),
        f"a step of RL: {settings.rl.groups_per_step} groups of {rollout.group_size} answers, forward passes of "
        f"{settings.model.batch_tokens:,} tokens",
        f"assumed: images of {side} x {side} pixels, {text} tokens of text with each, answers of "
        f"{rollout.max_new_tokens:,} tokens",
    ]


def _table(found: Estimate) -> str:
    """Memory by phase and part, at the moment of each phase when it needs most."""
    unit, name_of_unit = (GIB, "GiB") if found.peak >= GIB else (2**20, "MiB")
    known = [*PARTS, *sorted({p for parts in found.phases.values() for p in parts} - {*PARTS})]
    parts = [part for part in known if any(values.get(part, 0) for values in found.phases.values())]
    rows = [[name_of_unit, *parts, "in all"]]
    for name, values in found.phases.items():
        numbers = [*(values.get(part, 0) for part in parts), sum(values.values())]
        rows.append([name, *(f"{number / unit:.2f}" for number in numbers)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left, *right = widths
    lines = [[row[0].ljust(left), *map(str.rjust, row[1:], right)] for row in rows]
    return "\n".join(map("  ".join, lines))


def _advice(
    settings: Settings,
    with_overrides: Callable[..., Settings],
    config: PretrainedConfig,
    kind: str,
    found: Estimate,
) -> list[str]:
    """What lowers the peak, the most first: each change alone, by an estimate of the phase that needs most."""
    phase = found.largest
    others = max((sum(parts.values()) for name, parts in found.phases.items() if name != phase), default=0)
    peaks = []
    for change in _changes(settings, phase, found.phases[phase]):
        changed = estimate(with_overrides(*change.split()), config, kind, only=phase).phases
        peak = max(others, sum(changed.get(phase, {}).values()))
        if peak < 0.99 * found.peak:
            peaks.append((peak, change))
    if not peaks:
        return ["That is more than a run can use of it, and no one setting lowers it."]
    lines = [f"  {change:<48}  {_size(peak)}" for peak, change in sorted(peaks)]
    return ["That is more than a run can use of it. What each of these alone would lower it to:", *lines]


def _changes(settings: Settings, phase: str, parts: Mapping[str, int]) -> list[str]:
    """Overrides that may lower what this phase needs."""
    model, lora, rollout, evaluation = settings.model, settings.model.lora, settings.rollout, settings.evaluation
    pixels, whole = largest_pixels(settings), model.path is not None and not lora.rank and not model.freeze
    at_once = min(rollout.batch_size or 1 << 30, rollout.prompts * rollout.group_size)
    fewer = rollout.prompts // 2
    enough = fewer * settings.rl.max_rounds >= settings.rl.groups_per_step
    passes = phase in ("warm-up", "update", "control", "perception")
    changes = {
        "model.gradient_checkpointing=true": passes and not model.gradient_checkpointing,
        f"model.batch_tokens={model.batch_tokens // 2}": passes and model.batch_tokens > 1024,
        "model.compute=bfloat16": model.compute == "float32" and model.dtype == "float32",
        f"model.max_pixels={pixels // 2}": model.path is not None,
        "model.freeze=[vision]": not model.freeze and not lora.rank,
        "model.freeze=[vision,merger]": model.freeze == ("vision",),
        "model.lora.rank=32 model.dtype=bfloat16": whole,
        "model.lora.quantized=true": bool(lora.rank) and not lora.quantized,
        f"rollout.prompts={fewer}": parts.get(IMAGES, 0) > 0 and phase not in ASKING and enough,
        f"rollout.batch_size={at_once // 2}": phase == "sampling" and at_once // 2 >= rollout.group_size,
        "rollout.keep_hidden_mb=0": parts.get(HIDDEN, 0) > 0,
        f"evaluation.batch_size={evaluation.batch_size // 2}": phase in ASKING and evaluation.batch_size > 1,
    }
    return [change for change, possible in changes.items() if possible]
