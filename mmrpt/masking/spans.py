"""Which words of a vision-dependent sentence are hidden: content words, ranked by their tokens' mass on the image.

Colours, numbers, sides and relations are told from a list (`mmrpt.masking.words`) and hidden whole; everything else,
names of things above all, is of class "other".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmrpt.masking.words import visual_phrases
from mmrpt.types import SentenceScore

# Words that carry no visual content by themselves. A plain list instead of a tagger: no model, no download, any speed.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any each every all both no not nor and or but so as if than then too
    very also only just there here it its they them their he she his her him we us our you your i my me who whom
    whose which what when where why how is are was were be been being am do does did has have had having can
    could may might must shall should will would of to in on at by for from with without into onto upon about
    over through during before after again once one's 's
    """.split()  # noqa: SIM905
)
# Half of a name gives the other half away, so spans must not stop early.
GROWTH = 0.25
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*", re.UNICODE)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a caption, with the mean mass of its words and their class."""

    start: int
    end: int
    mass: float
    word_class: str = "other"


def choose_spans(
    caption: str,
    score: SentenceScore,
    *,
    max_words: int,
    count: int | None = None,
    stop_words: frozenset[str] = FUNCTION_WORDS,
) -> list[Span]:
    """The spans of the sentence, highest mass first, none overlapping; at most `count` of them where it is given.

    A listed phrase ("red", "top left", "left of") is one span. Any other span starts as one content word and grows over
    an adjacent one, up to `max_words`, while that word's own mass is at least `GROWTH` of the span's.
    """
    listed = [
        Span(start, end, _mass(score, start, end), word_class)
        for start, end, word_class in visual_phrases(caption, score.start, score.end, max_words=max_words)
    ]
    words = [
        Span(m.start(), m.end(), _mass(score, m.start(), m.end()))
        for m in _WORD.finditer(caption, score.start, score.end)
    ]
    taken = [any(w.start < phrase.end and phrase.start < w.end for phrase in listed) for w in words]
    content = [caption[w.start : w.end].casefold() not in stop_words for w in words]
    spans = list(listed)
    for best in sorted((i for i, keep in enumerate(content) if keep), key=lambda i: (-words[i].mass, i)):
        if taken[best]:
            continue
        low = high = best
        while high - low + 1 < max_words:
            side = _neighbour(words, content, taken, low, high, floor=GROWTH * words[best].mass)
            if side is None:
                break
            low, high = min(low, side), max(high, side)
        for i in range(low, high + 1):
            taken[i] = True
        mass = sum(w.mass for w in words[low : high + 1]) / (high - low + 1)
        spans.append(Span(words[low].start, words[high].end, mass))
    return sorted(spans, key=lambda span: (-span.mass, span.start))[:count]


def _neighbour(
    words: Sequence[Span], content: Sequence[bool], taken: Sequence[bool], low: int, high: int, floor: float
) -> int | None:
    options = [i for i in (low - 1, high + 1) if 0 <= i < len(words) and content[i] and not taken[i]]
    options = [i for i in options if words[i].mass >= floor]
    return max(options, key=lambda i: words[i].mass, default=None)


def _mass(score: SentenceScore, start: int, end: int) -> float:
    """The mass of a word's first token: the later ones of a word read on from the first."""
    for (token_start, token_end), mass in zip(score.token_spans, score.token_masses, strict=True):
        if token_start < end and start < token_end:
            return mass
    return 0.0
