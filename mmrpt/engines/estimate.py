"""How much device memory each phase of a run needs: the phases' own functions on a policy of shapes (`mmrpt.memory`).

Assumed are images of the largest size that the settings allow, prompts of `TEXT` tokens besides, and answers as long as
they may be. Of many forward passes alike one is run, with the gradients of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from mmrpt.batching import micro_batches, split_rows
from mmrpt.engines.rl_step import train_on_groups
from mmrpt.engines.run import prepare_policy
from mmrpt.masking.forward import PolicyModel, Prompt
from mmrpt.masking.score import layer_indices
from mmrpt.memory import GRADIENTS, OPTIMISER, VISION, Ledger, check_served, measured, shape_of, shape_policy
from mmrpt.objective import response_logps, supervised_loss
from mmrpt.optimiser import Optimiser
from mmrpt.perception import score_tokens
from mmrpt.policy import QwenVLPolicy
from mmrpt.rollout.collect import hidden_fits, needs_perturbed_view
from mmrpt.rollout.generate import generate
from mmrpt.settings import TIMED_CONTROLS, OptimiserSettings, Settings
from mmrpt.types import Batch, Group, PixelBatch

TEXT, DEMO_TEXT = 256, 64  # tokens of a prompt besides its image's, and of a caption
MAX_PIXELS = 1_003_520  # of an image where model.max_pixels is null: pictures of the web are rarely larger
REFERENCE, HIDDEN, IMAGES = "reference model", "kept hidden states", "images of a round"
# Phases of the RL optimiser.
TRAINED = ("update", "update: optimiser", "validation", "control", "control: optimiser")
DECODED = 4  # tokens of an answer that are decoded; each of the rest adds what the third did


@dataclass
class Estimate:
    """Bytes by phase and part, each at the moment when the phase needs most."""

    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    parameters: int = 0
    trained: int = 0

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.phases[self.largest].values())


@dataclass(frozen=True)
class Work:
    """What the phases work on: a policy, rows of the assumed lengths, and the settings."""

    policy: QwenVLPolicy
    settings: Settings
    image: Image.Image
    text: int  # tokens of a prompt besides its image's, and of a caption

    @cached_property
    def prompt(self) -> list[int]:
        tokens = int(self.policy.pixels([self.image]).tokens_per_image(self.policy.merge_size))
        return [0] * (self.text // 2) + [self.policy.image_token_id] * tokens + [0] * (self.text - self.text // 2)

    def pixels(self, count: int) -> PixelBatch:
        return self.policy.pixels([self.image] * count)

    def answers(self) -> tuple[list[list[int]], list[list[list[int]]], bool]:
        """Prompts and the answers to each of the first forward pass of a step, and whether others follow it."""
        settings, prompt = self.settings, self.prompt
        groups = [[settings.rollout.max_new_tokens] * settings.rollout.group_size] * settings.rl.groups_per_step
        width, most = self.policy.head_weight.shape[1], settings.model.batch_tokens
        first, *others = micro_batches([len(prompt)] * len(groups), groups, most, width)
        lengths = [groups[i][part] for i, part in zip(first.prompts, first.responses, strict=True)]
        return [prompt] * len(lengths), [[[0] * n for n in own] for own in lengths], bool(others)

    def captions(self) -> Batch:
        """A batch of the warm-up."""
        count = self.settings.warmup.batch_size
        return self.policy.batch([self.prompt] * count, [[0] * self.text] * count, self.pixels(count), range(count))


def update(work: Work, optimiser: Optimiser, between: Callable[[], None] = lambda: None) -> None:
    """One forward pass of a reinforcement step, its backward pass and the optimiser's step; `between` comes before."""
    prompts, answers, _ = work.answers()
    groups = []
    for number, (prompt, responses) in enumerate(zip(prompts, answers, strict=True)):
        logps, perception, ref_logps, trainer_logps = torch.zeros(4, len(responses), len(responses[0]))
        scores = torch.zeros(len(responses)), torch.ones(len(responses))
        fields = logps, perception, *scores, ref_logps, trainer_logps
        groups.append(Group(str(number), str(number), prompt, responses, *fields))

    def step(step: int, steps: int) -> Mapping[str, float | bool]:
        between()
        return optimiser.step(step, steps)

    images = SimpleNamespace(many=lambda names: dict.fromkeys(names, work.image))
    batch = work.captions() if work.settings.rl.caption_weight else None
    train_on_groups(work.policy, SimpleNamespace(step=step), groups, images, work.settings, 0, batch)


