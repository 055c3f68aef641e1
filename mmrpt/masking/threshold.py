"""The adaptive threshold tau: a sentence with a score of tau or more is taken to depend on the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np


def choose_threshold(
    scores: Sequence[float],
    method: Literal["otsu", "quantile", "mean_std"] = "otsu",
    *,
    quantile: float = 0.5,
    std_factor: float = 0.5,
) -> float:
    """tau for a corpus of sentence scores.

    "otsu" (Otsu 1979): the cut that splits the scores into two classes with the largest variance between them;
    "quantile": the corpus's `quantile`; "mean_std": mean + `std_factor` * std.
    Raises ValueError for no scores, scores that are not finite, or an unknown method.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{values.size} scores, all finite: {bool(np.isfinite(values).all())}; expected finite scores."
        )
    if method == "quantile":
        return float(np.quantile(values, quantile))
    if method == "mean_std":
        return float(values.mean() + std_factor * values.std())
    if method != "otsu":
        raise ValueError(f"threshold method {method!r}: expected 'otsu', 'quantile' or 'mean_std'.")
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
