"""Grouped bars of held-out accuracy: with the image, blanked, swapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from mmrpt.reporting import style
from mmrpt.reporting.measured import CONDITIONS, MODELS, SETS, Evaluation, read_evaluation
from mmrpt.reporting.runfiles import RunFiles, plot_path


def plot_heldout_accuracy(run_dir: Path | str) -> Path | None:
    """Accuracy with the image, blanked and swapped, per held-out set and model, with 95 % Wilson intervals."""
    evaluation = read_evaluation(RunFiles(run_dir))
    sets = evaluation.sets()
    if not sets:
        return None
    figure, axes = style.new_figure(columns=len(sets), width=max(7.6, 2.9 * len(sets)), height=3.5)
    for axis, name in zip(axes, sets, strict=True):
        _draw_accuracy(axis, evaluation, name)
    axes[0].set_ylabel("restored exactly (%)")
    if claim := _claim(evaluation):
        figure.suptitle(claim, x=0.01, ha="left", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return style.save(figure, plot_path(run_dir, "heldout_accuracy"))


def _draw_accuracy(axis: Axes, evaluation: Evaluation, name: str) -> None:
    models, conditions = evaluation.models(), evaluation.conditions()
    width = 0.8 / len(models)
    counts = set()
    for place, model in enumerate(models):
        for group, condition in enumerate(conditions):
            cell = evaluation.cells.get((model, name, condition))
            if cell is None:
                continue
            counts.add(cell.count)
            x = group + (place - (len(models) - 1) / 2) * width
            rate, (low, high) = 100 * cell.rate, cell.interval
            whiskers = [[rate - 100 * low], [100 * high - rate]]
            axis.bar(x, rate, 0.92 * width, color=_colour(model), label=_label(model, axis))
            axis.errorbar(x, rate, yerr=np.maximum(whiskers, 0), color="black", linewidth=0.9, capsize=2)
            axis.annotate(f"{rate:.0f}", (x, 100 * high), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(conditions)), [CONDITIONS.get(one, one).replace(" ", "\n", 1) for one in conditions])
    axis.set_ylim(0, 108)
    axis.grid(axis="x", visible=False)
    shown = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
    style.label_axes(axis, f"{SETS.get(name, name).capitalize()} ({shown} questions)", "", "")


def _claim(evaluation: Evaluation) -> str:
    """The trained model against the warm start over all sets, per condition, as the title."""
    parts = []
    for condition in evaluation.conditions():
        before, after = (evaluation.pooled(model, condition, evaluation.sets()) for model in ("warm", "reinforced"))
        if before and after:
            name = CONDITIONS.get(condition, condition)
            parts.append(f"{100 * before.rate:.0f} to {100 * after.rate:.0f} % {name}")
    return f"Reinforcement over all sets: {', '.join(parts)}" if parts else ""


def _colour(model: str) -> str:
    return style.MODEL_COLOURS.get(model, style.GREEN)


def _label(model: str, axis: Axes) -> str | None:
    """The model's name the first time it is drawn, so that the legend names it once."""
    text = MODELS.get(model, model)
    return None if text in axis.get_legend_handles_labels()[1] else text
