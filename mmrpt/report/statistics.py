"""Statistics of a run: 95 % intervals, AUC, moving averages. NumPy in, floats out.

Undefined results (an AUC of one class, a mean of nothing) are NaN, so that a report shows a gap, not a zero.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """Both ends included."""

    low: float
    high: float


def wilson_interval(successes: float, count: int) -> Interval:
    """Wilson's score interval of a binomial proportion (Wilson 1927): never leaves [0, 1], sound at 0 and at `count`.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). A count of zero gives [0, 1]: nothing is known.
    """
    if count < 0 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count}: expected 0 <= successes <= count; pass counts, not rates")
    if count == 0:
        return Interval(0.0, 1.0)
    rate, z2 = successes / count, Z95**2
    middle, scale = rate + z2 / (2 * count), 1 + z2 / count
    reach = Z95 * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count * count))
    low = 0.0 if successes == 0 else max(0.0, (middle - reach) / scale)
    high = 1.0 if successes == count else min(1.0, (middle + reach) / scale)
    return Interval(low, high)


def paired_difference_interval(differences: ArrayLike, bound: float = 1.0) -> Interval:
    """Interval of a mean of differences, one a question (N,): right (1) or wrong (0) under a, minus that under b.

    Agresti and Min (2005): Wald's interval after half a question is added to each of the four cells, which is half a
    question of +1, half of -1 and one of 0. With m = sum d / (N + 2):
    m +- z sqrt((sum d^2 + 1) / (N + 2) - m^2) / sqrt(N + 2), cut at +-bound; [-bound, bound] without a question.
    A difference of two such differences takes bound=2.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not (np.abs(values) <= bound).all():
        raise ValueError(
            f"expected one difference (N,) a question within +-{bound:g}, got {values.shape}: pass no rates"
        )
    if values.size == 0:
        return Interval(-bound, bound)
    larger = values.size + 2
    middle = float(values.sum()) / larger
    variance = (float((values**2).sum()) + 1) / larger - middle**2
    reach = Z95 * math.sqrt(variance / larger)
    return Interval(max(-bound, middle - reach), min(bound, middle + reach))


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """P(score of a positive > score of a negative) + P(equal) / 2, by average ranks (Mann-Whitney U / (P N)).

    labels (N,) bool or 0 and 1, first as in scikit-learn; scores (N,) finite. NaN when one class is absent.
    """
    values, given = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if not np.isin(given, (0, 1)).all():
        raise ValueError("labels hold values beside 0 and 1: the labels come first, then the scores")
    positive = given.astype(bool)
    if values.ndim != 1 or values.shape != positive.shape:
        raise ValueError(f"scores are {values.shape} and labels {positive.shape}: expected the same (N,)")
    if not np.isfinite(values).all():
        raise ValueError("scores hold NaN or infinity, which have no rank: drop those rows with their labels first")
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return math.nan
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # ties share the mean of their ranks
    u = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(u / (num_positive * num_negative))


def auc_interval(auc: float, num_positive: int, num_negative: int) -> Interval:
    """Normal interval of an AUC, clipped to [0, 1] (Hanley and McNeil 1982); NaN ends for a NaN AUC or a lone class."""
    if math.isnan(auc) or num_positive == 0 or num_negative == 0:
        return Interval(math.nan, math.nan)
    two_positives = auc / (2 - auc)  # P(two random positives both beat a negative), for exponential scores
    two_negatives = 2 * auc * auc / (1 + auc)
    variance = auc * (1 - auc) + (num_positive - 1) * (two_positives - auc**2)
    variance = (variance + (num_negative - 1) * (two_negatives - auc**2)) / (num_positive * num_negative)
    reach = Z95 * math.sqrt(max(variance, 0.0))
    return Interval(max(0.0, auc - reach), min(1.0, auc + reach))


def moving_average(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """Centred mean over `window` (odd) neighbours of values (N,); the window shrinks at the ends and skips NaN."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}, expected an odd number >= 1 so that the mean is centred")
    series = np.asarray(values, dtype=np.float64)
    padded = np.pad(series, window // 2, constant_values=math.nan)
    if series.size == 0:
        return series
    near = np.lib.stride_tricks.sliding_window_view(padded, window)
    known = np.isfinite(near)
    total = np.where(known, near, 0.0).sum(axis=1)
    return np.where(known.any(axis=1), total / np.maximum(known.sum(axis=1), 1), math.nan)
