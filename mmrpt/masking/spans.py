"""Which words of a vision-dependent sentence are hidden: content words, ranked by the scores of their tokens.

Colours, numbers, sides and relations are told from a list (`mmrpt.masking.words`) and hidden whole; everything else,
names of things above all, is of class "other". A span leaves at least half of its sentence's words standing, and a
content word among them: what is asked must be asked about something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmrpt.masking.words import has_letters, is_content, visual_phrases, word_spans
from mmrpt.types import SentenceScore

# A span grows over a neighbour with at least this share of its score, so that "fire truck" is hidden whole: half of a
# name gives the other half away.
GROWTH = 0.25


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a caption, with the mean score of its words and their class."""

    start: int
    end: int
    score: float
    word_class: str = "other"


def choose_spans(caption: str, score: SentenceScore, *, max_words: int, count: int | None = None) -> list[Span]:
    """The spans of the sentence, highest score first, none overlapping; at most `count` of them where it is given.

    A listed phrase ("red", "top left", "left of") is one span. Any other span starts as one content word and grows over
    an adjacent one, up to `max_words`, while that word's own score is at least `GROWTH` of the span's.
    """
    words = [
        Span(start, end, _word_score(score, start, end)) for start, end in word_spans(caption, score.start, score.end)
    ]
    max_words = min(max_words, len(words) // 2)
    if max_words == 0 or not has_letters(caption[score.start : score.end]):
        return []
    listed = [
        Span(start, end, _word_score(score, start, end), word_class)
        for start, end, word_class in visual_phrases(caption, score.start, score.end, max_words=max_words)
    ]
    taken = [any(_overlap(word, phrase) for phrase in listed) for word in words]
    content = [is_content(caption[w.start : w.end]) for w in words]
    spans = list(listed)
    for best in sorted((i for i, keep in enumerate(content) if keep), key=lambda i: (-words[i].score, i)):
        if taken[best]:
            continue
        low = high = best
        free = [keep and not gone for keep, gone in zip(content, taken, strict=True)]
        while high - low + 1 < max_words:
            side = _neighbour(caption, words, free, (low, high), floor=GROWTH * words[best].score)
            if side is None:
                break
            low, high = min(low, side), max(high, side)
        for i in range(low, high + 1):
            taken[i] = True
        mean = sum(w.score for w in words[low : high + 1]) / (high - low + 1)
        spans.append(Span(words[low].start, words[high].end, mean))
    told = [word for word, keep in zip(words, content, strict=True) if keep]
    spans = [span for span in spans if not all(_overlap(word, span) for word in told)]
    return sorted(spans, key=lambda span: (-span.score, span.start))[:count]


def _overlap(a: Span, b: Span) -> bool:
    return a.start < b.end and b.start < a.end


def _neighbour(
    caption: str, words: Sequence[Span], free: Sequence[bool], span: tuple[int, int], floor: float
) -> int | None:
    """The free word beside words span[0] to span[1] with the highest score, at least `floor`, and no comma between."""
    low, high = span
    gaps = {low - 1: (low - 1, low), high + 1: (high, high + 1)}
    options = [
        side
        for side, (left, right) in gaps.items()
        if 0 <= side < len(words)
        and free[side]
        and words[side].score >= floor
        and not caption[words[left].end : words[right].start].strip()
    ]
    return max(options, key=lambda i: words[i].score, default=None)


def _word_score(score: SentenceScore, start: int, end: int) -> float:
    """Score of the word's first token: its later tokens mostly attend to that one."""
    for (token_start, token_end), own in zip(score.token_spans, score.token_scores, strict=True):
        if token_start < end and start < token_end:
            return own
    return 0.0
