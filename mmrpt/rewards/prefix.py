"""Strict prefix match: part of a longer span, restored from its start and nothing wrong after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmrpt.rewards.text import completion_text, extract_answer, words_of


def prefix_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """The share of the span's words that the answer gives, where the answer is a strict prefix of the span; else 0.0.

    The whole span earns nothing here: that is `exact_reward`'s. An answer that goes on past the span earns nothing, so
    listing guesses never pays.
    """
    return [_share(completion_text(c), truth) for c, truth in zip(completions, answer, strict=True)]


def _share(completion: str, truth: str) -> float:
    given, wanted = words_of(extract_answer(completion) or ""), words_of(truth)
    if not given or len(given) >= len(wanted) or wanted[: len(given)] != given:
        return 0.0
    return len(given) / len(wanted)
