"""Distributions: perception of tokens and of trajectories, dependency scores of sentences by true class."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrpt.metrics import concentration_curve, top_share
from mmrpt.reporting import style
from mmrpt.reporting.measured import read_dependency, read_perception
from mmrpt.reporting.runfiles import RunFiles, number, plot_path

TOP_TOKENS = 0.2  # "sparse" is said as: this share of the tokens carries so much of the total


def plot_token_perception(run_dir: Path | str) -> Path | None:
    """Distribution of token perception on a log scale, and the share of the total that the top tokens carry."""
    scores, _ = read_perception(RunFiles(run_dir))
    positive = scores[scores > 0]
    if positive.size == 0:
        return None
    figure, (left, right) = style.new_figure(columns=2)
    edges = _log_edges(positive)
    # Rounding of the edges must not lose the largest token; what is below the axis counts in the first bar.
    left.hist(np.clip(positive, edges[0], edges[-1]), bins=edges, color=style.BLUE)
    left.set_xscale("log")
    zeros = scores.size - positive.size
    note = f", {100 * zeros / scores.size:.0f} % exactly 0 not drawn" if zeros else ""
    title = f"{scores.size:,} response tokens{note}"
    style.label_axes(left, title, "KL(image || perturbed image) (nats)", "tokens")
    curve = 100 * concentration_curve(scores)
    share = 100 * top_share(scores, TOP_TOKENS)
    right.plot(np.linspace(0, 100, curve.size), curve, color=style.BLUE)
    right.plot([0, 100], [0, 100], color=style.GREY, linestyle="--", linewidth=1, label="all tokens alike")
    right.plot([100 * TOP_TOKENS], [share], marker="o", color=style.RED)
    note = f"top {100 * TOP_TOKENS:.0f} %: {share:.0f} %"
    right.annotate(note, (100 * TOP_TOKENS, share), (28, share - 12), color=style.RED)
    title = f"The top {100 * TOP_TOKENS:.0f} % of tokens carry {share:.0f} %"
    style.label_axes(right, title, "tokens, most perceptive first (%)", "share of all perception (%)")
    style.legend(right, loc="lower right")
    return style.save(figure, plot_path(run_dir, "token_perception"))


def plot_trajectory_perception(run_dir: Path | str) -> Path | None:
    """How widely the mean perception of whole responses differs."""
    _, scores = read_perception(RunFiles(run_dir))
    if scores.size == 0:
        return None
    low, middle, high = np.quantile(scores, [0.1, 0.5, 0.9])
    figure, (axis,) = style.new_figure()
    axis.hist(scores, bins=min(50, max(8, scores.size // 10)), color=style.PURPLE)
    for value, name in ((low, "10 %"), (middle, "median"), (high, "90 %")):
        axis.axvline(value, color="black", linewidth=1, linestyle="--" if name != "median" else "-")
        place = {"xycoords": ("data", "axes fraction"), "xytext": (2, -9), "textcoords": "offset points"}
        axis.annotate(name, (value, 1), fontsize=8, **place)
    ratio = f"the 90th percentile is {high / low:.1f} times the 10th" if low > 0 else ""
    title = f"{scores.size:,} responses: {ratio or f'80 % lie between {low:.2g} and {high:.2g}'}"
    style.label_axes(axis, title, "mean token perception of a response (nats)", "responses")
    return style.save(figure, plot_path(run_dir, "trajectory_perception"))


def plot_dependency(run_dir: Path | str) -> Path | None:
    """Dependency scores of sentences by true class, with the AUC and the threshold that masking used."""
    files = RunFiles(run_dir)
    dependency = read_dependency(files)
    everything = np.concatenate([dependency.scores, dependency.unlabelled])
    if everything.size == 0:
        return None
    figure, (axis,) = style.new_figure()
    edges = np.linspace(everything.min(), max(everything.max(), everything.min() + 1e-6), 41)
    groups = (
        (dependency.scores[dependency.needs_image], style.BLUE, "needs the image"),
        (dependency.scores[~dependency.needs_image], style.ORANGE, "does not"),
        (dependency.unlabelled, style.GREY, "class unknown"),
    )
    for values, colour, name in groups:
        if values.size:
            axis.hist(values, bins=edges, color=colour, alpha=0.6, label=f"{name} ({values.size:,})")
    threshold = number(files.document("masking.json"), "threshold")
    if math.isfinite(threshold):
        axis.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3g}")
    auc = dependency.auc
    claim = "Sentences that need the image score higher: " if auc > 0.5 else "Dependency scores: "
    title = f"{claim}AUC {auc:.3f}" if math.isfinite(auc) else "Dependency scores (classes unknown or one only)"
    style.label_axes(axis, title, "dependency score D_vis (visual share of attention)", "sentences")
    style.legend(axis)
    return style.save(figure, plot_path(run_dir, "dependency"))


def _log_edges(positive: NDArray[np.float64], bins: int = 40) -> NDArray[np.float64]:
    low, high = math.log10(positive.min()), math.log10(positive.max())
    low = max(low, high - 10)  # one token at 1e-30 must not squeeze the rest into two bars
    return np.logspace(low, max(high, low + 0.1), bins + 1)
