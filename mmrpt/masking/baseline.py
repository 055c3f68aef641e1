"""What a token's place alone explains of its visual mass, taken out of the scores.

The later a token, the more text there is to attend to, and the smaller the image's share of its attention, whatever the
token says: uncorrected, D_vis ranks first sentences first. The correction subtracts, at each place in the caption, the
mean share over the corpus; what is left is how much more a token looks than tokens at its place do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmrpt.types import SentenceScore


def subtract_position_baseline(scores: Sequence[SentenceScore], *, window: int = 7) -> list[SentenceScore]:
    """The same scores with the corpus mean at each token's place subtracted from masses and scores.

    A place is a token's index among its caption's tokens; the mean is smoothed over `window` neighbouring places,
    weighted by how many captions reach them. Sentences of one caption must all be present, in order. The result may be
    negative; over the corpus it is 0 on average.
    """
    if not scores:
        return []
    places = _places(scores)
    length = max(p[-1] + 1 for p in places)
    total, count = np.zeros(length), np.zeros(length)
    for score, place in zip(scores, places, strict=True):
        total[place] += score.token_masses
        count[place] += 1
    kernel = np.ones(window)
    # The first token's predicting row has no text before it: its share is always 1 and must not leak to its neighbours.
    smooth = np.concatenate((total[:1] / count[:1], _smoothed(total[1:], kernel) / _smoothed(count[1:], kernel)))
    corrected = []
    for score, place in zip(scores, places, strict=True):
        masses = np.asarray(score.token_masses) - smooth[place]
        corrected.append(replace(score, score=float(masses.mean()), token_masses=tuple(masses.tolist())))
    return corrected


def _smoothed(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Sums over a centred window that is cut at both ends; the same length as `values`."""
    half = len(kernel) // 2
    return np.convolve(values, kernel)[half : half + len(values)] if len(values) else values


def _places(scores: Sequence[SentenceScore]) -> list[np.ndarray]:
    """The place in its caption of every token of every sentence."""
    seen: dict[str, int] = defaultdict(int)
    places = []
    for score in scores:
        start = seen[score.example_id]
        seen[score.example_id] += len(score.token_masses)
        places.append(np.arange(start, seen[score.example_id]))
    return places
