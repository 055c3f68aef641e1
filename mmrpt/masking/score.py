"""How much each token and sentence leans on the image: by default from one forward pass with recorded attention.

    share(t) = 1/|L| * sum_{l in L} mass_l(t, V) / (mass_l(t, V) + mass_l(t, T))        score(s_i) = mean of its tokens

V are the image's tokens and T the caption's; markers, instruction and template belong to neither. With the token's own
attention row and no baseline taken off, the score is MMRPT's D_vis(s_i). Other signals take the place of the share
(`masking.signal`): what the text has of the attention, a divergence of predictions, or the truth of drawn pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from mmrpt.masking.build import truth_of
from mmrpt.masking.forward import CaptionModel, Prompt
from mmrpt.masking.sentences import sentence_spans
from mmrpt.settings import Signal
from mmrpt.types import Example, SentenceScore
from mmrpt_kernels import linear_token_divergence


@dataclass(frozen=True)
class CaptionRow:
    """A caption behind its prompt, ready for the model. `blanked`: the same prompt with a blanked image."""

    example: Example
    prompt: Prompt
    ids: list[int]
    offsets: list[tuple[int, int]]
    blanked: Prompt | None = None
    where: str = ""  # "file:line"

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.ids)


@torch.no_grad()
def score_rows(
    model: CaptionModel,
    rows: Sequence[CaptionRow],
    *,
    layers: Sequence[int],
    attention_row: Literal["before", "own"],
    signal: Signal = "mass",
) -> list[list[SentenceScore]]:
    """The sentences of each row's caption with their scores; the rows go through the model as one batch.

    `attention_row` "own" takes a token's own attention row; "before" that of the token before it, which predicts it:
    the look that precedes the word. `signal` scores a token by its visual share ("mass"), by what is left to 1
    ("text_mass"), by KL(prediction with the image || with it blanked) over the whole vocabulary ("kl": another forward
    pass, of the rows' `blanked` prompts), or by whether its word truly needs the image ("truth": 1 or 0, and a sentence
    has the highest of its tokens').
    """
    prompts, responses = [row.prompt for row in rows], [row.ids for row in rows]
    hidden, masses = model.forward(prompts, responses, layers)
    shares = _visual_share(masses)
    if signal == "kl":
        blanked, _ = model.forward([row.blanked for row in rows], responses)
    found = []
    for i, row in enumerate(rows):
        start = len(row.prompt.ids) - (attention_row == "before")
        own = shares[i, start : start + len(row.ids)].tolist()
        if signal == "mass":
            found.append(_sentences(row, own))
        elif signal == "text_mass":
            found.append(_sentences(row, [1 - share for share in own], own))
        elif signal == "kl":
            found.append(_sentences(row, _divergences(model, row, hidden[i], blanked[i]), own))
        else:
            found.append(_sentences(row, _truth(row), own, joined=max))
    return found


def score_sentences(
    model: CaptionModel,
    examples: Sequence[Example],
    images: Sequence[Image.Image],
    *,
    instruction: str,
    layers: Sequence[float] = (0.5, 1.0),
    attention_row: Literal["before", "own"] = "before",
) -> list[SentenceScore]:
    """The sentences of a few examples, as one batch; a whole corpus goes through `mmrpt.masking.pipeline`."""
    rows = [
        CaptionRow(example, model.prompt(instruction, image), *model.encode(example.caption))
        for example, image in zip(examples, images, strict=True)
    ]
    scores = score_rows(model, rows, layers=layer_indices(layers, model.depth), attention_row=attention_row)
    return [score for caption in scores for score in caption]


def layer_indices(layers: Sequence[float], depth: int) -> list[int]:
    """Indices of text layers: as given, or of two fractions of the depth (0.5, 1.0 of five: [2, 3, 4]), at least one.

    Integers are indices, negative ones from the end. Raises ValueError for layers that the model has not.
    """
    if len(layers) == 2 and any(isinstance(layer, float) for layer in layers):
        first, last = layers
        if not 0 <= first < last <= 1:
            raise ValueError(f"layers are {list(layers)}: expected two fractions of the depth, 0 <= first < last <= 1.")
        low = min(int(first * depth), depth - 1)
        return list(range(low, max(low + 1, round(last * depth))))
    indices = sorted({int(layer) % depth for layer in layers if layer == int(layer) and -depth <= layer < depth})
    if not layers or len(indices) < len(layers):
        raise ValueError(
            f"layers are {list(layers)}: expected two fractions of the depth such as [0.5, 1.0], or different indices "
            f"below {depth}, which this model has."
        )
    return indices


def _visual_share(masses: Tensor) -> Tensor:
    """(B, T): mass(V) / (mass(V) + mass(T)), averaged over layers, of masses (L, B, T, 2). NaN stays NaN."""
    total = masses.sum(-1)
    return torch.where(total == 0, 0.0, masses[..., 0] / total.clamp_min(1e-12)).mean(0)


def _divergences(model: CaptionModel, row: CaptionRow, hidden: Tensor, blanked: Tensor) -> list[float]:
    """KL of each caption token's distribution; `hidden` and `blanked` are (T, H) of one row."""
    views = []
    for prompt, states in ((row.prompt, hidden), (row.blanked, blanked)):
        start = len(prompt.ids) - 1  # the state before a token predicts it
        views.append(states[start : start + len(row.ids)])
    return linear_token_divergence(*views, model.head_weight, bias=model.head_bias).divergence.tolist()


def _truth(row: CaptionRow) -> list[float]:
    """1 for each token of a word that needs the image, else 0."""
    words = [truth_of(row.example.words, start, end) for start, end in row.offsets]
    return [float(word is not None and word.needs_image) for word in words]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _sentences(
    row: CaptionRow,
    token_scores: Sequence[float],
    shares: Sequence[float] | None = None,
    *,
    joined: Callable[[Sequence[float]], float] = _mean,
) -> list[SentenceScore]:
    """The sentences of a caption, scored by the `joined` scores of their tokens; with `shares`, their mean besides.

    A token that overlaps two sentences belongs to the first, so that it counts once.
    """
    scores, first = [], 0
    example = row.example
    for index, (start, end) in enumerate(sentence_spans(example.caption)):
        inside = [i for i in range(first, len(row.offsets)) if row.offsets[i][0] < end and row.offsets[i][1] > start]
        if not inside:
            continue
        first = inside[-1] + 1
        truth = any(w.needs_image for w in example.words if start <= w.start < end) if example.words else None
        own = [token_scores[i] for i in inside]
        spans = tuple(tuple(row.offsets[i]) for i in inside)
        mass = None if shares is None else _mean([shares[i] for i in inside])
        scores.append(SentenceScore(example.id, index, start, end, joined(own), spans, tuple(own), truth, mass))
    return scores
