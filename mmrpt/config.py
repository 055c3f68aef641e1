"""The settings: one frozen dataclass per stage, read from YAML and dotted overrides, unknown keys refused.

`load_settings("run.yaml", ["rl.steps=50", "rollout.group_size=4"])` gives a checked `Settings`; `save_settings` writes
the resolved ones beside the run, and reading that file back gives the same `Settings`.
"""

from __future__ import annotations

import dataclasses
import os
import string
from collections.abc import Sequence
from dataclasses import field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from mmrpt.overrides import SettingsError, given_settings, merged
from mmrpt.world.tiny_vlm import TinyVLMConfig
from mmrpt.world.world import WorldConfig

CHAT_MARK = "<|"  # what Qwen's markers begin with
SIGHT_STEPS = 200  # that the tiny model gets by default
_STRICT = ConfigDict(extra="forbid", validate_default=False)


def check_device(device: str) -> None:
    """Raises SettingsError for a device that torch does not know or that this machine lacks."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device is {device!r}, which cannot be used here ({reason}): try device=cpu.") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_at_least(settings: Any, group: str, least: Literal[0, 1], *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value >= least, f"{group}{name} is {value}: expected {'at least 1' if least else '0 or more'}.")


@checked(frozen=True, config=_STRICT)
class DataSettings:
    """Where pairs come from. `pairs` None: the drawn world; else a path that `mmrpt.data.open_pairs` reads."""

    pairs: str | None = None
    size: int = 20_000  # pairs of the drawn world's training split; a reader brings its own size
    held_out: int = 200  # of a reader's pairs, the last so many are kept for evaluation

    def __post_init__(self) -> None:
        _require(self.size >= 1, f"data.size is {self.size}: expected at least 1 pair.")
        _require_at_least(self, "data.", 0, "held_out")


@checked(frozen=True, config=_STRICT)
class ModelSettings:
    """The policy. `path` None builds the tiny model of `tiny`; else a Hugging Face folder of the Qwen2-VL family."""

    path: str | None = None
    tiny: TinyVLMConfig = field(default_factory=TinyVLMConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False


@checked(frozen=True, config=_STRICT)
class PromptSettings:
    """What the user turn says, and the mark of what is hidden. `restore` may hold {masked_caption} and
    {masked_sentence}, the sentence of the mask alone: a small model that must first find the mask in a long caption
    spends its few steps on that instead of on the image."""

    describe: str = "describe"
    restore: str = "{masked_caption} restore: {masked_sentence}"
    mask: str = "<mask>"

    def __post_init__(self) -> None:
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(self.restore) if field is not None}
        except ValueError as error:
            raise ValueError(f"prompts.restore is {self.restore!r}: {error}; write {{{{ for a brace.") from error
        _require(
            "masked_caption" in fields,
            f"prompts.restore is {self.restore!r}: it must contain {{masked_caption}}, where the caption goes.",
        )
        _require(
            fields <= {"masked_caption", "masked_sentence"},
            f"prompts.restore is {self.restore!r}: it may hold {{masked_caption}} and {{masked_sentence}} alone.",
        )
        _require(bool(self.mask.strip()), "prompts.mask is empty: the model would not see what is missing.")
        for name in ("describe", "restore", "mask"):
            _require(
                CHAT_MARK not in getattr(self, name),
                f"prompts.{name} is {getattr(self, name)!r}: {CHAT_MARK!r} begins the chat's own markers, of which a "
                "prompt gets exactly one image; write it without.",
            )


@checked(frozen=True, config=_STRICT)
class OptimiserSettings:
    """AdamW, or Muon for the decoder's matrices; linear warm-up, then a cosine to `final_fraction` of the peak."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    muon_scale: float = 6.0  # learning rate of Muon's matrices over `lr`
    vision_scale: float = 1.0  # learning rate of the vision tower over `lr`
    vision_start: int = 0  # the tower is frozen before this step
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    warmup_steps: int = 20
    final_fraction: float = 1.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"lr is {self.lr}: expected a positive number.")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}: expected 0 to below 1.")
        _require_at_least(self, "", 0, "muon_scale", "vision_scale", "vision_start", "weight_decay", "warmup_steps")
        _require(self.max_grad_norm > 0, f"max_grad_norm is {self.max_grad_norm}: expected a positive number.")
        _require(0 <= self.final_fraction <= 1, f"final_fraction is {self.final_fraction}: expected 0 to 1.")


@checked(frozen=True, config=_STRICT)
class SightSettings:
    """The vision tower's own training, before the warm-up. `steps` None: 200 for the tiny model, none for one that is
    given, whose tower can see."""

    steps: int | None = None
    batch_size: int = 32
    optimiser: OptimiserSettings = field(default_factory=lambda: OptimiserSettings(lr=3e-3, final_fraction=0.05))

    def __post_init__(self) -> None:
        _require(self.steps is None or self.steps >= 0, f"sight.steps is {self.steps}: expected 0 or more, or null.")
        _require_at_least(self, "sight.", 1, "batch_size")


