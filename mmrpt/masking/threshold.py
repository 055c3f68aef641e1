"""The adaptive threshold tau: a sentence with a score of tau or more is taken to depend on the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mmrpt.settings import threshold_rule

# Otsu cuts any corpus in two. One normal distribution, cut anywhere, has a between-class share of variance that is
# known; two classes have more.
_ABOVE_ONE_CLASS = 1.05


@dataclass(frozen=True)
class Threshold:
    """tau of a corpus, or how each caption gets its own.

    `between_share` is Otsu's own measure of separation: the variance between the two classes over all variance.
    """

    method: str
    value: float | None  # None: of each caption, mean + std_factor * std
    std_factor: float = 0.0
    between_share: float | None = None
    warning: str | None = None

    def of_caption(self, scores: Sequence[float]) -> float:
        """tau for one caption, whose sentences have these scores."""
        if self.value is not None:
            return self.value
        return float(np.mean(scores) + self.std_factor * np.std(scores)) if len(scores) else np.inf


def choose_threshold(scores: Sequence[float] | np.ndarray, threshold: str = "otsu") -> Threshold:
    """tau for a corpus of sentence scores.

    "otsu" (Otsu 1979): the cut that splits the scores into two classes with the largest variance between them;
    "quantile:q": the corpus's quantile; "mean_std:k": mean + k * std of the corpus; "caption_std:k": the same of each
    caption's own sentences. Raises ValueError for no scores, scores that are not finite, or an unknown method.
    """
    method, number = threshold_rule(threshold)
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{values.size} scores, all finite: {bool(np.isfinite(values).all())}; expected finite scores."
        )
    if method == "quantile":
        return Threshold(threshold, float(np.quantile(values, number)))
    if method == "mean_std":
        return Threshold(threshold, float(values.mean() + number * values.std()))
    if method == "caption_std":
        return Threshold(threshold, None, number)
    return _otsu(values)


def _otsu(values: np.ndarray) -> Threshold:
    """Exact Otsu on the sorted values: no histogram, every gap between different values is tried."""
    if values[0] == values[-1]:
        return Threshold("otsu", float(values[0]), between_share=0.0, warning="all scores are equal: all pass.")
    n = values.size
    below = np.arange(1, n)
    sums = np.cumsum(values)
    mean_below = sums[:-1] / below
    mean_above = (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * (mean_above - mean_below) ** 2
    between[values[1:] == values[:-1]] = -1.0
    cut = int(between.argmax())
    share = float(between[cut] / n**2 / values.var())
    normal = NormalDist()
    upper = (n - below[cut]) / n
    one_class = normal.pdf(normal.inv_cdf(upper)) ** 2 / (upper * (1 - upper))
    warning = None
    if share < _ABOVE_ONE_CLASS * one_class:
        warning = (
            f"the two classes hold {share:.2f} of the variance between them; one bell-shaped class cut at this place "
            f"would hold {one_class:.2f}. The scores may be of one class: look at their histogram, or choose a "
            "quantile."
        )
    return Threshold("otsu", float((values[cut] + values[cut + 1]) / 2), between_share=share, warning=warning)
