"""More than twice as many steps: does the reward go on rising while the answers get no better?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mmrpt.experiments.arms import NO_CONTROL, Arm, Experiment, logged_steps

if TYPE_CHECKING:
    from mmrpt.engines.run import Run

WINDOW = 50  # steps
WATCHED = {
    "reward": "mean reward of sampled answers",
    "accuracy": "share of right answers among them",
    "format": "share of well-formed answers",
    "response_length": "tokens of an answer",
    "entropy_mean": "entropy of an answer's tokens (nats)",
}


def course(run: Run, arm: Arm) -> dict[str, Any]:
    """Means of what RL logged, over windows of its steps; a step without rounds of its own logs no reward."""
    rows = logged_steps(run, arm)
    found: dict[str, dict[str, float]] = {}
    for first in range(0, len(rows), WINDOW):
        window = rows[first : first + WINDOW]
        place = f"steps {first + 1} to {first + len(window)}"
        for key, name in WATCHED.items():
            values = [row[key] for row in window if math.isfinite(row.get(key, math.nan))]
            if values:
                found.setdefault(name, {})[place] = sum(values) / len(values)
    return found


LONG = Experiment(
    name="long",
    question="Does RL of 400 steps still gain on held-out pairs, or does it only learn to please the reward?",
    base=NO_CONTROL,
    arms=(
        Arm("warm start", ("rl.steps=170",), model="warmup"),
        Arm("170 steps", ("rl.steps=170",)),
        Arm("400 steps", ("rl.steps=400",)),
    ),
    baseline="170 steps",
    measure=course,
)
