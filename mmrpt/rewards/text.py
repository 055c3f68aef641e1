"""Reading a completion: its answer, its form, and text brought to one spelling before it is compared."""

from __future__ import annotations

import re
from typing import Any

_FORM = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_MARKS = ("<think>", "</think>", "<answer>", "</answer>")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*", re.UNICODE)


def completion_text(completion: Any) -> str:
    """The text of a completion, given as a string or as chat messages (TRL's conversational form)."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion if message.get("role", "assistant") == "assistant")


def is_well_formed(text: str) -> bool:
    """True for exactly one <think>...</think><answer>...</answer> with nothing around it and an answer inside."""
    match = _FORM.fullmatch(text)
    return bool(match and match["answer"].strip() and all(text.count(mark) == 1 for mark in _MARKS))


def extract_answer(text: str) -> str | None:
    """The text between <answer> and </answer>; None where the completion does not have the form."""
    match = _FORM.fullmatch(text)
    return match["answer"].strip() if match and is_well_formed(text) else None


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation: what two answers are compared by."""
    return tuple(_WORD.findall(text.casefold()))
