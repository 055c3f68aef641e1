"""The method's settings: one frozen dataclass a stage of the pipeline. Each field says what it is; checks that need
more than one field follow in `__post_init__`."""

from __future__ import annotations

import math
import string
from dataclasses import field
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mmrpt.settings.base import STRICT, require

Signal = Literal["mass", "text_mass", "kl", "truth"]  # of masking.signal
CHAT_MARK = "<|"  # what Qwen's markers begin with


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """The image-caption pairs, and which of them are refused."""

    pairs: str | None = Field(None, description="file or folder of image-caption pairs; null: those of demo.world")
    root: str | None = Field(
        None, description="folder that image paths start from and must lie inside; null: the folder of the pairs' file"
    )
    held_out: int = Field(200, ge=0, description="pairs kept for evaluation, drawn by image")
    validation: int = Field(
        100, ge=2, description="pairs kept for validation during RL, drawn by image; none where evaluation.every is 0"
    )
    max_megapixels: float = Field(50.0, gt=0, description="images of more million pixels are rejected")
    max_aspect_ratio: float = Field(100.0, ge=1, description="images with a larger ratio of their sides are rejected")
    max_caption_chars: int = Field(8000, ge=1, description="captions of more characters are rejected")
    max_rejected: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of rejected rows, of those visited, above which a run is refused",
    )
    cache_mb: int = Field(256, ge=0, description="megabytes of decoded images kept in memory")
    workers: int = Field(2, ge=0, description="threads that load images ahead of their use; 0: none")


@dataclass(frozen=True, config=STRICT)
class PromptSettings:
    """What the user turn says, and the mark of what is hidden."""

    describe: str = Field("describe", description="instruction that asks for a caption")
    # Repeating the masked sentence saves a small model from searching the caption for the mask.
    restore: str = Field(
        "{masked_caption} restore: {masked_sentence}",
        description="question about a masked caption; may hold {masked_sentence}, the one sentence with the mask",
    )
    mask: str = Field("<mask>", description="text that stands for the hidden words")

    def __post_init__(self) -> None:
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(self.restore) if field is not None}
        except ValueError as error:
            raise ValueError(f"prompts.restore is {self.restore!r}: {error}; write {{{{ for a brace.") from error
        require(
            "masked_caption" in fields,
            f"prompts.restore is {self.restore!r}: it must contain {{masked_caption}}, where the caption goes.",
        )
        require(
            fields <= {"masked_caption", "masked_sentence"},
            f"prompts.restore is {self.restore!r}: it may hold {{masked_caption}} and {{masked_sentence}} alone.",
        )
        require(bool(self.mask.strip()), "prompts.mask is empty: the model would not see what is missing.")
        for name in ("describe", "restore", "mask"):
            require(
                CHAT_MARK not in getattr(self, name),
                f"prompts.{name} is {getattr(self, name)!r}: {CHAT_MARK!r} begins the chat's own markers, of which a "
                "prompt gets exactly one image; write it without.",
            )


@dataclass(frozen=True, config=STRICT)
class OptimiserSettings:
    """AdamW, or Muon for the decoder's matrices; linear warm-up, then a cosine."""

    kind: Literal["adamw", "muon"] = Field("adamw", description="adamw, or muon for the decoder's matrices")
    lr: float = Field(1e-3, gt=0, description="peak learning rate; Muon's matrices take 6 times as much")
    vision_scale: float = Field(1.0, ge=0, description="learning rate of the vision tower over lr; 0: it is frozen")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of matrices; norms and biases have none")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW's decay of squared gradients; beta1 is 0.9")
    warmup_steps: int = Field(20, ge=0, description="steps over which the learning rate rises to lr")
    final_fraction: float = Field(1.0, ge=0, le=1, description="learning rate of the last step over lr; 1: no decay")
    max_grad_norm: float = Field(1.0, gt=0, description="norm to which larger gradients are clipped")


@dataclass(frozen=True, config=STRICT)
class WarmupSettings:
    """Supervised training before RL: captions, and hidden words to restore in the format of an answer."""

    steps: int = Field(420, ge=0, description="optimiser steps of the warm-up")
    batch_size: int = Field(16, ge=1, description="rows in a step, also in those of supervised controls")
    restore_fraction: float = Field(
        0.7,
        ge=0,
        lt=1,
        description="share of rows that restore hidden words, of each class as often, instead of describing the image",
    )
    optimiser: OptimiserSettings = field(
        default_factory=lambda: OptimiserSettings(kind="muon", vision_scale=0.5, final_fraction=0.2)
    )


