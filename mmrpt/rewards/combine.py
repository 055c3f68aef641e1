"""The weighted sum of reward terms, with each term kept for the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmrpt.rewards.exact import exact_reward
from mmrpt.rewards.format import format_reward
from mmrpt.rewards.prefix import prefix_reward
from mmrpt.rewards.semantic import semantic_reward

REWARDS: dict[str, Callable[..., list[float]]] = {
    "format": format_reward,
    "exact": exact_reward,
    "prefix": prefix_reward,
    "semantic": semantic_reward,
}


def combine_rewards(
    weights: Mapping[str, float], completions: Sequence[Any], **columns: Any
) -> tuple[list[float], dict[str, list[float]]]:
    """(total per completion, each term per completion). Terms of weight 0 are computed too: they are metrics.

    Raises ValueError for a term that does not exist.
    """
    unknown = set(weights) - set(REWARDS)
    if unknown:
        raise ValueError(f"unknown reward terms {sorted(unknown)}: expected some of {sorted(REWARDS)}.")
    terms = {name: REWARDS[name](completions, **columns) for name in weights}
    totals = [sum(weights[name] * terms[name][i] for name in weights) for i in range(len(completions))]
    return totals, terms
