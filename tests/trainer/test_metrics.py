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

from mmrpt.metrics import (
    auc_interval,
    concentration_curve,
    difference_interval,
    mean_and_spread,
    moving_average,
    paired_difference_interval,
    roc_auc,
    top_share,
    wilson_interval,
)

Z95 = statistics.NormalDist().inv_cdf(0.975)
amounts = st.lists(st.integers(0, 50), min_size=1, max_size=60)


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
    assert roc_auc(labels, np.exp(scores)) == pytest.approx(expected, abs=1e-12), "only the order counts"
    assert roc_auc([not label for label in labels], scores) == pytest.approx(1 - expected, abs=1e-12)


def test_auc_refuses_what_has_no_rank() -> None:
    with pytest.raises(ValueError, match="NaN"):
        roc_auc([True, False], [0.1, math.nan])
    with pytest.raises(ValueError, match="same"):
        roc_auc([True], [0.1, 0.2])
    with pytest.raises(ValueError, match="labels come first"):
        roc_auc([0.1, 0.2], [True, False])


def test_auc_interval_has_the_spread_of_exponential_scores() -> None:
    # Hanley and McNeil's variance is exact for exponential scores: area = scale / (1 + scale).
    rng, scale, positives, negatives, trials = np.random.default_rng(5), 4.0, 30, 50, 20_000
    above = rng.exponential(scale, (trials, positives))
    below = np.sort(rng.exponential(1.0, (trials, negatives)), axis=1)
    wins = [np.searchsorted(low, high).sum() for low, high in zip(below, above, strict=True)]
    areas = np.array(wins) / (positives * negatives)
    assert areas.mean() == pytest.approx(0.8, abs=0.002)
    low, high = auc_interval(0.8, positives, negatives)
    assert (high - low) / (2 * Z95) == pytest.approx(areas.std(), rel=0.02)  # standard error of a std of 20,000: 0.5 %


def test_auc_interval_of_nothing_and_at_the_end() -> None:
    assert all(math.isnan(end) for end in auc_interval(math.nan, 3, 0))
    assert auc_interval(1.0, 5, 5) == (1.0, 1.0)
    assert auc_interval(0.95, 3, 3).high == 1.0


@given(st.integers(1, 500), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
@settings(max_examples=200, deadline=None)
def test_wilson_ends_are_where_the_score_test_turns(count: int, data: st.DataObject, level: float) -> None:
    successes = data.draw(st.integers(0, count))
    low, high = wilson_interval(successes, count, level)
    rate, z = successes / count, statistics.NormalDist().inv_cdf(0.5 + level / 2)
    assert 0 <= low <= rate <= high <= 1
    for end, at_edge in ((low, successes == 0), (high, successes == count)):
        if not at_edge:  # |rate - end| is exactly z standard errors under the hypothesis that end is the truth
            assert abs(rate - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count), rel=1e-9)
    assert wilson_interval(count - successes, count, level) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_edges_and_refusals() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 20).low == 0.0
    assert wilson_interval(20, 20).high == 1.0
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    with pytest.raises(ValueError, match="counts, not rates"):
        wilson_interval(5, 4)
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 4, level=95)


def test_difference_interval_gives_newcombes_worked_example() -> None:
    # Newcombe 1998, table II, method 10: 56/70 against 48/80.
    assert difference_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    low, high = difference_interval(48, 80, 56, 70)
    assert (-high, -low) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference_interval(0, 0, 3, 4) == (-1.0, 1.0)


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, count, trials = np.random.default_rng(11), 150, 3000
    # Both right, only a, only b, neither: a difference of 0.08 between strongly related answers.
    cells = rng.multinomial(count, [0.4, 0.16, 0.08, 0.36], size=trials)
    ends = [paired_difference_interval(int(a), int(b), count) for _, a, b, _ in cells]
    covered = sum(low <= 0.08 <= high for low, high in ends) / trials
    assert 0.935 <= covered <= 0.975, f"{covered} of the 95 % intervals hold the truth (sampling error 0.004)"
    both, a, b, _ = (int(n) for n in cells[0])
    low, high = difference_interval(both + a, count, both + b, count)
    assert ends[0].high - ends[0].low < high - low, "the same questions tell more than independent ones"


def test_paired_interval_edges() -> None:
    assert paired_difference_interval(0, 0, 0) == (-1.0, 1.0)
    low, high = paired_difference_interval(3, 7, 40)
    assert paired_difference_interval(7, 3, 40) == pytest.approx((-high, -low))
    assert low < (3 - 7) / 40 < high
    with pytest.raises(ValueError, match="at most count"):
        paired_difference_interval(5, 6, 10)


@given(amounts, st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_top_share_adds_the_largest(values: list[int], hundredths: int) -> None:
    number = math.ceil(Fraction(hundredths, 100) * len(values))
    share = top_share(values, hundredths / 100)
    if sum(values) == 0:
        assert math.isnan(share)
        return
    assert share == pytest.approx(sum(sorted(values)[-number:]) / sum(values), abs=1e-12)


@given(amounts)
@settings(max_examples=100, deadline=None)
def test_concentration_rises_ever_more_slowly_to_one(values: list[int]) -> None:
    curve = concentration_curve(values)
    assert curve.shape == (len(values) + 1,)
    if sum(values) == 0:
        assert np.isnan(curve).all()
        return
    assert curve[0] == 0 and curve[-1] == 1
    steps = np.diff(curve)
    assert (steps >= 0).all() and (np.diff(steps) <= 1e-12).all()


def test_shares_refuse_signed_and_unknown_amounts() -> None:
    for bad in ([1.0, -0.5], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite values >= 0"):
            top_share(bad, 0.2)
    with pytest.raises(ValueError, match="fraction"):
        top_share([1.0], 20)
    assert math.isnan(top_share([], 0.2))


@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), max_size=12))
@settings(max_examples=100, deadline=None)
def test_spread_over_the_finite_values(values: list[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    spread = mean_and_spread(values)
    assert spread.count == len(finite)
    if not finite:
        assert math.isnan(spread.mean)
        return
    assert spread.mean == pytest.approx(statistics.fmean(finite), abs=1e-9)
    assert (spread.low, spread.high) == (min(finite), max(finite))
    if len(finite) == 1:
        assert math.isnan(spread.std), "one seed has no spread"
    else:
        assert spread.std == pytest.approx(statistics.stdev(finite), abs=1e-8)


@given(st.lists(st.floats(-10, 10) | st.just(math.nan), max_size=30), st.sampled_from([1, 3, 5, 9]))
@settings(max_examples=100, deadline=None)
def test_moving_average_by_hand(values: list[float], window: int) -> None:
    smooth = moving_average(values, window)
    assert smooth.shape == (len(values),)
    for i, got in enumerate(smooth):
        near = [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if math.isfinite(v)]
        assert math.isnan(got) if not near else got == pytest.approx(statistics.fmean(near), abs=1e-9)


def test_moving_average_wants_a_centre() -> None:
    with pytest.raises(ValueError, match="odd"):
        moving_average([1.0, 2.0], 2)
