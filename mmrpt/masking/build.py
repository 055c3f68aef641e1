"""Masked samples: a caption with one span replaced by the mask token, and the span as the answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmrpt.masking.spans import FUNCTION_WORDS, choose_spans
from mmrpt.types import Example, MaskedSample, SentenceScore, Word


def build_masked_samples(
    example: Example,
    scores: Sequence[SentenceScore],
    threshold: float,
    *,
    mask: str,
    spans_per_caption: int,
    max_span_words: int,
) -> list[MaskedSample]:
    """The masked samples of one caption: its best spans, from the sentences that score `threshold` or more.

    Sentences take turns, the highest score first, so that one sentence does not give every span.
    """
    dependent = sorted((s for s in scores if s.score >= threshold), key=lambda s: (-s.score, s.sentence))
    queues = [
        [
            (score, span)
            for span in choose_spans(example.caption, score, count=spans_per_caption, max_words=max_span_words)
        ]
        for score in dependent
    ]
    turns = [queue[turn] for turn in range(spans_per_caption) for queue in queues if turn < len(queue)]
    return [_sample(example, score, span.start, span.end, span.mass, mask) for score, span in turns[:spans_per_caption]]


def random_masks(example: Example, count: int, *, mask: str, rng: np.random.Generator) -> list[MaskedSample]:
    """`count` random spans hidden, one a sample: what the warm-up uses to teach the answer's form.

    A span is a content word and, one time in three, the word that follows it in the same sentence ("top left").
    """
    words = word_offsets(example.caption)
    content = [i for i, (a, b) in enumerate(words) if example.caption[a:b].casefold() not in FUNCTION_WORDS]
    chosen = rng.choice(content, size=min(count, len(content)), replace=False) if content else []
    samples = []
    for i in chosen:
        start, end = words[i]
        if rng.random() < 1 / 3 and i + 1 < len(words) and example.caption[end : words[i + 1][0]].isspace():
            end = words[i + 1][1]
        samples.append(_sample(example, None, start, end, 0.0, mask))
    return samples


def truth_masks(example: Example, *, mask: str) -> list[MaskedSample]:
    """One sample for each word that truly needs the image: what evaluation asks, whatever a model attends to."""
    return [_sample(example, None, w.start, w.end, 0.0, mask) for w in example.words if w.needs_image]


def word_offsets(caption: str) -> list[tuple[int, int]]:
    """(start, end) of each word, punctuation left out."""
    spans, position = [], 0
    for piece in caption.split():
        start = caption.index(piece, position)
        position = start + len(piece)
        body = piece.strip(".,;:!?\"'()[]")
        if body:
            offset = start + piece.index(body)
            spans.append((offset, offset + len(body)))
    return spans


def _sample(
    example: Example, score: SentenceScore | None, start: int, end: int, mass: float, mask: str
) -> MaskedSample:
    truth = _truth(example.words, start, end)
    return MaskedSample(
        id=f"{example.id}#{start}-{end}",
        example_id=example.id,
        masked_caption=example.caption[:start] + mask + example.caption[end:],
        answer=example.caption[start:end],
        start=start,
        end=end,
        sentence=-1 if score is None else score.sentence,
        sentence_score=0.0 if score is None else score.score,
        span_mass=mass,
        kind=truth.kind if truth else "",
        needs_image=truth.needs_image if truth else (None if not example.words else False),
    )


def _truth(words: Sequence[Word], start: int, end: int) -> Word | None:
    """The word of the truth that the span covers; one that needs the image wins over others."""
    inside = [w for w in words if w.start < end and start < w.end]
    return max(inside, key=lambda w: w.needs_image, default=None)