def captions(work: Work, optimiser: Optimiser, between: Callable[[], None] = lambda: None) -> None:
    """One forward pass of a step on captions, its backward pass and the optimiser's step; `between` comes before."""
    batch = work.captions()
    parts = split_rows(batch, work.settings.model.batch_tokens)
    supervised_loss(work.policy, parts[0]).backward()
    del batch, parts
    between()
    optimiser.step(0, 1)


def sample(work: Work, pixels: PixelBatch, prompts: int, group_size: int, tokens: int, temperature: float) -> None:
    """Answers of `tokens` tokens to the first prompts, each with an image of its own among all of the round's."""
    shown = [work.prompt] * prompts, pixels, range(prompts)
    options = {"temperature": temperature, "top_p": work.settings.rollout.top_p}
    generate(work.policy, *shown, group_size=group_size, max_new_tokens=tokens, keep_hidden=False, **options)


def perceive(work: Work, kept: Tensor | None) -> None:
    """The forward pass that scores the tokens of the answers; `kept` are the hidden states of all, if they were."""
    settings, policy = work.settings, work.policy
    prompts, answers, _ = work.answers()
    temperature, options = settings.rollout.temperature, settings.perception
    pixels = work.pixels(len(prompts))
    for part, batch in policy.group_batches(prompts, answers, pixels.select, settings.model.batch_tokens):
        if settings.rl.kl_coef or settings.rl.max_importance is not None:
            response_logps(policy, batch, temperature=temperature)
        if needs_perturbed_view(settings):
            hidden = None if kept is None else kept[list(range(part.rows.stop))]
            score_tokens(policy, batch, hidden, part.prompts, options, temperature)


def score(work: Work) -> None:
    """A batch of captions with the attention of their tokens."""
    model, options = PolicyModel(work.policy), work.settings.masking
    row = len(work.prompt) + work.text
    count = max(1, options.batch_tokens // row)
    prompts = [Prompt(work.prompt, work.pixels(1))] * count
    with torch.no_grad(), work.policy.autocast():
        model.forward(prompts, [[0] * work.text] * count, layer_indices(options.layers, model.depth))


def estimate(
    settings: Settings, config: PretrainedConfig, device_type: str, *, only: str | None = None, text: int | None = None
) -> Estimate:
    """The memory that a run with these settings needs of a device of that type, for a model of this config.

    only: the one phase to look at. text: tokens of a prompt besides its image's; None: of the demo's or a model's.
    Raises ValueError for families and settings that it cannot tell of.
    """
    check_served(config)
    if settings.perception.enabled and settings.perception.kind == "mass":  # recording it takes values
        raise ValueError("memory is not known of perception.kind=mass: ask with kl, a pass as long and a second view.")
    image, dtype = largest_image(settings, config.vision_config), getattr(torch, settings.model.dtype)
    policy = shape_policy(config, dtype, max(image.size), lambda policy: prepare_policy(policy, settings))
    policy.model.train()
    work = Work(policy, settings, image, text or (DEMO_TEXT if settings.model.path is None else TEXT))
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    found = Estimate({}, sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns))
    with measured(policy, device_type, quantized=settings.model.lora.quantized) as ledger:
        _Phases(work, ledger, found.phases, device_type, only).run()
    return found


def largest_pixels(settings: Settings) -> int:
    """Pixels of an image, at most."""
    if settings.model.path is None:
        return min(settings.demo.world.image_size**2, settings.demo.tiny.max_pixels)
    return settings.model.max_pixels or MAX_PIXELS


