"""Exact restoration of the masked span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmrpt.rewards.text import completion_text, extract_answer, words_of


def exact_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the answer's words are the masked span's words in their order (case and punctuation aside), else 0.0.

    `answer` is the column of masked spans, one per completion.
    """
    return [float(is_exact(completion_text(c), truth)) for c, truth in zip(completions, answer, strict=True)]


def is_exact(completion: str, truth: str) -> bool:
    """Whether a well-formed completion restores the span word for word."""
    given = extract_answer(completion)
    return given is not None and words_of(given) == words_of(truth) != ()
