"""What every phase needs: settings, policy, pairs, folder, and whether the process was asked to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from mmrpt.checkpoint import load_checkpoint
from mmrpt.corpus import ImageCache
from mmrpt.families import freeze_parts
from mmrpt.lora import adapter_weights, add_adapters, check_adapters, check_lora, copied, put_back, with_weights
from mmrpt.policy import Policy
from mmrpt.processes import part_of
from mmrpt.rewards import RewardFunction, load_rewards
from mmrpt.rollout.collect import Reference
from mmrpt.run_folder import RunFolder
from mmrpt.scale import with_tiny_model
from mmrpt.settings import CONTROL_PHASES, ModelSettings, Settings, SettingsError
from mmrpt.sources import Sources, open_sources
from mmrpt.trackers import Trackers
from mmrpt.world.warm_start import build_start_policy

# Whose weights a phase begins with; before the first there is only the start model.
BEGINS_WITH = {
    "vision_pretraining": None,
    "warmup": "vision_pretraining",
    **dict.fromkeys(("rl", *CONTROL_PHASES.values()), "warmup"),
}

# A bfloat16 has 8 significant bits: an update below 2**-9 of a weight leaves it as it is, and weights are about 0.02.
SMALLEST_LR_OF_BFLOAT16 = 1e-4


class Stop:
    """SIGTERM (Slurm, machines that are taken back) ends the process: at a step's end with a checkpoint, else at once.

    The exit status is 143, as for a process that does not handle the signal.
    """

    def __init__(self) -> None:
        self.requested, self._deferred = False, False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._asked)

    def _asked(self, number: int, frame: Any) -> None:
        self.requested = True
        if not self._deferred:
            self.check("between steps")

    @contextmanager
    def at_a_step(self) -> Iterator[None]:
        """Inside, a request waits until `check` is called."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self, where: str) -> None:
        if self.requested:
            print(f"stopped by SIGTERM ({where}); go on with --resume", flush=True)
            raise SystemExit(128 + signal.SIGTERM)


@dataclass
class Run:
    """One run in one folder. Made by `open_run`, which raises what a user can mend before anything is trained."""

    settings: Settings
    policy: Policy
    sources: Sources
    images: ImageCache
    folder: RunFolder
    rewards: Mapping[str, RewardFunction]  # of reward.custom, by the term's name
    stop: Stop = field(default_factory=Stop)
    start_adapters: Mapping[str, Tensor] = field(default_factory=dict)  # of the start model, where it has any

    def load(self, phase: str | None) -> None:
        """Puts into the policy the weights that `phase` ended with; of a phase without steps, those it began with."""
        while phase is not None and not (self.folder.checkpoints / phase).exists():
            phase = BEGINS_WITH[phase]
        if phase is not None:
            load_checkpoint(self.folder.checkpoints / phase, self.policy)
        elif self.start_adapters:
            put_back(self.policy.model, self.start_adapters)
        else:
            start = start_policy(self.settings, self.sources, self.policy.device)
            self.policy.model.load_state_dict(start.model.state_dict())

    def frozen(self, phase: str) -> Reference:
        """The policy that `phase` ended with, not to be trained: `with frozen() as other:`, as often as is needed.

        A copy of the model; with adapters the model itself, whose own adapters step aside inside.
        """
        if self.start_adapters:
            own = copied(self.policy.model)
            self.load(phase)
            weights = copied(self.policy.model)
            put_back(self.policy.model, own)
            return partial(with_weights, self.policy, weights)
        other = replace(self, policy=start_policy(self.settings, self.sources, self.policy.device))
        other.load(phase)
        other.policy.model.eval().requires_grad_(False)
        return partial(nullcontext, other.policy)