@dataclass(frozen=True, config=STRICT)
class MaskingSettings:
    """Which sentences depend on the image, and which of their words are hidden (MMRPT, steps 1 to 3)."""

    captions: int | None = Field(
        None, ge=1, description="captions scored; null: 1,500 of the demo's world, all of given pairs"
    )
    signal: Signal = Field(
        "mass",
        description="what scores a token: attention on the image (mass) or the text (text_mass), KL of the predictions "
        "with the image and blanked (kl), or, of drawn pairs, the truth",
    )
    layers: tuple[int | float, ...] = Field(
        (0.5, 1.0),
        description="layers whose attention counts: from one fraction of the depth to another, or a list of indices",
    )
    attention_row: Literal["before", "own"] = Field(
        "before", description="attention of the position before a token, which predicts it, or of the token itself"
    )
    baseline: Literal["position", "none"] = Field(
        "position", description="subtract the mean score of a token's place in its caption, or nothing"
    )
    threshold: str = Field(
        "otsu", description="score that selects a sentence: otsu, quantile:Q, mean_std:K or caption_std:K (per caption)"
    )
    spans_per_caption: int = Field(2, ge=1, description="most masked samples of a caption")
    max_span_words: int = Field(2, ge=1, description="most words of a hidden span")
    balance_word_classes: bool = Field(
        True, description="hide colours, numbers, sides, relations and other words about as often"
    )
    batch_tokens: int = Field(16_384, ge=1, description="tokens that are scored at once, padding included")
    drop_repeated: bool = Field(True, description="drop answers that stand elsewhere in their caption")
    max_blind: float | None = Field(
        None,
        ge=0,
        le=1,
        description="drop answers that are more probable than this with the image blanked; null: none",
    )

    def __post_init__(self) -> None:
        expected = "expected two fractions with 0 <= first < last <= 1, as [0.5, 1.0], or indices, as [14, 15, 16]."
        require(good_layers(self.layers), f"masking.layers is {list(self.layers)}: {expected}")
        threshold_rule(self.threshold)


def good_layers(layers: tuple[int | float, ...]) -> bool:
    if layers and all(isinstance(layer, int) for layer in layers):
        return min(layers) >= 0 and len(set(layers)) == len(layers)
    return len(layers) == 2 and 0 <= layers[0] < layers[1] <= 1


def threshold_rule(text: str) -> tuple[Literal["otsu", "quantile", "mean_std", "caption_std"], float]:
    """("quantile", 0.5) of "quantile:0.5"; the number of "otsu" is 0. Raises ValueError for anything else."""
    name, _, number = text.partition(":")
    if text == "otsu":
        return "otsu", 0.0
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    in_range = 0 < value < 1 if name == "quantile" else math.isfinite(value)
    if name in ("quantile", "mean_std", "caption_std") and in_range:
        return name, value
    raise ValueError(
        f"masking.threshold is {text!r}: expected otsu, quantile:Q with 0 < Q < 1, mean_std:K or caption_std:K, for "
        "example quantile:0.5."
    )


