"""What every phase needs: settings, policy, pairs, folder, and whether the process was asked to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mmrpt.checkpoint import load_checkpoint
from mmrpt.corpus import ImageCache
from mmrpt.policy import Policy
from mmrpt.rewards import RewardFunction, load_rewards
from mmrpt.run_folder import RunFolder
from mmrpt.settings import Settings, SettingsError
from mmrpt.sources import Sources, open_sources
from mmrpt.trackers import Trackers
from mmrpt.world.warm_start import build_start_policy

# Whose weights a phase begins with; before the first there is only the start model.
BEGINS_WITH = {"vision_pretraining": None, "warmup": "vision_pretraining", "rl": "warmup", "control": "warmup"}


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

    def load(self, phase: str | None) -> None:
        """Puts into the policy the weights that `phase` ended with; of a phase without steps, those it began with."""
        while phase is not None and not (self.folder.checkpoints / phase).exists():
            phase = BEGINS_WITH[phase]
        if phase is not None:
            load_checkpoint(self.folder.checkpoints / phase, self.policy)
        else:
            self.policy.model.load_state_dict(start_policy(self.settings, self.sources).model.state_dict())

    def frozen(self, phase: str) -> Policy:
        """Another policy, with the weights that `phase` ended with, which is not to be trained."""
        other = replace(self, policy=start_policy(self.settings, self.sources))
        other.load(phase)
        other.policy.model.eval().requires_grad_(False)
        return other.policy


def open_run(settings: Settings) -> Run:
    """Opens pairs, model and folder. Raises SettingsError, OSError or ValueError with the remedy."""
    check_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    rewards, trackers = load_rewards(settings.reward.custom), Trackers(settings.track)
    sources = open_sources(settings)
    policy = start_policy(settings, sources)
    folder = RunFolder(settings.run_dir)
    folder.trackers = trackers
    trackers.start(settings, folder.path)
    folder.record_environment()
    return Run(settings, policy, sources, ImageCache(sources.train, settings.data.cache_mb << 20), folder, rewards)


def start_policy(settings: Settings, sources: Sources) -> Policy:
    """The model before any training: that of model.path, or the tiny one of the demo."""
    model = settings.model
    if model.path is not None:
        policy = Policy.load(model.path, dtype=getattr(torch, model.dtype), device=settings.device)
    else:
        policy = build_start_policy(settings, sources)
        policy.model.to(settings.device)
    if model.gradient_checkpointing:
        # Renamed in transformers 5.24, which warns of the old name. What transformers 4 does by default loses the
        # gradients of blocks whose input needs none.
        renamed = getattr(policy.model, "activation_checkpointing_enable", None)
        (renamed or policy.model.gradient_checkpointing_enable)({"use_reentrant": False})
    return policy


def check_device(device: str) -> None:
    """Raises SettingsError for a device that torch does not know or that this machine lacks."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device is {device!r}, which cannot be used here ({reason}): try device=cpu.") from error
