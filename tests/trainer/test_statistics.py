"""Statistics against their definitions, spelled out slowly, and against published worked examples."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrpt.report.statistics import (
    auc_interval,
    moving_average,
    paired_difference_interval,
    paired_ratio_interval,
    roc_auc,
    wilson_interval,
)

Z95 = statistics.NormalDist().inv_cdf(0.975)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=50))
@settings(max_examples=200, deadline=None)
def test_auc_counts_pairs_and_half_of_the_ties(rows: list[tuple[int, bool]]) -> None:
    scores, labels = [float(score) for score, _ in rows], [label for _, label in rows]
    pairs = [(a, b) for (a, is_a), (b, is_b) in product(rows, rows) if is_a and not is_b]
    if not pairs:
        assert math.isnan(roc_auc(labels, scores))
        return
    wins = sum(Fraction(1) if a > b else Fraction(1, 2) if a == b else Fraction(0) for a, b in pairs)
    expected = float(wins / len(pairs))
    assert roc_auc(labels, scores) == pytest.approx(expected, abs=1e-12)
    assert roc_auc([not label for label in labels], scores) == pytest.approx(1 - expected, abs=1e-12)


def test_auc_interval_sums_what_each_cluster_adds() -> None:
    rows = [(1, 0.9, "a"), (0, 0.4, "a"), (1, 0.4, "b"), (0, 0.1, "b"), (0, 0.5, "c"), (1, 0.8, "c"), (0, 0.2, "d")]

    def beats(high: float, low: float) -> float:
        return float(high > low) + (high == low) / 2

    positives, negatives = ([row for row in rows if row[0] == label] for label in (1, 0))
    auc = sum(beats(p[1], n[1]) for p in positives for n in negatives) / 12
    error = 0.0
    for cluster in "abcd":
        own = sum(sum(beats(p[1], n[1]) for n in negatives) / 4 - auc for p in positives if p[2] == cluster) / 3
        own += sum(sum(beats(p[1], n[1]) for p in positives) / 3 - auc for n in negatives if n[2] == cluster) / 4
        error += own**2 * 4 / 3
    low, high = auc_interval(0.5, *zip(*rows, strict=True))
    assert (low, high) == pytest.approx((0.5 - Z95 * math.sqrt(error), 0.5 + Z95 * math.sqrt(error)), abs=1e-12)
    assert auc_interval(1.0, [1, 0, 1], [0.9, 0.1, 0.8], [0, 1, 2]) == (1.0, 1.0)
    for labels, clusters in (([1, 1, 1], [0, 1, 2]), ([1, 0, 1], [0, 0, 0]), ([], [])):
        assert all(math.isnan(end) for end in auc_interval(0.7, labels, [0.5] * len(labels), clusters))


def test_auc_interval_covers_the_truth_also_where_rows_of_a_cluster_agree() -> None:
    """A shift of each cluster's scores, and classes that clusters hold in different shares: taken for independent, as
    many rows give an interval that is far too short."""
    rng, trials, clusters, rows = np.random.default_rng(5), 400, 60, 12
    shares = rng.random((trials, clusters, 1))
    labels = rng.random((trials, clusters, rows)) < shares
    scores = labels + rng.standard_normal((trials, clusters, rows)) + rng.standard_normal((trials, clusters, 1))
    truth = statistics.NormalDist().cdf(1 / 2)  # P(N(1, 2) > N(0, 2))
    names = np.repeat(np.arange(clusters), rows)
    covered = {"clustered": 0, "independent": 0}
    for one, values in zip(labels.reshape(trials, -1), scores.reshape(trials, -1), strict=True):
        auc = roc_auc(one, values)
        for how, by in (("clustered", names), ("independent", np.arange(names.size))):
            low, high = auc_interval(auc, one, values, by)
            covered[how] += low <= truth <= high
    assert 0.91 <= covered["clustered"] / trials <= 0.98, covered  # sampling error 0.011
    assert covered["independent"] / trials < 0.85, covered


@given(st.integers(1, 500), st.data())
@settings(max_examples=200, deadline=None)
def test_wilson_ends_are_where_the_score_test_turns(count: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, count))
    low, high = wilson_interval(successes, count)
    rate = successes / count
    assert 0 <= low <= rate <= high <= 1
    for end, at_edge in ((low, successes == 0), (high, successes == count)):
        if not at_edge:  # |rate - end| is exactly z standard errors under the hypothesis that end is the truth
            assert abs(rate - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / count), rel=1e-9)


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, count, trials = np.random.default_rng(11), 150, 3000
    # Both right, only a, only b, neither: a difference of 0.08 between strongly related answers.
    cells = rng.multinomial(count, [0.4, 0.16, 0.08, 0.36], size=trials)
    ends = [paired_difference_interval(np.repeat([0, 1, -1, 0], cell)) for cell in cells]
    covered = sum(low <= 0.08 <= high for low, high in ends) / trials
    assert 0.935 <= covered <= 0.975, f"{covered} of the 95 % intervals hold the truth (sampling error 0.004)"
    gaps = rng.choice([-2, -1, 0, 1, 2], size=(trials, count), p=[0.05, 0.15, 0.4, 0.25, 0.15])  # mean 0.3
    ends = [paired_difference_interval(one, bound=2) for one in gaps]
    covered = sum(low <= 0.3 <= high for low, high in ends) / trials
    assert 0.935 <= covered <= 0.965


def test_paired_interval_is_agresti_and_mins() -> None:
    only_a, only_b, count = 7, 3, 40
    larger, difference = count + 2, only_a - only_b
    reach = Z95 * math.sqrt((only_a + only_b + 1) - difference**2 / larger) / larger
    differences = [1] * only_a + [-1] * only_b + [0] * (count - only_a - only_b)
    found = paired_difference_interval(differences)
    assert found == pytest.approx((difference / larger - reach, difference / larger + reach))
    assert paired_difference_interval([]) == (-1.0, 1.0) and paired_difference_interval([1, 1]).high == 1.0


def test_ratio_interval_is_bonett_and_prices() -> None:
    """Its steps with the numbers put in: 9 right under both, 3 under the first alone, 18 under the second alone."""
    pairs, first, second = [(1, 1)] * 9 + [(1, 0)] * 3 + [(0, 1)] * 18 + [(0, 0)] * 70, 12, 27
    z = Z95 * math.sqrt((3 + 18 + 2) / (13 * 28)) / (math.sqrt((1 - 13 / 32) / 13) + math.sqrt((1 - 28 / 32) / 28))

    def roots(right: int) -> list[float]:  # of (rate - p)^2 = z^2 p (1 - p) / 30
        return sorted(np.roots([1 + z * z / 30, -(2 * right / 30 + z * z / 30), (right / 30) ** 2]).real)

    low, high = paired_ratio_interval(*zip(*pairs, strict=True))
    assert low == pytest.approx(roots(first)[0] / roots(second)[1])
    assert high == pytest.approx(roots(first)[1] / roots(second)[0])
    assert low < first / second < high
    assert paired_ratio_interval([1, 0], [0, 0]) == (0.0, math.inf)
    assert paired_ratio_interval([0] * 40, [1] * 10 + [0] * 30).low == 0.0


@pytest.mark.parametrize("cells", [[0.15, 0.05, 0.35, 0.45], [0.01, 0.02, 0.37, 0.6], [0.2, 0.15, 0.1, 0.55]])
def test_ratio_interval_covers_the_truth_as_often_as_it_says(cells: list[float]) -> None:
    rng, trials = np.random.default_rng(3), 2000
    truth = (cells[0] + cells[1]) / (cells[0] + cells[2])
    covered = 0
    for counts in rng.multinomial(150, cells, size=trials):
        low, high = paired_ratio_interval(np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts))
        covered += low <= truth <= high
    assert 0.93 <= covered / trials <= 0.985, f"{covered / trials} (sampling error 0.005)"


@given(st.lists(st.floats(-10, 10) | st.just(math.nan), max_size=30), st.sampled_from([1, 3, 5, 9]))
@settings(max_examples=100, deadline=None)
def test_moving_average_by_hand(values: list[float], window: int) -> None:
    smooth = moving_average(values, window)
    assert smooth.shape == (len(values),)
    for i, got in enumerate(smooth):
        near = [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if math.isfinite(v)]
        assert math.isnan(got) if not near else got == pytest.approx(statistics.fmean(near), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: roc_auc([True, False], [0.1, math.nan]), "NaN"),
        (lambda: roc_auc([True], [0.1, 0.2]), "same"),
        (lambda: roc_auc([0.1, 0.2], [True, False]), "labels come first"),
        (lambda: wilson_interval(5, 4), "counts, not rates"),
        (lambda: paired_difference_interval([2, 0]), "one difference"),
        (lambda: paired_ratio_interval([0.5], [1]), "pass no rates"),
        (lambda: paired_ratio_interval([1, 0], [1]), "same questions"),
        (lambda: moving_average([1.0, 2.0], 2), "odd"),
    ],
)
def test_refusals_say_what_was_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