def largest_image(settings: Settings, vision: PretrainedConfig) -> Image.Image:
    """A square image of about as many."""
    unit = vision.spatial_merge_size * vision.patch_size
    side = max(1, math.isqrt(largest_pixels(settings)) // unit) * unit
    return Image.new("RGB", (side, side))


class _Phases:
    """Runs the phases one after another, holding what a run holds meanwhile."""

    def __init__(
        self, work: Work, ledger: Ledger, found: dict[str, dict[str, int]], device_type: str, only: str | None
    ) -> None:
        self.work, self.ledger, self.found, self.device_type, self.only = work, ledger, found, device_type, only

    def wanted(self, *names: str) -> bool:
        return self.only is None or self.only in names

    def run(self) -> None:
        settings = self.work.settings
        if settings.rl.steps and self.wanted("scoring"):
            self.measure("scoring", score, self.work)
        if settings.warmup.steps and self.wanted("warm-up", "warm-up: optimiser"):
            self.train("warm-up", captions, self.optimiser(settings.warmup.optimiser), many=self.many_captions())
        if settings.rl.steps and self.wanted("sampling", "perception", *TRAINED):
            self.reinforce()
        if self.wanted("evaluation"):
            self.ask("evaluation", settings.evaluation.samples)

    def reinforce(self) -> None:
        settings, policy = self.work.settings, self.work.policy
        rollout, optimiser = settings.rollout, self.optimiser(settings.rl.optimiser)
        copied = [p for p in policy.model.parameters() if p.requires_grad or not settings.model.lora.rank]
        reference = [shape_of(p) for p in copied] if settings.rl.kl_coef else []
        self.ledger.hold(reference, REFERENCE)
        kept = None
        if needs_perturbed_view(settings) and hidden_fits(policy, rollout):
            shape = rollout.prompts * rollout.group_size, rollout.max_new_tokens, policy.head_weight.shape[1]
            kept = shape_of(policy.head_weight.new_empty(shape, device="meta"))
            self.ledger.hold([kept], HIDDEN)
        pixels = self.images(rollout.prompts)
        if self.wanted("sampling"):
            at_once = rollout.prompts
            if rollout.batch_size is not None:
                at_once = min(at_once, max(1, rollout.batch_size // rollout.group_size))
            self.sample("sampling", pixels, at_once, rollout.group_size, rollout.temperature)
        if self.wanted("perception"):
            chosen = self.images(rollout.prompts)  # a copy of those whose group has a signal, all at most
            self.measure("perception", perceive, self.work, kept)
            del chosen
        del kept, pixels
        if self.wanted("update", "update: optimiser"):
            self.train("update", update, optimiser, many=self.work.answers()[2])
        if settings.evaluation.every and self.wanted("validation"):
            self.ask("validation", settings.data.validation)
        del reference
        # Rows of masked samples are shorter than captions; a control by reinforcement needs what RL does.
        supervised = {"control", *TIMED_CONTROLS} & {*settings.control.phases}
        if supervised and self.wanted("control", "control: optimiser"):
            self.train("control", captions, optimiser, many=self.many_captions())

    def images(self, count: int) -> PixelBatch:
        pixels = self.work.pixels(count)
        # They stay on the CPU until a pass takes its own.
        self.ledger.hold([pixels.pixel_values], IMAGES, share=1.0 if self.device_type == "cpu" else 0.0)
        return pixels

    def many_captions(self) -> bool:
        return len(split_rows(self.work.captions(), self.work.settings.model.batch_tokens)) > 1

    def measure(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        self.ledger.part = VISION
        self.ledger.restart()
        function(*arguments)
        self.found[name] = self.ledger.peak

    def train(self, name: str, function: Callable[..., None], optimiser: Optimiser, *, many: bool) -> None:
        """A step of training, whose gradients are there already where it takes `many` forward passes."""
        if many:
            self.fill_gradients()

        def between() -> None:
            self.found[name] = self.ledger.peak
            self.ledger.part = OPTIMISER
            self.ledger.restart()

        self.ledger.part = VISION
        self.ledger.restart()
        function(self.work, optimiser, between)
        self.found[f"{name}: optimiser"] = self.ledger.peak

    def optimiser(self, settings: OptimiserSettings) -> Optimiser:
        """An optimiser that has made a step, so that its states are there."""
        optimiser = Optimiser(self.work.policy.model, settings)
        if self.device_type == "cuda":
            for part in optimiser.parts:
                for group in part.param_groups:
                    if "fused" in group:
                        group.update(fused=True, foreach=False)
        self.ledger.part = OPTIMISER
        self.fill_gradients()
        optimiser.step(0, 1)
        return optimiser

    def ask(self, name: str, questions: int) -> None:
        """A batch of that many questions, or as many as are asked at once."""
        count = min(self.work.settings.evaluation.batch_size, questions)
        self.sample(name, self.images(count), count, 1, 0.0)

    def fill_gradients(self) -> None:
        for parameter in self.work.policy.model.parameters():
            if parameter.requires_grad:
                parameter.grad = shape_of(parameter)
                self.ledger.hold([parameter.grad], GRADIENTS)

    def sample(self, name: str, pixels: PixelBatch, prompts: int, group_size: int, temperature: float) -> None:
        """A few tokens are decoded; what each adds is added for those that an answer may have besides."""
        tokens, windows = self.work.settings.rollout.max_new_tokens, []

        def next_window(*_: Any) -> None:
            windows.append(self.ledger.peak)
            self.ledger.restart()

        hook = self.work.policy.text_model.register_forward_pre_hook(next_window)
        self.measure(name, sample, self.work, pixels, prompts, group_size, min(tokens, DECODED), temperature)
        hook.remove()
        windows.append(self.ledger.peak)
        if tokens > DECODED:  # windows: images, prompts, then one a token
            first, second = windows[2:4]
            windows.append({part: first[part] + (tokens - 2) * (second[part] - first[part]) for part in second})
        self.found[name] = max(windows, key=lambda parts: sum(parts.values()))
