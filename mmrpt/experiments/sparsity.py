"""Is token perception sparse, and do responses differ in it? VPPO's two observations, counted in a run's RL."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from mmrpt.experiments.arms import NO_CONTROL, Arm, Experiment

if TYPE_CHECKING:
    from mmrpt.engines.run import Run


def share_that_holds(values: ArrayLike, of_sum: float) -> float:
    """The smallest share of the values (N,), all >= 0, that adds up to `of_sum` of their sum; NaN where that is 0."""
    largest_first = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    if not largest_first.sum() > 0:
        return float("nan")
    reached = np.cumsum(largest_first) >= of_sum * largest_first.sum() * (1 - 1e-12)  # the sums round
    return float((np.argmax(reached) + 1) / largest_first.size)


def gini(values: ArrayLike) -> float:
    """Gini's coefficient of values (N,) >= 0: 0 where all are equal, 1 - 1/N where one holds everything."""
    ascending = np.sort(np.asarray(values, dtype=np.float64))
    ranks = np.arange(1, ascending.size + 1)
    total = ascending.size * ascending.sum()
    return float(((2 * ranks - ascending.size - 1) * ascending).sum() / total) if total > 0 else float("nan")


def within_groups(groups: ArrayLike) -> float:
    """Of the variance of values (G, n), the share that lies within the groups."""
    values = np.asarray(groups, dtype=np.float64)
    return float(values.var(axis=1).mean() / values.var()) if values.var() > 0 else float("nan")


def perception(run: Run, arm: Arm) -> dict[str, Any]:
    """Of RL's steps, with token_scores a part of each step's tokens, evenly spaced."""
    from mmrpt.corpus import read_jsonl

    if arm.model == "warmup":
        return {}
    rows = read_jsonl(run.folder / "perception.jsonl")
    tokens = np.array([value for row in rows for value in row["token_scores"]])
    responses = np.array([value for row in rows for value in row["trajectory_scores"]])
    low, high = np.quantile(responses, (0.1, 0.9))
    mean = responses.mean() or math.nan  # ratios to nothing are left out
    found = {
        "tokens seen": tokens.size,
        "share of tokens that holds 80 % of the sum": share_that_holds(tokens, 0.8),
        "Gini of tokens": gini(tokens),
        "responses": responses.size,
        "standard deviation over mean of responses": responses.std() / mean,
        "90th over 10th percentile of responses": high / (low or math.nan),
        "share of the responses' variance within a group": within_groups(
            responses.reshape(-1, run.settings.rollout.group_size)
        ),
    }
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


SPARSITY = Experiment(
    name="sparsity",
    question="Do few tokens hold most of the perception, and do responses differ in theirs, as VPPO observes?",
    base=NO_CONTROL,
    arms=(Arm("warm start", model="warmup"), Arm("RL")),
    baseline="warm start",
    measure=perception,
)