@checked(frozen=True, config=_STRICT)
class WarmupSettings:
    """Supervised warm-up on captions, with a share of restored words in the answer format so that it is known.

    The first `sentence_steps` of the `steps` see single sentences, of the world's one-card scenes where it is the
    source: what a vision encoder's own pre-training gives a larger model. Set it to 0 for a model that can see.
    """

    steps: int = 500
    batch_size: int = 16
    sentence_steps: int = 140
    sentence_batch_size: int = 32
    restore_fraction: float = 0.7  # rows that restore random words, any words, instead of describing
    optimiser: OptimiserSettings = field(
        default_factory=lambda: OptimiserSettings(kind="muon", vision_scale=0.5, vision_start=30, final_fraction=0.2)
    )

    def __post_init__(self) -> None:
        _require_at_least(self, "warmup.", 0, "steps", "sentence_steps")
        _require_at_least(self, "warmup.", 1, "batch_size", "sentence_batch_size")
        _require(
            0 <= self.restore_fraction < 1,
            f"warmup.restore_fraction is {self.restore_fraction}: expected at least 0 and below 1.",
        )


@checked(frozen=True, config=_STRICT)
class MaskingSettings:
    """Which sentences lean on the image, and which of their words are hidden (MMRPT, steps 1 to 3)."""

    pairs: int = 1_500  # captions scored
    first_layer: float = 0.5  # the recorded layers L, as fractions of the depth: the upper middle
    last_layer: float = 1.0
    align: Literal["predicting", "token"] = "predicting"  # the row that predicts a token, or the token's own row
    baseline: Literal["position", "none"] = "position"  # subtract the corpus mean at a token's place, or nothing
    threshold: Literal["otsu", "quantile", "mean_std"] = "otsu"
    quantile: float = 0.5
    std_factor: float = 0.5
    spans_per_caption: int = 2
    max_span_words: int = 2
    balance: bool = True  # hide each word class (colour, number, side, relation, other) about as often
    batch_size: int = 64

    def __post_init__(self) -> None:
        _require_at_least(self, "masking.", 1, "pairs", "batch_size", "spans_per_caption", "max_span_words")
        _require(
            0 <= self.first_layer < self.last_layer <= 1,
            f"masking layers run from {self.first_layer} to {self.last_layer}: expected 0 <= first < last <= 1.",
        )
        _require(0 < self.quantile < 1, f"masking.quantile is {self.quantile}: expected between 0 and 1.")


@checked(frozen=True, config=_STRICT)
class RolloutSettings:
    prompts: int = 16  # masked captions sampled in a round
    group_size: int = 8
    max_new_tokens: int = 28
    temperature: float = 1.0
    top_p: float = 0.98

    def __post_init__(self) -> None:
        _require_at_least(self, "rollout.", 1, "prompts", "max_new_tokens")
        _require(
            self.group_size >= 2,
            f"rollout.group_size is {self.group_size}: a group of one has no relative advantage; use 2 or more.",
        )
        _require(self.temperature > 0, f"rollout.temperature is {self.temperature}: expected above 0.")
        _require(0 < self.top_p <= 1, f"rollout.top_p is {self.top_p}: expected above 0 and at most 1.")


@checked(frozen=True, config=_STRICT)
class RewardSettings:
    """Weights of the reward's terms; 0 leaves a term out."""

    format: float = 0.1
    exact: float = 1.0
    prefix: float = 0.1
    semantic: float = 0.2

    def __post_init__(self) -> None:
        _require(self.exact + self.prefix + self.semantic > 0, "reward: no term rewards the answer; raise exact.")


@checked(frozen=True, config=_STRICT)
class PerceptionSettings:
    """VPPO's token perception, advantage shaping and token filter."""

    enabled: bool = True
    kind: Literal["kl", "k3", "js"] = "kl"
    patch_size: int = 14
    probability: float = 0.5
    keep_ratio: float = 0.4
    min_weight: float = 0.9

    def __post_init__(self) -> None:
        _require(
            0 < self.keep_ratio <= 1,
            f"perception.keep_ratio is {self.keep_ratio}: expected above 0 and at most 1 (1 keeps every token).",
        )
        _require(0 < self.probability <= 1, f"perception.probability is {self.probability}: expected 0 to 1.")
        _require(0 <= self.min_weight <= 1, f"perception.min_weight is {self.min_weight}: expected 0 to 1.")
        _require(self.patch_size >= 1, f"perception.patch_size is {self.patch_size}: expected at least 1 pixel.")


