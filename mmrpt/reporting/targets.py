"""What the main job promises, beside what a run measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmrpt.metrics import Interval
from mmrpt.reporting.measured import (
    ALL_SETS,
    SETS,
    Difference,
    Evaluation,
    difference,
    measured_auc,
    points,
)
from mmrpt.reporting.progress import duration, is_finished, phase_seconds, total_seconds
from mmrpt.reporting.runfiles import RunFiles

# What a default run promises; rates and their differences as fractions, time in seconds.
MIN_AUC = 0.85
MIN_GAIN_OVER_WARM = 0.10
MIN_GAIN_OVER_CAPTION = 0.05
MAX_BLANKED_RISE = 0.03
MAX_SECONDS = 360.0


@dataclass(frozen=True)
class Target:
    """One promise beside what was measured. `met` is None where it was not measured."""

    name: str
    where: str
    measured: str
    interval: str
    wanted: str
    met: bool | None
    certain: bool = True  # the 95 % interval lies wholly on one side of the promise

    @property
    def verdict(self) -> str:
        if self.met is None:
            return "not measured"
        word = "met" if self.met else "missed"
        return word if self.certain else f"{word} (interval reaches across)"


def targets(files: RunFiles, evaluation: Evaluation) -> list[Target]:
    """Every promise of the main job beside what this run measured, over all sets and set by set."""
    auc, reach = measured_auc(files)
    found = [_auc_target(auc, reach)]
    single = [(SETS.get(one, one), [one]) for one in evaluation.sets()] if len(evaluation.sets()) > 1 else []
    promises = [
        ("Gain over the warm start, with the image", "warm", "image", MIN_GAIN_OVER_WARM, True),
        ("Gain over equal caption training, with the image", "caption", "image", MIN_GAIN_OVER_CAPTION, True),
        ("Change over the warm start, image blanked", "warm", "blanked", MAX_BLANKED_RISE, False),
    ]
    for name, minus, condition, bound, at_least in promises:
        for where, sets in [(ALL_SETS, None), *single]:
            change = difference(evaluation, "reinforced", minus, condition, sets)
            found.append(_change_target(name, where, change, bound, at_least))
    return [*found, _time_target(files, evaluation)]


def _time_target(files: RunFiles, evaluation: Evaluation) -> Target:
    name, wanted = "Time of the whole run", f"< {MAX_SECONDS / 60:.0f} min for the default run on two cores"
    total = total_seconds(phase_seconds(files))
    if math.isnan(total):
        return Target(name, "", "–", "", wanted, None)
    if not is_finished(files, evaluation):  # part of a run is always quick
        return Target(name, "", f"{duration(total)} so far", "", wanted, None)
    return Target(name, "", duration(total), "", wanted, total < MAX_SECONDS)


def _auc_target(auc: float, reach: Interval) -> Target:
    name, wanted = "Dependency scores tell sentences that need the image (AUC)", f">= {MIN_AUC}"
    if math.isnan(auc):
        return Target(name, "", "–", "", wanted, None)
    shown = "" if math.isnan(reach.low) else f"{reach.low:.3f} to {reach.high:.3f}"
    certain = math.isnan(reach.low) or not reach.low < MIN_AUC <= reach.high
    return Target(name, "", f"{auc:.3f}", shown, wanted, auc >= MIN_AUC, certain)


def _change_target(name: str, where: str, change: Difference | None, bound: float, at_least: bool) -> Target:
    wanted = f"{'>=' if at_least else '<'} {100 * bound:+.0f} points"
    if change is None:
        return Target(name, where, "–", "", wanted, None)
    low, high = change.interval
    # Rounded at 1e-9: 0.7 - 0.6 is a hair under 0.1, and a gain of exactly ten points is ten points.
    value = round(change.value, 9)
    met = value >= bound if at_least else value < bound
    return Target(
        name, where, points(value), f"{100 * low:+.1f} to {100 * high:+.1f}", wanted, met, not low < bound <= high
    )
