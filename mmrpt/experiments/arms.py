"""What an experiment is: arms, each a run's settings and the phase of it whose answers count, and a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrpt.engines.run import Run

Rows = list[dict[str, Any]]
QUESTIONS = "evaluation.samples=450"  # of each held-out set: 1,350 of the drawn world
NO_CONTROL = (QUESTIONS, "control.kinds=[]")


@dataclass(frozen=True)
class Arm:
    """One row of the tables. Arms with the same overrides share one run, as a run's warm start, RL and controls do."""

    name: str  # in tables, plain words: "keep 20 %"
    overrides: tuple[str, ...] = ()  # settings beyond the experiment's base, as on the command line
    model: str = "rl"  # the phase whose answers are this arm's: "warmup", "rl" or a control's phase
    against: str | None = None  # name of the arm that this one is compared with; None: the experiment's baseline


def logged_steps(run: Run, arm: Arm) -> Rows:
    """What metrics.jsonl has of the steps of the arm's own phase; of the warm start, which is not measured, nothing."""
    from mmrpt.corpus import iter_jsonl

    if arm.model == "warmup":
        return []
    return [row for row in iter_jsonl(run.folder / "metrics.jsonl") if row["phase"] == arm.model]


@dataclass(frozen=True)
class Experiment:
    """`measure` gives further numbers of an arm from its finished run: {"Gini": 0.9} is a column of the tables, and
    {"reward": {"1 to 50": 0.2, "51 to 100": 0.3}} a row of a table of its own. It may load weights (`run.load`).

    `answer` gives what `mmrpt.held_out.evaluate_policy` returns of an arm's model, in the place of the run's own rows
    and answers (None: these): for other questions, or for a model that the run does not train."""

    name: str  # on the command line, of folders and files: "vppo"
    question: str  # one sentence
    arms: tuple[Arm, ...]
    baseline: str  # name of the arm that the others are compared with
    base: tuple[str, ...] = ()  # overrides of every arm
    measure: Callable[[Run, Arm], dict[str, Any]] | None = None
    answer: Callable[[Run, Arm], tuple[Rows, Rows] | None] | None = None
    requires: str | None = None  # package that must be installed besides, as PyPI names it
    compared: tuple[tuple[str, str], ...] = ()  # further pairs of arms, of which the first minus the second is shown
    method: str | None = None  # name of the arm from which every other is subtracted as well, as RL from its controls
    by_kind: bool = False  # also a table of accuracy by kind of the hidden word

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or any("," in name for name in names):
            raise ValueError(f"experiment {self.name}: arms need names that differ, without commas, got {names}.")
        wanted = {self.baseline, *(arm.against for arm in self.arms), self.method, *chain(*self.compared)} - {None}
        if unknown := wanted - set(names):
            raise ValueError(f"experiment {self.name} compares with {sorted(unknown)}: expected one of {names}.")

    def baseline_of(self, arm: Arm) -> str:
        return arm.against or self.baseline
