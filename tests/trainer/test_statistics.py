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


def test_auc_interval_has_the_spread_of_exponential_scores() -> None:
    # Hanley and McNeil's variance is exact for exponential scores: area = scale / (1 + scale).
    rng, scale, positives, negatives, trials = np.random.default_rng(5), 4.0, 30, 50, 20_000
    above = rng.exponential(scale, (trials, positives))
    below = np.sort(rng.exponential(1.0, (trials, negatives)), axis=1)
    wins = [np.searchsorted(low, high).sum() for low, high in zip(below, above, strict=True)]
    areas = np.array(wins) / (positives * negatives)
    low, high = auc_interval(0.8, positives, negatives)
    assert (high - low) / (2 * Z95) == pytest.approx(areas.std(), rel=0.02)  # standard error of a std of 20,000: 0.5 %
    assert auc_interval(1.0, 5, 5) == (1.0, 1.0) and auc_interval(0.95, 3, 3).high == 1.0
    assert all(math.isnan(end) for end in auc_interval(math.nan, 3, 0))


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
        (lambda: moving_average([1.0, 2.0], 2), "odd"),
    ],
)
def test_refusals_say_what_was_expected(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
