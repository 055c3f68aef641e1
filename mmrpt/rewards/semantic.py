"""Meaning beyond spelling, without being fooled: attributes must agree before anything else counts.

Sentence embeddings rate a wrong colour, count or side about as high as a right paraphrase, so they cannot carry a
reward by themselves. Here the words of a span are sorted into slots (colour, count, side, relation, and the rest);
an answer with another value in any slot earns nothing, and otherwise it earns the F1 of its words after numbers,
articles and plurals are brought to one form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmrpt.masking.words import COLOURS, DEPTHS, NUMBERS, RELATIONS, SIDES, SYNONYMS
from mmrpt.rewards.text import completion_text, extract_answer, words_of

ARTICLES = frozenset({"a", "an", "the"})


def semantic_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """F1 of the words of answer and span in [0, 1]; 0.0 when an attribute of the span is missing or contradicted."""
    return [similarity(extract_answer(completion_text(c)), t) for c, t in zip(completions, answer, strict=True)]


def similarity(given: str | None, truth: str) -> float:
    """Attribute-aware similarity of two short texts, in [0, 1]; symmetric in everything but the missing answer."""
    if given is None:
        return 0.0
    a, b = _normal(given), _normal(truth)
    if not a or not b or _slots(a) != _slots(b):
        return 0.0
    left = list(a)
    common = 0
    for word in b:
        if word in left:
            left.remove(word)
            common += 1
    return 2 * common / (len(a) + len(b))


def _normal(text: str) -> tuple[str, ...]:
    words = [SYNONYMS.get(word, word) for word in words_of(text) if word not in ARTICLES]
    return tuple(str(NUMBERS[word]) if word in NUMBERS else _singular(word) for word in words)


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _slots(words: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The values of each attribute, in order: colours, numbers, sides, relations."""
    return (
        tuple(sorted(w for w in words if w in COLOURS)),
        tuple(w for w in words if w.isdigit()),
        tuple(sorted(w for w in words if w in SIDES | DEPTHS)),
        tuple(w for w in words if w in RELATIONS),
    )
