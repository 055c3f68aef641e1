"""Statistics of a run: intervals, AUC, shares, spread over seeds. NumPy in, floats out, no gradients.

Undefined results (an AUC of one class, a share of nothing) are NaN, so that a report shows a gap, not a zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

NAN = float("nan")


class Interval(NamedTuple):
    """Both ends included."""

    low: float
    high: float


class Spread(NamedTuple):
    """What a number did over seeds. `std` is the sample standard deviation (n - 1), NaN for a single value."""

    mean: float
    std: float
    low: float
    high: float
    count: int


def wilson_interval(successes: float, count: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a binomial proportion (Wilson 1927): never leaves [0, 1], sound at 0 and at `count`.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). A count of zero gives [0, 1]: nothing is known.
    Raises ValueError for successes outside [0, count] or a level outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}, expected a number between 0 and 1, such as 0.95")
    if count < 0 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count}: expected 0 <= successes <= count; pass counts, not rates")
    if count == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / count
    middle = rate + z * z / (2 * count)
    reach = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low = 0.0 if successes == 0 else max(0.0, (middle - reach) / scale)
    high = 1.0 if successes == count else min(1.0, (middle + reach) / scale)
    return Interval(low, high)


def difference_interval(
    successes_a: float, count_a: int, successes_b: float, count_b: int, level: float = 0.95
) -> Interval:
    """Interval of rate a - rate b, the two samples taken as independent (Newcombe 1998, method 10, from two Wilsons).

    Where both rates come from the same questions it is wider than a paired interval would be: the cautious side.
    A count of zero on either side gives [-1, 1].
    """
    if count_a == 0 or count_b == 0:
        return Interval(-1.0, 1.0)
    low_a, high_a = wilson_interval(successes_a, count_a, level)
    low_b, high_b = wilson_interval(successes_b, count_b, level)
    rate_a, rate_b = successes_a / count_a, successes_b / count_b
    difference = rate_a - rate_b
    return Interval(
        difference - math.hypot(rate_a - low_a, high_b - rate_b),
        difference + math.hypot(high_a - rate_a, rate_b - low_b),
    )


def paired_difference_interval(only_a: int, only_b: int, count: int, level: float = 0.95) -> Interval:
    """Interval of rate a - rate b where both answered the same `count` questions (Agresti and Min 2005).

    `only_a` of them only a got right, `only_b` only b; what both got right or wrong says nothing about the difference.
    Wald's interval after half a question is added to each of the four cells:
    d = (only_a - only_b) / (n + 2), d +- z sqrt((only_a + only_b + 1) - (only_a - only_b)^2 / (n + 2)) / (n + 2).
    """
    if only_a < 0 or only_b < 0 or only_a + only_b > count:
        raise ValueError(
            f"{only_a} and {only_b} of {count} questions: expected counts >= 0 with a sum of at most count"
        )
    if count == 0:
        return Interval(-1.0, 1.0)
    larger = count + 2
    middle = (only_a - only_b) / larger
    variance = (only_a + only_b + 1) - (only_a - only_b) ** 2 / larger
    reach = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt(variance) / larger
    return Interval(max(-1.0, middle - reach), min(1.0, middle + reach))


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """P(score of a positive > score of a negative) + P(equal) / 2, by average ranks (Mann-Whitney U / (P N)).

    labels (N,) bool or 0 and 1, first as in scikit-learn; scores (N,) finite. NaN when one class is absent. Raises
    ValueError for unequal lengths, labels of any other value (the two swapped, say), or a score that is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    given = np.asarray(labels)
    if not np.isin(given, (0, 1)).all():
        raise ValueError("labels hold values beside 0 and 1: the labels come first, then the scores")
    positive = given.astype(bool)
    if values.ndim != 1 or values.shape != positive.shape:
        raise ValueError(f"scores are {values.shape} and labels {positive.shape}: expected the same (N,)")
    if not np.isfinite(values).all():
        raise ValueError("scores hold NaN or infinity, which have no rank: drop those rows with their labels first")
    num_positive = int(positive.sum())
    num_negative = positive.size - num_positive
    if num_positive == 0 or num_negative == 0:
        return NAN
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    ranks = (last_rank - (counts - 1) / 2)[place]  # ties share the mean of their ranks
    u = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(u / (num_positive * num_negative))


def auc_interval(auc: float, num_positive: int, num_negative: int, level: float = 0.95) -> Interval:
    """Normal interval of an AUC, clipped to [0, 1] (Hanley and McNeil 1982); NaN ends for a NaN AUC or a lone class."""
    if math.isnan(auc) or num_positive == 0 or num_negative == 0:
        return Interval(NAN, NAN)
    two_positives = auc / (2 - auc)  # P(two random positives both beat a negative), for exponential scores
    two_negatives = 2 * auc * auc / (1 + auc)
    variance = auc * (1 - auc) + (num_positive - 1) * (two_positives - auc**2)
    variance = (variance + (num_negative - 1) * (two_negatives - auc**2)) / (num_positive * num_negative)
    reach = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt(max(variance, 0.0))
    return Interval(max(0.0, auc - reach), min(1.0, auc + reach))


def concentration_curve(values: ArrayLike) -> NDArray[np.float64]:
    """(N + 1,) share of the total carried by the n largest of N values, n = 0..N. NaN throughout when the total is 0.

    Raises ValueError for negative or non-finite values: a share of a signed total means nothing.
    """
    amounts = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(amounts).all() or (amounts < 0).any():
        raise ValueError("a share needs finite values >= 0: drop NaN and infinity and clamp rounding below zero first")
    largest_first = np.sort(amounts)[::-1]
    total = np.concatenate([[0.0], np.cumsum(largest_first)])
    if total[-1] == 0.0:
        return np.full(amounts.size + 1, NAN)
    return total / total[-1]


def top_share(values: ArrayLike, fraction: float) -> float:
    """Share of the total carried by the ceil(fraction * N) largest of N values (N,) >= 0; NaN when the total is 0."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, expected 0 < fraction <= 1, such as 0.2 for the top 20 %")
    curve = concentration_curve(values)
    number = math.ceil(fraction * (curve.size - 1) - 1e-9)  # 0.2 * 15 is 3.0000000000000004: three, not four
    return float(curve[number]) if curve.size > 1 else NAN


def mean_and_spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation, smallest and largest of the finite values; all NaN when there are none."""
    finite = np.asarray([value for value in values if math.isfinite(value)], dtype=np.float64)
    if finite.size == 0:
        return Spread(NAN, NAN, NAN, NAN, 0)
    std = float(finite.std(ddof=1)) if finite.size > 1 else NAN
    return Spread(float(finite.mean()), std, float(finite.min()), float(finite.max()), int(finite.size))


def moving_average(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """Centred mean over `window` (odd) neighbours of values (N,); the window shrinks at the ends and skips NaN."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}, expected an odd number >= 1 so that the mean is centred")
    series = np.asarray(values, dtype=np.float64)
    if series.size == 0:
        return series
    known = np.isfinite(series)
    half = window // 2

    def windowed_sum(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.lib.stride_tricks.sliding_window_view(np.pad(numbers, half), window).sum(axis=1)

    number = windowed_sum(known.astype(np.float64))
    total = windowed_sum(np.where(known, series, 0.0))
    return np.where(number > 0, total / np.maximum(number, 1.0), NAN)
