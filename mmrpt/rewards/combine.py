"""The weighted sum of reward terms, with each term kept for the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from mmrpt.rewards.exact import exact_reward
from mmrpt.rewards.format import format_reward
from mmrpt.rewards.prefix import prefix_reward
from mmrpt.rewards.semantic import semantic_reward
from mmrpt.rewards.text import completion_text

REWARDS: dict[str, Callable[..., list[float]]] = {
    "format": format_reward,
    "exact": exact_reward,
    "prefix": prefix_reward,
    "semantic": semantic_reward,
}
SHOWN_CHARACTERS = 80  # of a completion, in an error


def combine_rewards(
    weights: Mapping[str, float], completions: Sequence[Any], **columns: Any
) -> tuple[list[float], dict[str, list[float]]]:
    """(total per completion, each term per completion). Terms of weight 0 are computed too: they are metrics.

    `columns` as TRL gives them, one entry a completion; `id`, where there is one, names samples in errors.
    Raises ValueError for a term that does not exist, gives another number of values, or a value that is not finite.
    """
    unknown = set(weights) - set(REWARDS)
    if unknown:
        raise ValueError(f"unknown reward terms {sorted(unknown)}: expected some of {sorted(REWARDS)}.")
    terms = {name: REWARDS[name](completions, **columns) for name in weights}
    for name, values in terms.items():
        _check_term(name, values, completions, columns.get("id"))
    totals = [sum(weights[name] * terms[name][i] for name in weights) for i in range(len(completions))]
    return totals, terms


def _check_term(name: str, values: Sequence[Any], completions: Sequence[Any], ids: Sequence[str] | None) -> None:
    if len(values) != len(completions):
        raise ValueError(
            f"reward term {name!r} gave {len(values)} values for {len(completions)} completions: expected one for "
            "each, in their order."
        )
    for i, value in enumerate(values):
        if not isinstance(value, Real) or not math.isfinite(value):
            sample = f"completion {i}" if ids is None else f"sample {ids[i]}"
            raise ValueError(
                f"reward term {name!r} is {value!r} for {sample}, which begins "
                f"{completion_text(completions[i])[:SHOWN_CHARACTERS]!r}: expected a finite number. Call the reward on "
                "this completion alone to see why; where it cannot judge, it should give 0.0."
            )
