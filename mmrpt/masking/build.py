"""Masked samples: a caption with one span replaced by the mask token, and the span as the answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmrpt.corpus import seed_of
from mmrpt.masking.leaks import is_repeated
from mmrpt.masking.spans import Span, choose_spans
from mmrpt.masking.words import is_content, visual_phrases, word_spans
from mmrpt.types import Example, MaskedSample, SentenceScore, Word


def build_masked_samples(
    example: Example,
    scores: Sequence[SentenceScore],
    threshold: float,
    *,
    mask: str,
    spans_per_caption: int,
    max_span_words: int,
    min_span_score: float = -math.inf,
    used: Counter[str] | None = None,
    dropped: Counter[str] | None = None,
) -> list[MaskedSample]:
    """The masked samples of one caption: its best spans of `min_span_score` or more, from the sentences that score
    `threshold` or more.

    Spans go by score. With `used`, a count of the word classes hidden so far that this call adds to, the least hidden
    class goes first, so that classes the model does not attend to yet are asked too. With `dropped`, spans whose words
    stand elsewhere in the caption are passed over, and counted there as "repeated".
    """
    candidates = [
        (score, span)
        for score in scores
        if score.score >= threshold
        for span in choose_spans(example.caption, score, max_words=max_span_words)
        if span.score >= min_span_score
    ]
    chosen: list[tuple[SentenceScore, Span]] = []
    while candidates and len(chosen) < spans_per_caption:
        best = min(
            candidates, key=lambda c: (used[c[1].word_class] if used is not None else 0, -c[1].score, c[1].start)
        )
        candidates.remove(best)
        if dropped is not None and is_repeated(example.caption, best[1].start, best[1].end):
            dropped["repeated"] += 1
            continue
        chosen.append(best)
        if used is not None:
            used[best[1].word_class] += 1
    return [_sample(example, score, span.start, span.end, span.score, mask) for score, span in chosen]


def random_masks(example: Example, count: int, *, mask: str, rng: np.random.Generator) -> list[MaskedSample]:
    """`count` random spans hidden, one a sample: what the warm-up uses to teach the answer's form.

    A span is a listed phrase ("red", "top left", "left of") or another content word and, one time in three, the content
    word that follows it in the same sentence: the kinds of span that `choose_spans` hides, whatever a model looks at.
    """
    caption = example.caption
    listed = [phrase[:2] for phrase in visual_phrases(caption, 0, len(caption), max_words=2)]
    words = [w for w in word_spans(caption) if not any(w[0] < end and start < w[1] for start, end in listed)]
    others = [(a, b) for a, b in words if is_content(caption[a:b])]
    spans = sorted([*listed, *others])
    chosen = rng.choice(len(spans), size=min(count, len(spans)), replace=False) if spans else []
    samples = []
    for i in chosen:
        start, end = spans[i]
        if rng.random() < 1 / 3 and spans[i] in others and spans[i + 1 : i + 2] and spans[i + 1] in others:
            end = spans[i + 1][1] if caption[end : spans[i + 1][0]].isspace() else end
        samples.append(_sample(example, None, start, end, 0.0, mask))
    return samples


def masked_at_random(
    samples: Sequence[MaskedSample], *, mask: str, drop_repeated: bool, seed: int
) -> list[MaskedSample]:
    """As many samples of the same captions, with spans drawn at random whatever their sentences score.

    drop_repeated: spans whose words stand elsewhere in the caption are passed over. A caption that has no more spans
    gives fewer samples.
    """
    captions = {s.example_id: Example(s.example_id, caption_of(s, mask)) for s in samples}
    counts, found = Counter(s.example_id for s in samples), []
    for name, example in captions.items():
        rng = np.random.default_rng(seed_of(seed, "masked at random", name))
        drawn = random_masks(example, len(example.caption), mask=mask, rng=rng)  # all there are, in random order
        fit = [s for s in drawn if not (drop_repeated and is_repeated(example.caption, s.start, s.end))]
        found += fit[: counts[name]]
    return found


def caption_of(sample: MaskedSample, mask: str) -> str:
    """The caption before its span was hidden."""
    text = sample.masked_caption
    return text[: sample.start] + sample.answer + text[sample.start + len(mask) :]


def truth_masks(example: Example, *, mask: str) -> list[MaskedSample]:
    """One sample for each word that truly needs the image: what evaluation asks, whatever a model attends to."""
    return [_sample(example, None, w.start, w.end, 0.0, mask) for w in example.words if w.needs_image]


def _sample(
    example: Example, score: SentenceScore | None, start: int, end: int, span_score: float, mask: str
) -> MaskedSample:
    truth = truth_of(example.words, start, end)
    return MaskedSample(
        id=f"{example.id}#{start}-{end}",
        example_id=example.id,
        masked_caption=example.caption[:start] + mask + example.caption[end:],
        answer=example.caption[start:end],
        start=start,
        end=end,
        sentence=-1 if score is None else score.sentence,
        sentence_score=0.0 if score is None else score.score,
        span_score=span_score,
        kind=truth.kind if truth else "",
        needs_image=truth.needs_image if truth else (None if not example.words else False),
    )


def truth_of(words: Sequence[Word], start: int, end: int) -> Word | None:
    """The word of the truth that the span covers; one that needs the image wins over others."""
    inside = [w for w in words if w.start < end and start < w.end]
    return max(inside, key=lambda w: w.needs_image, default=None)
