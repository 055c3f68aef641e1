"""The weighted sum of reward terms, with each term kept for the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from mmrpt.rewards.custom import RewardFunction, results_of
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
    weights: Mapping[str, float],
    completions: Sequence[Any],
    custom: Mapping[str, RewardFunction] | None = None,
    /,
    **columns: Any,
) -> tuple[list[float], dict[str, list[float | None]]]:
    """(total per completion, each term per completion). Terms of weight 0 are computed too: they are metrics.

    `custom`: terms besides the built-in ones, sync or async. Where such a term is None it does not apply and adds
    nothing. `columns` as TRL gives them, one entry a completion; `id`, where there is one, names samples in errors.
    Raises ValueError for a term that does not exist, gives another number of values, or a value that is not finite.
    """
    functions = REWARDS | dict(custom or {})
    unknown = set(weights) - set(functions)
    if unknown:
        raise ValueError(f"unknown reward terms {sorted(unknown)}: expected some of {sorted(functions)}.")
    terms = results_of({name: functions[name](completions=completions, **columns) for name in weights})
    for name, values in terms.items():
        _check_term(name, values, completions, columns.get("id"), may_be_none=name not in REWARDS)
    totals = [
        sum(weights[name] * terms[name][i] for name in weights if terms[name][i] is not None)
        for i in range(len(completions))
    ]
    return totals, terms


def _check_term(
    name: str, values: Any, completions: Sequence[Any], ids: Sequence[str] | None, *, may_be_none: bool
) -> None:
    if not hasattr(values, "__len__"):
        raise ValueError(f"reward term {name!r} gave {values!r}: expected a list, one value for each completion.")
    if len(values) != len(completions):
        raise ValueError(
            f"reward term {name!r} gave {len(values)} values for {len(completions)} completions: expected one for "
            "each, in their order."
        )
    cannot_judge = "None" if may_be_none else "0.0"
    for i, value in enumerate(values):
        if value is None and may_be_none:
            continue
        if not isinstance(value, Real) or not math.isfinite(value):
            sample = f"completion {i}" if ids is None else f"sample {ids[i]}"
            raise ValueError(
                f"reward term {name!r} is {value!r} for {sample}, which begins "
                f"{completion_text(completions[i])[:SHOWN_CHARACTERS]!r}: expected a finite number. Call the reward on "
                f"this completion alone to see why; where it cannot judge, it should give {cannot_judge}."
            )
