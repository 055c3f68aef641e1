"""The position baseline: what it removes, and what it leaves."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest

from mmrpt.masking.baseline import PositionBaseline
from mmrpt.types import SentenceScore


def corpus(effect: float, captions: int = 200, seed: int = 0) -> list[SentenceScore]:
    """Two to four sentences of 5 tokens; mass falls with the place and rises by `effect` in sentences that look."""
    rng = np.random.default_rng(seed)
    scores = []
    for c in range(captions):
        for s in range(rng.integers(2, 5)):
            looks = bool(rng.integers(2))
            place = np.arange(5 * s, 5 * s + 5)
            masses = 16 / (17 + place) + effect * looks
            spans = tuple((int(p), int(p) + 1) for p in place)
            mean = float(masses.mean())
            scores.append(SentenceScore(str(c), s, 5 * s, 5 * s + 5, mean, spans, tuple(masses.tolist()), looks))
    return scores


def subtract_position_baseline(scores: list[SentenceScore], window: int = 7) -> list[SentenceScore]:
    baseline = PositionBaseline(window)
    captions = [list(group) for _, group in groupby(scores, key=lambda score: score.example_id)]
    for caption in captions:
        baseline.add(caption, [True] * len(caption))
    return [score for caption in captions for score in baseline.subtract(caption)]


def test_place_alone_leaves_nothing():
    corrected = subtract_position_baseline(corpus(effect=0.0), window=1)
    assert max(abs(m) for s in corrected for m in s.token_scores) < 1e-12


def test_what_looks_more_than_its_place_stands_out_whatever_its_place():
    raw = corpus(effect=0.1)
    corrected = subtract_position_baseline(raw)
    looking = [s.score for s in corrected if s.needs_image]
    other = [s.score for s in corrected if not s.needs_image]
    assert min(looking) > max(other)
    assert min(s.score for s in raw if s.needs_image) < max(s.score for s in raw if not s.needs_image)


def test_scores_are_means_of_the_corrected_masses_and_average_to_zero():
    corrected = subtract_position_baseline(corpus(effect=0.2, seed=3), window=1)
    for score in corrected:
        assert score.score == pytest.approx(np.mean(score.token_scores))
    assert np.mean([m for s in corrected for m in s.token_scores]) == pytest.approx(0.0, abs=1e-12)


def test_sentences_that_do_not_count_take_their_places_and_add_nothing():
    scores = corpus(effect=0.0, captions=50)
    captions = [list(group) for _, group in groupby(scores, key=lambda score: score.example_id)]
    baseline, other = PositionBaseline(window=1), PositionBaseline(window=1)
    for caption in captions:
        odd = replace(caption[0], token_scores=(9.0,) * 5)
        baseline.add(caption, [True] * len(caption))
        other.add([odd, *caption[1:]], [False] + [True] * (len(caption) - 1))
    # From the second sentence on the sums are those of the captions as they were; the first places were never added.
    masses = [[m for s in b.subtract(captions[0])[1:] for m in s.token_scores] for b in (baseline, other)]
    assert masses[0] == masses[1] and max(map(abs, masses[0])) < 1e-12
    assert other.subtract(captions[0])[0].token_scores == captions[0][0].token_scores
    longer = replace(scores[0], token_scores=(0.25,) * 40, token_spans=((0, 1),) * 40)
    (found,) = baseline.subtract([longer])  # places that no caption reached take the last known mean
    assert found.token_scores[-1] == pytest.approx(0.25 - 16 / (17 + 19))
    assert PositionBaseline().subtract([longer])[0].token_scores == longer.token_scores
