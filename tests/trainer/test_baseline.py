"""The position baseline: what it removes, and what it leaves."""

from __future__ import annotations

import numpy as np
import pytest

from mmrpt.masking import subtract_position_baseline
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


def test_place_alone_leaves_nothing():
    corrected = subtract_position_baseline(corpus(effect=0.0), window=1)
    assert max(abs(m) for s in corrected for m in s.token_masses) < 1e-12


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
        assert score.score == pytest.approx(np.mean(score.token_masses))
    assert np.mean([m for s in corrected for m in s.token_masses]) == pytest.approx(0.0, abs=1e-12)
    assert subtract_position_baseline([]) == []