@checked(frozen=True, config=_STRICT)
class RLSettings:
    """Group-relative reinforcement with the perception-filtered clipped loss."""

    steps: int = 170
    groups_per_step: int = 12  # groups with signal that one optimiser step consumes
    max_rounds: int = 4  # sampling rounds spent on filling a step before it goes on with fewer groups
    micro_batch: int = 128
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    entropy_coef: float = 0.0
    entropy_scope: Literal["response", "kept"] = "kept"
    aggregation: Literal["token_mean", "sequence_mean", "sum"] = "token_mean"
    # Weight of the supervised loss on the control's own batches in each step; 0 leaves them out. It keeps what no
    # reward asks for (InstructGPT's pre-training mix, arXiv 2203.02155), and the control lacks rewards alone.
    caption_weight: float = 0.3
    # Log entropy, ratios and the sampler's gap of all response tokens in every so many steps: those of tokens without a
    # gradient cost a forward product over the vocabulary.
    statistics_every: int = 5
    optimiser: OptimiserSettings = field(
        default_factory=lambda: OptimiserSettings(lr=6e-4, warmup_steps=5, final_fraction=0.1)
    )

    def __post_init__(self) -> None:
        _require_at_least(self, "rl.", 0, "steps", "caption_weight")
        _require_at_least(self, "rl.", 1, "groups_per_step", "max_rounds", "micro_batch", "statistics_every")
        _require(0 < self.clip_low < 1, f"rl.clip_low is {self.clip_low}: expected between 0 and 1.")
        _require(self.clip_high > 0, f"rl.clip_high is {self.clip_high}: expected above 0.")
        _require(
            self.dual_clip is None or self.dual_clip > 1,
            f"rl.dual_clip is {self.dual_clip}: expected above 1, or null.",
        )


@checked(frozen=True, config=_STRICT)
class ControlSettings:
    """The comparison: the warm start trained on for as many optimiser steps on captions it has not seen.

    It has reinforcement's optimiser and the very batches that reinforcement mixes in, and lacks rewards alone. Of its
    rows, `restore_fraction` restore random words: with 0, captions alone, a model this small forgets the answer's form
    within those steps, and reinforcement would win against nothing.
    """

    enabled: bool = True
    batch_size: int = 16
    restore_fraction: float = 0.7

    def __post_init__(self) -> None:
        _require_at_least(self, "control.", 1, "batch_size")
        _require(0 <= self.restore_fraction <= 1, "control.restore_fraction: expected 0 to 1.")


@checked(frozen=True, config=_STRICT)
class EvaluationSettings:
    samples: int = 150  # masked captions of each held-out set
    batch_size: int = 96

    def __post_init__(self) -> None:
        _require(self.samples >= 2, f"evaluation.samples is {self.samples}: expected at least 2, to swap their images.")
        _require_at_least(self, "evaluation.", 1, "batch_size")


def demo_world() -> WorldConfig:
    """The drawn world as a laptop meets it: shorter captions, fewer cards, objects as unequal as words are."""
    return WorldConfig(object_zipf=1.0, card_weights=(0.35, 0.3, 0.2, 0.15), sentence_weights=(0.5, 0.3, 0.15, 0.05))


@checked(frozen=True, config=_STRICT)
class Settings:
    name: str = "demo"
    output: str = "runs"
    seed: int = 0
    threads: int | None = None  # None: every core
    device: str = "cpu"
    checkpoint_every: int = 50
    data: DataSettings = field(default_factory=DataSettings)
    world: WorldConfig = field(default_factory=demo_world)
    model: ModelSettings = field(default_factory=ModelSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    sight: SightSettings = field(default_factory=SightSettings)
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    perception: PerceptionSettings = field(default_factory=PerceptionSettings)
    rl: RLSettings = field(default_factory=RLSettings)
    control: ControlSettings = field(default_factory=ControlSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        _require(
            bool(self.name.strip(".")) and Path(self.name).name == self.name,  # "..": not a folder of its own
            f"name is {self.name!r}: it names a folder inside output; use letters, digits, '-' and '_'.",
        )
        _require_at_least(self, "", 1, "checkpoint_every")
        _require(self.threads is None or self.threads >= 1, f"threads is {self.threads}: expected at least 1.")

    @property
    def sight_steps(self) -> int:
        """Steps of the vision tower's own training."""
        if self.sight.steps is not None:
            return self.sight.steps
        return SIGHT_STEPS if self.model.path is None else 0

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / self.name


def load_settings(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Defaults, then the YAML file, then `a.b.c=value` overrides (values are read as YAML). Raises SettingsError.

    Each changes what it names and nothing beside it; a list such as `world.card_weights` is given whole.
    """
    given = given_settings(file, overrides)
    try:
        return TypeAdapter(Settings).validate_python(merged(dataclasses.asdict(Settings()), given))
    except ValidationError as error:
        raise SettingsError(_explain(error, given)) from error


def save_settings(settings: Settings, file: str | Path) -> None:
    """Writes the resolved settings as YAML, under a temporary name first."""
    file = Path(file)
    part = file.with_name(file.name + ".tmp")
    part.write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    os.replace(part, file)


def _explain(error: ValidationError, given: dict[str, Any]) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "unexpected_keyword_argument":
            lines.append(f"unknown setting {where!r}: check its spelling against `python -m mmrpt.train --show`.")
            continue
        got = item["input"]
        if isinstance(got, dict):  # of a group, what was given: its defaults are not at fault
            got = reduce(lambda tree, name: tree.get(name, {}), item["loc"], given)
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {message} (got {got!r})" if where else message)
    return "bad settings:\n  " + "\n  ".join(lines)