@dataclass(frozen=True, config=STRICT)
class RolloutSettings:
    """Sampling of answers to masked captions."""

    prompts: int = Field(16, ge=1, description="masked captions sampled in a round")
    group_size: int = Field(8, ge=1, description="answers sampled for each masked caption")
    max_new_tokens: int = Field(28, ge=1, description="most tokens of an answer")
    temperature: float = Field(1.0, gt=0, description="divides the logits before sampling; 0.5 sharpens, 2 flattens")
    top_p: float = Field(0.98, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    batch_size: int | None = Field(
        None, ge=1, description="most answers sampled at once, whole groups, at least one; null: the whole round"
    )
    keep_hidden_mb: int = Field(
        1024, ge=0, description="keep a round's hidden states for perception if at most as many MB, else recompute"
    )

    def __post_init__(self) -> None:
        require(
            self.group_size >= 2,
            f"rollout.group_size is {self.group_size}: a group of one has no relative advantage; use 2 or more.",
        )


@dataclass(frozen=True, config=STRICT)
class PerceptionSettings:
    """How much each token depends on the image, and what follows for its gradient (VPPO)."""

    enabled: bool = Field(True, description="weight and filter tokens by their dependence on the image")
    kind: Literal["kl", "k3", "js", "mass"] = Field(
        "kl", description="divergence between the views with and without patches, or attention on the image (mass)"
    )
    patch_size: int = Field(14, ge=1, description="side of a blackened square in pixels of the resized image")
    probability: float = Field(0.5, gt=0, le=1, description="probability that a square is blackened")
    keep_ratio: float = Field(0.4, gt=0, le=1, description="share of tokens that keep their gradient; 1: all")
    min_weight: float = Field(0.9, ge=0, le=1, description="advantage factor of the response least about the image")
    max_weight: float | None = Field(
        None, description="advantage factor of the response most about the image; null: the mean factor is 1"
    )

    def __post_init__(self) -> None:
        require(
            self.max_weight is None or self.max_weight >= self.min_weight,
            f"perception.max_weight is {self.max_weight}: expected at least min_weight, {self.min_weight}, or null.",
        )


@dataclass(frozen=True, config=STRICT)
class RLSettings:
    """Group-relative RL with the perception-filtered clipped loss."""

    steps: int = Field(170, ge=0, description="optimiser steps of RL, and of each control that does not go by seconds")
    groups_per_step: int = Field(12, ge=1, description="groups of answers in an optimiser step")
    max_rounds: int = Field(4, ge=1, description="most sampling rounds before a step goes on with fewer groups")
    advantage: Literal["grpo", "dr_grpo"] = Field(
        "grpo", description="reward minus the group's mean, divided by its standard deviation (grpo) or not"
    )
    min_accuracy: float = Field(0.01, ge=0, le=1, description="groups with a lower share of right answers are dropped")
    max_accuracy: float = Field(0.99, ge=0, le=1, description="groups with a higher share of right answers are dropped")
    loss: Literal["clip", "gspo", "cispo"] = Field(
        "clip", description="clipped ratio per token (clip) or response (gspo), or clipped weight (cispo)"
    )
    clip_low: float = Field(0.2, gt=0, le=1, description="ratios below 1 minus this are clipped; 1: none")
    clip_high: float = Field(0.28, gt=0, description="ratios above 1 plus this are clipped")
    dual_clip: float | None = Field(
        3.0, gt=1, description="loss of a negative advantage is at most this many times its size; null: no bound"
    )
    entropy_coef: float = Field(
        0.0,
        description="above 0 rewards entropy, below 0 penalises it (VPPO: -0.06 with entropy_kind=sampled); 0: none",
    )
    entropy_kind: Literal["exact", "sampled"] = Field(
        "exact", description="of tokens with a gradient, over the vocabulary, or -log-prob of all tokens (sampled)"
    )
    kl_coef: float = Field(
        0.0, ge=0, description="weight of the divergence from the warm start, of which a copy is kept; 0: none"
    )
    max_importance: float | None = Field(
        None, ge=1, description="cap of the weights that correct for the sampler's probabilities; null: no correction"
    )
    aggregation: Literal["token_mean", "sequence_mean", "sum"] = Field(
        "token_mean", description="mean over tokens, mean over responses of their token means, or sum"
    )
    # InstructGPT's pre-training mix (arXiv 2203.02155).
    caption_weight: float = Field(
        0.3, ge=0, description="weight of caption training in each step, against forgetting how to describe; 0: none"
    )
    statistics_every: int = Field(
        5, ge=1, description="steps between those that log entropy and ratios of all tokens, which costs time"
    )
    optimiser: OptimiserSettings = field(
        default_factory=lambda: OptimiserSettings(lr=6e-4, warmup_steps=5, final_fraction=0.1)
    )

    def __post_init__(self) -> None:
        require(
            self.min_accuracy < self.max_accuracy,
            f"rl.min_accuracy is {self.min_accuracy}: expected below rl.max_accuracy, {self.max_accuracy}.",
        )
        require(
            self.advantage != "dr_grpo" or self.aggregation == "token_mean",
            f"rl.aggregation is {self.aggregation}, but rl.advantage=dr_grpo divides by responses times "
            "rollout.max_new_tokens: leave rl.aggregation at token_mean.",
        )
        require(
            self.loss != "cispo" or self.dual_clip is None,
            f"rl.dual_clip is {self.dual_clip}, which rl.loss=cispo has no place for: set rl.dual_clip=null.",
        )


# Kinds of control in the order they are trained, each with the name of its phase.
CONTROL_PHASES = {
    "captions": "control",
    "captions_seconds": "captions_seconds",
    "supervised_masks": "supervised_masks",
    "rl_blanked": "rl_blanked",
    "rl_random_masks": "rl_random_masks",
    "grpo": "grpo",
}
TIMED_CONTROLS = ("captions_seconds", "supervised_masks")  # phases that end by RL's seconds, the others by its steps


@dataclass(frozen=True, config=STRICT)
class ControlSettings:
    """What RL is compared with: the warm start trained in other ways, each with RL's optimiser.

    Captions come in the warm-up's batch size and share of restored words, in the batches that RL mixes in. With
    captions alone a model this small forgets the format of an answer, and RL would win against nothing.
    """

    kinds: tuple[
        Literal["captions", "captions_seconds", "supervised_masks", "rl_blanked", "rl_random_masks", "grpo"], ...
    ] = Field(
        ("captions",),
        description="what is trained and evaluated beside RL: captions (RL's steps), captions_seconds and "
        "supervised_masks (RL's seconds), rl_blanked, rl_random_masks, grpo; []: nothing",
    )

    @property
    def phases(self) -> list[str]:
        """The phases of the kinds, in the order they are trained."""
        return [phase for kind, phase in CONTROL_PHASES.items() if kind in self.kinds]


@dataclass(frozen=True, config=STRICT)
class EvaluationSettings:
    """Accuracy on held-out masked captions, with the image, a blanked one and another caption's."""

    every: int = Field(
        0, ge=0, description="steps of RL between validations on data.validation pairs, the last always; 0: none"
    )
    samples: int = Field(450, ge=2, description="masked captions of each held-out set; two or more, to swap images")
    sampled: int = Field(
        0, ge=0, description="answers sampled at temperature 1 besides the greedy one, for avg@k; 0: none"
    )
    batch_size: int = Field(96, ge=1, description="masked captions answered at once")