def open_run(settings: Settings) -> Run:
    """Opens pairs, model and folder. Raises SettingsError, OSError or ValueError with the remedy.

    Of processes that torchrun started the first records environment and progress, and each takes its own GPU.
    """
    first = part_of(None)[0] == 0
    check_lora(settings)
    check_dtype(settings)
    device = prepare_machine(settings, device_of_process(settings.device))
    rewards, trackers = load_rewards(settings.reward.custom), Trackers(settings.track if first else ())
    sources = open_sources(settings)
    settings = with_tiny_model(settings)
    policy = start_policy(settings, sources, device)
    if adapter_weights(policy.model) and not settings.model.lora.rank:
        raise SettingsError(
            f"model.path is {settings.model.path}, a folder of adapters, and model.lora.rank is 0: give their rank to "
            f"train them on, or merge them first: python -m mmrpt.export {settings.model.path} MERGED."
        )
    folder = RunFolder(settings.run_dir)
    folder.trackers = trackers
    if first:
        trackers.start(settings, folder.path)
        folder.record_environment(device_name(device))
    print(f"device: {device_name(device)}", flush=True)
    images = ImageCache(sources.train, settings.data.cache_mb << 20)
    start = {name: weights.cpu() for name, weights in copied(policy.model).items()}
    return Run(settings, policy, sources, images, folder, rewards, start_adapters=start)


def start_policy(settings: Settings, sources: Sources, device: torch.device) -> Policy:
    """The model before any training: that of model.path, or the tiny one of the demo."""
    if settings.model.path is not None:
        policy = given_policy(settings.model, device)
        policy.check_head()
    else:
        policy = build_start_policy(settings, sources)
        policy.model.to(device)
    prepare_policy(policy, settings)
    return policy


def given_policy(model: ModelSettings, device: torch.device) -> Policy:
    """The model of model.path as it is on disk, opened as the settings say."""
    return Policy.load(
        model.path,
        getattr(torch, model.dtype),
        device,
        revision=model.revision,
        quantized=model.lora.quantized,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
    )


def prepare_policy(policy: Policy, settings: Settings) -> None:
    """Makes of a loaded model one that is trained as the settings say."""
    model = settings.model
    if model.lora.rank and adapter_weights(policy.model):
        check_adapters(policy, model.lora, model.path)
    elif model.lora.rank:
        add_adapters(policy, model.lora, model.path, model.revision, settings.seed)
    policy.compute = getattr(torch, model.compute)
    freeze_parts(policy.model, model.freeze)
    if model.gradient_checkpointing:
        # Renamed in transformers 5.24, which warns of the old name. What transformers 4 does by default loses the
        # gradients of blocks whose input needs none.
        renamed = getattr(policy.model, "activation_checkpointing_enable", None)
        (renamed or policy.model.gradient_checkpointing_enable)({"use_reentrant": False})


def prepare_machine(settings: Settings, device: str) -> torch.device:
    """Threads, attention and device as the settings say, and no progress bar of transformers for each of its files."""
    transformers_logging.disable_progress_bar()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # For the whole process, as a backward pass that computes activations again must find the same kernels.
    for switch in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(settings.model.attention == "sdpa")
    return resolve_device(device)


def device_of_process(name: str) -> str:
    """ "cuda" or "auto" as the GPU that torchrun gives this process."""
    own = os.environ.get("LOCAL_RANK")
    shared = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return f"cuda:{own}" if own is not None and shared else name


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto": cuda where torch has it, else cpu. Raises SettingsError for a device that torch
    does not know or that this machine lacks."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device is {name!r}, which cannot be used here ({reason}): try device=cpu.") from error


def device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def check_dtype(settings: Settings) -> None:
    """Raises SettingsError where trained weights are bfloat16 and updates too small to change them."""
    model = settings.model
    if model.path is None or model.dtype != "bfloat16" or model.lora.rank:  # adapters are float32
        return
    for phase, steps, optimiser in (
        ("warmup", settings.warmup.steps, settings.warmup.optimiser),
        ("rl", settings.rl.steps, settings.rl.optimiser),
    ):
        if steps and optimiser.lr < SMALLEST_LR_OF_BFLOAT16:
            raise SettingsError(
                f"model.dtype is bfloat16 and {phase}.optimiser.lr is {optimiser.lr:g}: AdamW changes a weight by "
                f"about lr a step, which rounds to nothing where the weight is above {optimiser.lr * 2**9:.1g}: "
                "most would never move. Keep the weights in float32 and multiply in bfloat16: model.dtype=float32 "
                "model.compute=bfloat16."
            )
