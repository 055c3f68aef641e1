"""Removes the position effect: later tokens see more text, so their visual share falls whatever they say.

Uncorrected, the share ranks first sentences first. The correction subtracts, at each place in the caption, the mean
share over the corpus; what is left is how much more a token looks than tokens at its place do. It may be negative, and
it is ours: MMRPT's D_vis is the uncorrected share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from mmrpt.types import SentenceScore


class PositionBaseline:
    """The mean share at each place of a caption, summed up caption by caption: memory of the longest caption alone.

    A place is a token's index among its caption's sentence tokens; the mean is smoothed over `window` neighbouring
    places, weighted by how many captions reach them.
    """

    def __init__(self, window: int = 7) -> None:
        self.window = window
        self._total = np.zeros(0)
        self._count = np.zeros(0)
        self._mean: np.ndarray | None = None

    def add(self, caption: Sequence[SentenceScore], counted: Sequence[bool]) -> None:
        """Adds the sentences of one caption, all of them and in order; those not `counted` only take their places."""
        for score, counts, place in zip(caption, counted, _places(caption), strict=True):
            if counts:
                self._grow(place.stop)
                self._total[place] += score.token_scores
                self._count[place] += 1
        self._mean = None

    def subtract(self, caption: Sequence[SentenceScore]) -> list[SentenceScore]:
        """The sentences of one caption with the corpus mean at each token's place taken from masses and scores."""
        if self._mean is None:
            self._mean = self._smooth()
        corrected = []
        for score, place in zip(caption, _places(caption), strict=True):
            reached = np.minimum(np.arange(place.start, place.stop), len(self._mean) - 1)
            masses = np.asarray(score.token_scores) - (self._mean[reached] if len(self._mean) else 0.0)
            corrected.append(replace(score, score=float(masses.mean()), token_scores=tuple(masses.tolist())))
        return corrected

    def _grow(self, length: int) -> None:
        missing = length - len(self._total)
        if missing > 0:
            more = np.zeros(max(missing, len(self._total)))
            self._total, self._count = np.append(self._total, more), np.append(self._count, more)

    def _smooth(self) -> np.ndarray:
        """The mean at each place; where no caption reaches, that of the last place before."""
        reached = np.flatnonzero(self._count)
        if not len(reached):
            return np.zeros(0)
        total, count = self._total[: reached[-1] + 1], self._count[: reached[-1] + 1]
        kernel = np.ones(self.window)
        # The first token's row "before" sees no text: its share is always 1 and must not leak to its neighbours.
        sums = np.concatenate((total[:1], _smoothed(total[1:], kernel)))
        counts = np.concatenate((count[:1], _smoothed(count[1:], kernel)))
        last = np.maximum.accumulate(np.where(counts > 0, np.arange(len(counts)), 0))
        return sums[last] / np.maximum(counts[last], 1.0)


def _smoothed(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Sums over a centred window that is cut at both ends; the same length as `values`."""
    half = len(kernel) // 2
    return np.convolve(values, kernel)[half : half + len(values)] if len(values) else values


def _places(caption: Sequence[SentenceScore]) -> Iterator[slice]:
    """The places of each sentence's tokens in the caption."""
    start = 0
    for score in caption:
        yield slice(start, start + len(score.token_scores))
        start += len(score.token_scores)
