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


def wilson_interval(successes: float, count: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a binomial proportion (Wilson 1927): never leaves [0, 1], sound at 0 and at `count`.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). A count of zero gives [0, 1]: nothing is known.
    """
    if count < 0 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count}: expected 0 <= successes <= count; pass counts, not rates")
    if count == 0:
        return Interval(0.0, 1.0)
    rate, z2 = successes / count, z**2
    middle, scale = rate + z2 / (2 * count), 1 + z2 / count
    reach = z * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count * count))
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


def paired_ratio_interval(one: ArrayLike, other: ArrayLike) -> Interval:
    """Interval of mean(one) / mean(other), both (N,) right (1) or wrong (0) about the same questions.

    Bonett and Price (2006): Wilson's intervals of both rates among the questions that are right under either, at a
    critical value that allows for the pairs; the ends are the lower of the one over the upper of the other, and the
    reverse. [0, infinity] where `other` has no right answer.
    """
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not np.isin([*a, *b], (0, 1)).all():
        raise ValueError(f"expected 0 or 1 (N,) of the same questions, got {a.shape} and {b.shape}: pass no rates")
    if not b.any():
        return Interval(0.0, math.inf)
    either, hits = int(np.maximum(a, b).sum()), (int(a.sum()), int(b.sum()))
    pairs = math.sqrt((np.abs(a - b).sum() + 2) / ((hits[0] + 1) * (hits[1] + 1)))
    alone = sum(math.sqrt((1 - (hit + 1) / (either + 2)) / (hit + 1)) for hit in hits)
    top, bottom = (wilson_interval(hit, either, z=Z95 * pairs / alone) for hit in hits)
    return Interval(top.low / bottom.high, top.high / bottom.low)


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
    u = _ranks(values)[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(u / (num_positive * num_negative))


def auc_interval(auc: float, labels: ArrayLike, scores: ArrayLike, clusters: ArrayLike) -> Interval:
    """Normal interval around an AUC, clipped to [0, 1], for rows that are independent only between clusters (N,).

    Obuchowski (1997), DeLong's method with what the rows of a cluster add taken together. With v_i a positive's share
    of negatives below it and v_j a negative's share of positives above it, ties half, and C clusters:
    variance = C / (C - 1) * sum over clusters of (sum_i (v_i - AUC) / P + sum_j (v_j - AUC) / N)^2. NaN ends without
    both classes or two clusters.
    """
    positive, values = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    _, cluster = np.unique(clusters, return_inverse=True)
    area, number = roc_auc(positive, values), int(cluster.max(initial=-1)) + 1
    if math.isnan(area) or number < 2:
        return Interval(math.nan, math.nan)
    ranks, added = _ranks(values), np.empty(values.size)
    for own in (positive, ~positive):
        beaten = (ranks[own] - _ranks(values[own])) / (~own).sum()  # of the other class, by each of this one
        added[own] = ((beaten if own is positive else 1 - beaten) - area) / own.sum()
    error = math.sqrt(number / (number - 1) * (np.bincount(cluster, added) ** 2).sum())
    return Interval(max(0.0, auc - Z95 * error), min(1.0, auc + Z95 * error))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 1; ties share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


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
