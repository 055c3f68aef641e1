"""The picture of an experiment: accuracies by arm, and how much more than the baseline each looks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.axes import Axes

from mmrpt.experiments.arms import Experiment
from mmrpt.experiments.numbers import Results, difference, rates, seeds_of
from mmrpt.report.plots import BLUE, GREY, ORANGE, STYLE, new_figure, save
from mmrpt.report.read import CONDITIONS

COLOURS = dict(zip(CONDITIONS, (BLUE, GREY, ORANGE), strict=True))


def draw(experiment: Experiment, results: Results, path: Path) -> Path:
    """Writes the PNG. Every seed is a small dot, their mean a large one."""
    arms = [arm for arm in experiment.arms if seeds_of(results, arm.name)]
    with rc_context(STYLE):
        figure, (left, right) = new_figure(columns=2, width=9.6, height=1.4 + 0.3 * len(arms))
        for place, arm in enumerate(arms):
            for condition, colour in COLOURS.items():
                by_seed = rates(results, arm.name, condition)
                _dots(left, place, by_seed.values(), colour, CONDITIONS[condition] if place == 0 else None)
            other = experiment.baseline_of(arm)
            found = difference(results, arm.name, other, "gap") if other != arm.name else None
            if found:
                _dots(right, place, found.by_seed.values(), BLUE, None)
                if found.interval:
                    right.hlines(place, *(100 * end for end in found.interval), color=BLUE, linewidth=1.2)
        left.set_yticks(range(len(arms)), [arm.name for arm in arms])
        right.set_yticks(range(len(arms)), ["" for _ in arms])
        for axis in (left, right):
            axis.set_ylim(len(arms) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
        left.set(xlabel="restored exactly (%)", xlim=(0, 100))
        figure.legend(loc="outside lower left", ncols=len(COLOURS))
        right.axvline(0, color=GREY, linewidth=1)
        right.set(title="Gap (image − another's) against its baseline", xlabel="points; line: 95 % over questions")
        return save(figure, path)


def _dots(axis: Axes, place: int, values: Iterable[float], colour: str, label: str | None) -> None:
    values = [100 * value for value in values]
    axis.scatter(values, [place] * len(values), s=9, color=colour, alpha=0.5, linewidths=0)
    axis.scatter([fmean(values)], [place], s=36, color=colour, label=label, linewidths=0)
