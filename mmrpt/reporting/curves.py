"""Curves over the steps of a run: reward, kept tokens, losses, signs of instability."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrpt.reporting import style
from mmrpt.reporting.runfiles import RunFiles, column, find_setting, has_values, plot_path

# Title, unit, and the keys of metrics.jsonl that the panel draws, those of them that the run has.
STABILITY = (
    ("Entropy of the policy", "nats per token", ("entropy", "entropy_mean")),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Clipped tokens", "fraction", ("clip_fraction", "clip_fraction_low", "clip_fraction_high")),
    ("Response length", "tokens", ("response_length",)),
    ("Mean token perception", "nats", ("perception_mean",)),
    ("Policy against sampler", "nats", ("rollout_logp_gap", "approx_kl")),
)


def plot_reward(run_dir: Path | str) -> Path | None:
    """Reward and rate of exact answers of the sampled rollouts over steps of reinforcement."""
    rows = RunFiles(run_dir).phase("rl")
    if not has_values(rows, "reward") and not has_values(rows, "accuracy"):
        return None
    steps = column(rows, "step")
    figure, (left, right) = style.new_figure(columns=2)
    style.draw_curve(left, steps, column(rows, "reward"), style.BLUE, "mean reward")
    style.label_axes(left, _trend("Reward", column(rows, "reward")), "RL step", "mean reward of the step", True)
    style.draw_curve(right, steps, 100 * column(rows, "accuracy"), style.GREEN, "exact answers")
    if has_values(rows, "format"):
        style.draw_curve(right, steps, 100 * column(rows, "format"), style.GREY, "right format")
    title = _trend("Exact answers, %", 100 * column(rows, "accuracy"))
    style.label_axes(right, title, "RL step", "share of rollouts (%)", True)
    right.set_ylim(0, 102)
    style.legend(left)
    style.legend(right)
    return style.save(figure, plot_path(run_dir, "reward"))


def plot_kept_rate(run_dir: Path | str) -> Path | None:
    """Share of response tokens that carry gradient, and of groups with a signal, over steps of reinforcement."""
    files = RunFiles(run_dir)
    rows = files.phase("rl")
    if not has_values(rows, "kept_token_rate"):
        return None
    steps, kept = column(rows, "step"), 100 * column(rows, "kept_token_rate")
    figure, (axis,) = style.new_figure()
    style.draw_curve(axis, steps, kept, style.BLUE, "tokens that carry gradient")
    if has_values(rows, "groups_kept"):
        style.draw_curve(axis, steps, 100 * column(rows, "groups_kept"), style.ORANGE, "groups with a signal")
    ratio = find_setting(files.document("config.yaml"), "keep_ratio")
    if isinstance(ratio, (int, float)):
        axis.axhline(100 * ratio, color=style.GREY, linestyle="--", linewidth=1, label=f"keep_ratio {ratio:g}")
    style.label_axes(axis, f"{np.nanmean(kept):.0f} % of response tokens carry gradient", "RL step", "share (%)", True)
    axis.set_ylim(0, 102)
    style.legend(axis)
    return style.save(figure, plot_path(run_dir, "kept_rate"))


def plot_loss(run_dir: Path | str) -> Path | None:
    """Caption loss of the warm-up and of the control, which continues it for as many steps as reinforcement takes."""
    files = RunFiles(run_dir)
    parts = (("warmup", style.GREY, "warm-up"), ("control", style.ORANGE, "caption-trained control"))
    drawn = [(rows, *look) for phase, *look in parts if has_values(rows := files.phase(phase), "loss")]
    if not drawn:
        return None
    figure, (axis,) = style.new_figure()
    offset = 0.0
    for rows, colour, name in drawn:
        steps = column(rows, "step")
        # The control counts its own steps from the warm-up's end; a trainer that counts on is drawn as it stands.
        shift = offset if steps.min() < offset else 0.0
        style.draw_curve(axis, steps + shift, column(rows, "loss"), colour, name)
        offset = float(steps.max() + shift) + 1
    losses = column(drawn[0][0], "loss")
    title = _trend(f"Caption loss of the {drawn[0][2]}", losses, "{:.2f}")
    style.label_axes(axis, title, "optimiser step", "cross-entropy (nats per token)", True)
    style.legend(axis)
    return style.save(figure, plot_path(run_dir, "loss"))


def plot_stability(run_dir: Path | str) -> Path | None:
    """What goes wrong first when reinforcement is unstable: the panels of `STABILITY` that the run has values for."""
    rows = RunFiles(run_dir).phase("rl")
    panels = [(title, unit, [key for key in keys if has_values(rows, key)]) for title, unit, keys in STABILITY]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    lines = math.ceil(len(panels) / 3)
    figure, axes = style.new_figure(columns=3, rows=lines, width=8.4, height=2.1 * lines + 0.3)
    steps = column(rows, "step")
    for axis, (title, unit, keys) in zip(axes, panels, strict=False):
        for key, colour in zip(keys, (style.BLUE, style.ORANGE, style.GREEN), strict=False):
            values = column(rows, key)
            known = np.isfinite(values)  # some are logged in every few steps only
            style.draw_curve(axis, steps[known], values[known], colour, key, note=False)
        style.label_axes(axis, title, "RL step", unit, True)
        if len(keys) > 1:
            style.legend(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return style.save(figure, plot_path(run_dir, "stability"))


def _trend(name: str, values: NDArray[np.float64], shape: str = "{:.2g}") -> str:
    """The name with the mean of the first and of the last tenth of the finite values: what the eye should see."""
    known = values[np.isfinite(values)]
    if known.size < 2:
        return name
    tenth = max(1, known.size // 10)
    return f"{name}: {shape.format(known[:tenth].mean())} to {shape.format(known[-tenth:].mean())}"
