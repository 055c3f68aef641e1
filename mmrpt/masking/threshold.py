"""The adaptive threshold tau: a sentence with a score of tau or more is taken to depend on the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmrpt.settings import threshold_rule


def choose_threshold(scores: Sequence[float], rule: str = "otsu") -> float:
    """tau for a corpus of sentence scores.

    "otsu" (Otsu 1979): the cut that splits the scores into two classes with the largest variance between them;
    "quantile:Q": the corpus's Q-quantile; "mean_std:K": mean + K * standard deviation.
    Raises ValueError for no scores, scores that are not finite, or another rule.
    """
    method, number = threshold_rule(rule)
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{values.size} scores, all finite: {bool(np.isfinite(values).all())}; expected finite scores."
        )
    if method == "quantile":
        return float(np.quantile(values, number))
    if method == "mean_std":
        return float(values.mean() + number * values.std())
    if method == "caption_std":
        raise ValueError(f"threshold {rule!r} is one per caption: expected a rule for the whole corpus.")
    return _otsu(values)


def _otsu(values: np.ndarray) -> float:
    """Exact Otsu on the sorted values: no histogram, every gap between different values is tried."""
    if values[0] == values[-1]:
        return float(values[0])
    n = values.size
    below = np.arange(1, n)
    sums = np.cumsum(values)
    mean_below = sums[:-1] / below
    mean_above = (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * (mean_above - mean_below) ** 2
    between[values[1:] == values[:-1]] = -1.0
    cut = int(between.argmax())
    return float((values[cut] + values[cut + 1]) / 2)
