"""The nouns of the pipeline. Frozen: each field has one writer, named beside it, and nothing is changed afterwards.

`Example` -> sentences with scores (`SentenceScore`) -> `MaskedSample` -> sampled responses (`Generation`) -> those of
one prompt with their rewards (`Group`) -> tensors of a forward pass (`Batch`) and of its loss (`PolicyTargets`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:  # reading a corpus needs no torch, which takes seconds to load
    import torch
    from PIL import Image


@dataclass(frozen=True)
class Word:
    """One word of a caption whose truth is known. Written by the source of the pair (the demo's worlds).

    `start` and `end` are character offsets into the caption, end exclusive. `kind` is one of "object", "colour",
    "material", "count", "position", "relation", or "plain". `needs_image` is true when the other words of the caption
    do not determine this one, so that only the image can.
    """

    start: int
    end: int
    kind: str
    needs_image: bool


@dataclass(frozen=True)
class Example:
    """An image-caption pair. `id` is unique within its source; `words` is empty where no truth is known."""

    id: str
    caption: str
    words: tuple[Word, ...] = ()


class PairSource(Protocol):
    """Where pairs come from: a world of the demo, or a reader of real files. Deterministic by index, safe to reopen."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def image(self, example_id: str) -> Image.Image:
        """The RGB image of an example, decoded on demand."""
        ...


@dataclass(frozen=True)
class SentenceScore:
    """How much one sentence leans on the image (`mmrpt.masking.score`). One line of scores.jsonl.

    MMRPT's D_vis with `masking.signal=mass`, `masking.attention_row=own` and `masking.baseline=none`.
    """

    example_id: str
    sentence: int
    start: int
    end: int
    score: float
    token_spans: tuple[tuple[int, int], ...]  # character offsets in the caption, one per token of the sentence
    token_scores: tuple[float, ...]  # what masking.signal says of each of those tokens
    needs_image: bool | None = None  # truth, where the source knows it
    mass: float | None = None  # mean visual share of its tokens' attention, where the score is of another signal


@dataclass(frozen=True)
class MaskedSample:
    """A caption with one span replaced by the mask token (`mmrpt.masking.build`). One line of masked.jsonl."""

    id: str
    example_id: str
    masked_caption: str
    answer: str
    start: int  # of the span in the caption, characters
    end: int
    sentence: int
    sentence_score: float
    span_score: float
    kind: str = ""  # truth, where the source knows it
    needs_image: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rollout:
    """One sampled completion of a masked sample (`mmrpt.rollout.generate`)."""

    sample_id: str
    group: int  # index of the prompt in its step; rollouts of one prompt share it
    completion: str
    token_ids: tuple[int, ...]  # the response, end-of-turn token included when it was reached
    finished: bool  # ended by itself rather than by the length limit


class Pixels(Protocol):
    """Processed images, as a policy's family has them (`PixelBatch`, `ProcessedImages`)."""

    def select(self, images: Sequence[int]) -> Self:
        """The images of these indices, in their order."""
        ...

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The images of all parts, one after another."""
        ...


@dataclass(frozen=True)
class PixelBatch:
    """Images as rows of patches. `pixel_values` (sum of patches, C * temporal * patch * patch), `grid_thw` (P, 3)."""

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor

    def tokens_per_image(self, merge_size: int) -> torch.Tensor:
        return self.grid_thw.prod(-1) // merge_size**2

    def select(self, images: Sequence[int]) -> PixelBatch:
        """The images of these indices, in their order."""
        from torch import cat

        parts = self.pixel_values.split(self.grid_thw.prod(-1).tolist())
        return PixelBatch(cat([parts[i] for i in images]), self.grid_thw[list(images)])

    @classmethod
    def joined(cls, parts: Sequence[PixelBatch]) -> PixelBatch:
        """The images of all parts, one after another."""
        from torch import cat

        return cls(cat([part.pixel_values for part in parts]), cat([part.grid_thw for part in parts]))


@dataclass(frozen=True)
class ProcessedImages:
    """Images as their family's own processor gives them: `tensors[i]` is what the model takes of `pictures[i]`."""

    pictures: tuple[Image.Image, ...]
    tensors: tuple[Mapping[str, torch.Tensor], ...]

    def select(self, images: Sequence[int]) -> ProcessedImages:
        """The images of these indices, in their order."""
        return ProcessedImages(*(tuple(values[i] for i in images) for values in (self.pictures, self.tensors)))

    @classmethod
    def joined(cls, parts: Sequence[ProcessedImages]) -> ProcessedImages:
        """The images of all parts, one after another."""
        return cls(sum((part.pictures for part in parts), ()), sum((part.tensors for part in parts), ()))


@dataclass(frozen=True)
class Batch:
    """The tensors of one forward pass, padded on the right. R rows, T tokens, P images.

    Images are stored once each; `image_index` says which one a row shows, so that a group's vision tower runs once.
    A row holds one response behind its prompt, or, with `segments`, all responses of a group (`mmrpt.batching`).
    """

    input_ids: torch.Tensor  # (R, T) int64
    attention_mask: torch.Tensor  # (R, T) int64
    response_mask: torch.Tensor  # (R, T) bool, true at tokens the policy generated
    pixels: Pixels  # of P images
    image_index: torch.Tensor  # (R,) int64 into P
    segments: torch.Tensor | None = None  # (R, T) int64: 0 prompt, 1 to n the responses, -1 padding; None: one a row


@dataclass(frozen=True)
class Generation:
    """The sampled responses of one round (`mmrpt.rollout.generate`). R = prompts * group_size rows, a prompt's beside
    each other.

    `token_ids` one tuple a row, the end-of-turn token included where it was reached; `logps` (R, T) float32, the
    log-probability each token was sampled with, 0 past the end; `hidden` (R, T, H) the last hidden state that each
    token was sampled from, 0 past the end, None where it was not asked for; `finished` (R,) bool.
    """

    token_ids: list[tuple[int, ...]]
    logps: torch.Tensor
    hidden: torch.Tensor | None
    finished: torch.Tensor


@dataclass(frozen=True)
class Group:
    """One prompt with its n responses, scored under the policy that sampled them (`mmrpt.rollout.collect`). T is the
    group's longest response.

    Only groups with a signal are kept (`mmrpt.advantage`), so the advantages are never all zero.
    """

    sample_id: str
    example_id: str
    prompt: list[int]
    responses: list[list[int]]  # n rows of token ids
    logps: torch.Tensor  # (n, T) float32, as sampled
    perception: torch.Tensor  # (n, T) float32, 0 past a row's end
    rewards: torch.Tensor  # (n,) float32
    advantages: torch.Tensor  # (n,) float32
    ref_logps: torch.Tensor | None = None  # (n, T) float32 of the reference model, where rl.kl_coef asks for it
    trainer_logps: torch.Tensor | None = None  # (n, T) float32 of a training forward pass, where rl.max_importance asks

    @property
    def response_tokens(self) -> int:
        return sum(len(r) for r in self.responses)


@dataclass(frozen=True)
class SamplingRound:
    """What a round of sampling gave (`mmrpt.rollout.collect`): the groups with a signal, and all rollouts with their
    rewards, a prompt's beside each other. `metrics` are means over all of them; `seconds` by part of the work."""

    groups: list[Group]
    rollouts: list[Rollout]
    rewards: list[float]
    metrics: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class PolicyTargets:
    """What the loss knows of R responses, all (R, T) unless said (`mmrpt.engines.rl_step`)."""

    advantages: torch.Tensor  # (R,)
    old_logps: torch.Tensor
    perception_mask: torch.Tensor | None  # bool
    trajectory_weights: torch.Tensor | None  # (R,)
    ref_logps: torch.Tensor | None = None
    sampler_weights: torch.Tensor | None = None

    def select(self, rows: slice) -> PolicyTargets:
        """Those of some of the responses."""
        return PolicyTargets(**{name: None if x is None else x[rows] for name, x in vars(self).items()})
