"""The plots of a run: `draw(name, run)` gives a figure, or None when the run holds no data for it (yet).

Figures are made without pyplot, so that no backend is chosen, no window opens and nothing stays in memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mmrpt.corpus import write_bytes
from mmrpt.report.numbers import CONDITIONS, CONTROL, MODELS, SETS, in_order, numbers_of
from mmrpt.report.read import Floats, Run, number, score_name
from mmrpt.report.statistics import moving_average

# Okabe and Ito (2008): distinct under every common colour blindness.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#7F7F7F"
SKY, YELLOW = "#56B4E9", "#F0E442"
MODEL_COLOURS = dict(zip(MODELS, (GREY, BLUE, ORANGE, RED, PURPLE, SKY, YELLOW, GREEN), strict=True))
BARS = 4  # models whose bars fit in a panel of the usual width
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 110,
}
PERCEPTION = {  # by perception.kind
    "kl": "KL(image || perturbed image) (nats)",
    "k3": "k3 of KL(image || perturbed image) (nats)",
    "js": "Jensen-Shannon divergence of the two views (nats)",
    "mass": "attention on the image (share)",
}
SHARE, NATS = "share of all", "cross-entropy (nats per token)"


def new_figure(columns: int = 1, rows: int = 1, width: float = 7.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns axes in reading order; width and height in inches for the whole figure."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG of 128 colours, a third of the size at no visible cost; the same numbers give the same bytes."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png")
    with Image.open(full) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_bytes(path, small.getvalue())


class Panel(NamedTuple):
    """One axes of curves: title, unit, keys of a phase's rows in metrics.jsonl; `line`: a setting, drawn dashed."""

    title: str
    unit: str
    keys: tuple[str, ...]
    phase: str = "rl"
    line: str = ""


def plot_curves(run: Run, panels: tuple[Panel, ...]) -> Figure | None:
    """The panels with a finite value."""
    known = [
        (panel, keys) for panel in panels if (keys := [key for key in panel.keys if _curve(run, panel, key)[0].size])
    ]
    if not known:
        return None
    rows = math.ceil(len(known) / 3)
    figure, axes = new_figure(min(3, len(known)), rows, width=8.4, height=2.2 * rows + 0.6)
    for axis, (panel, keys) in zip(axes, known, strict=False):
        for key, colour in zip(keys, (BLUE, ORANGE, GREEN), strict=False):
            steps, values = _curve(run, panel, key)
            window = max(1, values.size // 10 // 2 * 2 + 1)  # odd; short runs are hardly smoothed
            axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9, marker="." if values.size < 3 else "")
            axis.plot(steps, moving_average(values, window), color=colour, label=key)
        if isinstance(line := run.settings.get(panel.line), (int, float)):
            axis.axhline(line, color=GREY, linestyle="--", linewidth=1, label=f"{panel.line} = {line:g}")
        _, values = _curve(run, panel, keys[0])
        tenth = math.ceil(values.size / 10)
        title = f"{panel.title}: {values[:tenth].mean():.2g} to {values[-tenth:].mean():.2g}"
        axis.set(title=title, xlabel=f"{panel.phase} step", ylabel=panel.unit)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if panel.unit == SHARE:
            axis.set_ylim(0, 1.02)
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend()
    for axis in axes[len(known) :]:
        axis.set_visible(False)
    return figure


def _curve(run: Run, panel: Panel, key: str) -> tuple[Floats, Floats]:
    """Steps and values of those steps that logged a finite one."""
    values = run.values(panel.phase, key)
    return run.values(panel.phase, "step")[np.isfinite(values)], values[np.isfinite(values)]


def plot_heldout_accuracy(run: Run) -> Figure | None:
    """Accuracy with the image, blanked and swapped, per held-out set and model, with 95 % Wilson intervals."""
    numbers = numbers_of(run)
    sets, models = in_order(SETS, run.evaluation, "set"), in_order(MODELS, run.evaluation, "model")
    if not sets:
        return None
    width = 2.9 * len(sets) * max(1, len(models) / BARS)
    figure, axes = new_figure(columns=len(sets), width=max(7.6, width))
    for axis, name in zip(axes, sets, strict=True):
        prefix = {(model, one): f"accuracy/{model}/{name}/{one}" for model in models for one in CONDITIONS}
        cells = {key: numbers[path] for key, path in prefix.items() if path in numbers}
        draw_bars(axis, models, {key: (cell.value, *cell.interval) for key, cell in cells.items()})
        counts = sorted({f"{cell.count:,}" for cell in cells.values()})
        axis.set_title(f"{SETS.get(name, name).capitalize()} ({' or '.join(counts)} questions)")
    axes[0].set_ylabel("restored exactly (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), BARS))
    return figure


def draw_bars(axis: Axes, models: list[str], rates: Mapping[tuple[str, str], tuple[float, float, float]]) -> None:
    """Bars in groups by condition, one a model; `rates` by (model, condition): rate and both ends of its whisker."""
    for place, model in enumerate(models):
        x = np.arange(len(CONDITIONS)) + 0.8 * ((place + 0.5) / len(models) - 0.5)
        rate, low, high = 100 * np.array([rates.get((model, one), (math.nan,) * 3) for one in CONDITIONS]).T
        label = f"control: {CONTROL}" if model == "control" else MODELS.get(model, model)
        axis.bar(x, rate, 0.74 / len(models), color=MODEL_COLOURS.get(model, GREEN), label=label)
        axis.errorbar(x, rate, np.maximum([rate - low, high - rate], 0), fmt="none", ecolor="black", lw=0.9, capsize=2)
        for at, value, top in zip(x[np.isfinite(rate)], rate[np.isfinite(rate)], high[np.isfinite(rate)], strict=True):
            axis.annotate(f"{value:.0f}", (at, top), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(CONDITIONS)), [label.replace(" ", "\n", 1) for label in CONDITIONS.values()])
    axis.set_ylim(0, 108)
    axis.grid(axis="x", visible=False)


def plot_token_perception(run: Run) -> Figure | None:
    """Distribution of token perception on a log scale, and the share of the total that the top tokens carry."""
    scores = run.token_perception
    positive = scores[scores > 0]
    if positive.size == 0:
        return None
    figure, (left, right) = new_figure(columns=2)
    high = math.log10(positive.max())
    low = min(max(math.log10(positive.min()), high - 10), high - 0.1)  # one token at 1e-30 must not squeeze the rest
    edges = np.logspace(low, high, 41)
    left.hist(np.clip(positive, edges[0], edges[-1]), bins=edges, color=BLUE)
    zeros = 1 - positive.size / scores.size
    title = f"{scores.size:,} response tokens" + (f", {100 * zeros:.0f} % exactly 0 not drawn" if zeros else "")
    unit = PERCEPTION.get(run.settings.get("perception.kind"), PERCEPTION["kl"])
    left.set(title=title, xlabel=unit, ylabel="tokens", xscale="log")
    curve = 100 * np.append(0.0, np.cumsum(np.sort(scores)[::-1])) / scores.sum()
    share = curve[math.ceil(scores.size / 5)]
    right.plot(np.linspace(0, 100, curve.size), curve, color=BLUE)
    right.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="all tokens alike")
    right.plot([20], [share], marker="o", color=RED)
    right.set(title=f"The top 20 % of tokens carry {share:.0f} %", xlabel="tokens, most perceptive first (%)")
    right.set_ylabel("share of all perception (%)")
    right.legend(loc="lower right")
    return figure


def plot_trajectory_perception(run: Run) -> Figure | None:
    """How widely the mean perception of whole responses differs."""
    scores = run.trajectory_perception
    if scores.size == 0:
        return None
    low, middle, high = np.quantile(scores, [0.1, 0.5, 0.9])
    figure, (axis,) = new_figure()
    axis.hist(scores, bins=min(50, max(8, scores.size // 10)), color=PURPLE)
    for value, dashes in ((low, "--"), (middle, "-"), (high, "--")):
        axis.axvline(value, color="black", linewidth=1, linestyle=dashes)
    axis.set_title(f"{scores.size:,} responses: median {middle:.2g}, 80 % lie between {low:.2g} and {high:.2g}")
    axis.set(xlabel="mean token perception of a response", ylabel="responses")
    return figure


def plot_dependency(run: Run) -> Figure | None:
    """Dependency scores of sentences by true class, with the AUC and the threshold that masking used."""
    scores, truth, _ = run.sentence_scores
    if scores.size == 0:
        return None
    figure, (axis,) = new_figure()
    edges = np.linspace(scores.min(), max(scores.max(), scores.min() + 1e-6), 41)
    for chosen, colour, name in (
        (truth == 1, BLUE, "needs the image"),
        (truth == 0, ORANGE, "does not"),
        (np.isnan(truth), GREY, "not known if it needs the image"),
    ):
        if chosen.any():
            axis.hist(scores[chosen], edges, color=colour, alpha=0.6, label=f"{name} ({chosen.sum():,})")
    if math.isfinite(threshold := number(run.masking, "threshold")):
        axis.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3g}")
    auc = numbers_of(run).get("dependency_auc")
    axis.set_title(f"Dependency of {scores.size:,} sentences" + (f": AUC {auc.value:.3f}" if auc else ""))
    axis.set(xlabel=score_name(run), ylabel="sentences")
    axis.legend()
    return figure


# How each is drawn, or its panels of curves, and how to read it.
PLOTS: dict[str, tuple[Callable[[Run], Figure | None] | tuple[Panel, ...], str]] = {
    "heldout_accuracy": (
        plot_heldout_accuracy,
        "What a model gets from looking is the gap between the first group of bars and the other two.",
    ),
    "reward": (
        (
            Panel("Reward", "mean of the step", ("reward",)),
            Panel("Exact answers", SHARE, ("accuracy", "format")),
            Panel("Validation", SHARE, tuple(CONDITIONS), "validation"),
        ),
        "Faint: a step's rollouts on training captions, sampled; strong: their mean over a tenth of the steps. "
        "Validation, where the settings ask for it: answers on pairs of its own, with the image and its two controls.",
    ),
    "dependency": (
        plot_dependency,
        "Sentences right of the dashed line were masked. The further the two colours (where the pairs say which "
        "sentences need the image) lie apart, the better attention alone tells.",
    ),
    "token_perception": (
        plot_token_perception,
        "Left: how much each token's distribution changes when the image is damaged. Right: the higher the curve bends "
        "above the dashed line, the fewer tokens carry the perception.",
    ),
    "trajectory_perception": (
        plot_trajectory_perception,
        "The advantage of responses to the right is scaled up. Lines: 10th percentile, median, 90th.",
    ),
    "kept_rate": (
        (
            Panel("Tokens with gradient", SHARE, ("kept_token_rate",), line="perception.keep_ratio"),
            Panel("Groups with a signal", SHARE, ("groups_kept",)),
        ),
        "Tokens outside the kept share get no policy gradient (rounding up per response lifts it above keep_ratio).",
    ),
    "loss": (
        (
            Panel("Warm-up", NATS, ("loss",), "warmup"),
            Panel("Control", NATS, ("loss",), "control"),
            Panel("Captions for RL's seconds", NATS, ("loss",), "captions_seconds"),
            Panel("Supervised masks", NATS, ("loss",), "supervised_masks"),
        ),
        f"Training on captions. The control is {CONTROL}.",
    ),
    "stability": (
        (
            Panel("Entropy", "nats per token", ("entropy", "entropy_mean")),
            Panel("Gradient norm", "before clipping", ("grad_norm",)),
            Panel("Clipped", "fraction of tokens", ("clip_fraction", "clip_fraction_low", "clip_fraction_high")),
            Panel("Response length", "tokens", ("response_length",)),
            Panel("Token perception", "nats", ("perception_mean",)),
            Panel("Sampler gap", "nats", ("rollout_logp_gap", "approx_kl")),
        ),
        "A healthy run keeps entropy above zero, gradient norms flat, few clipped tokens, and a small sampler gap.",
    ),
}


def draw(name: str, run: Run) -> Figure | None:
    what = PLOTS[name][0]
    with rc_context(STYLE):
        return plot_curves(run, what) if isinstance(what, tuple) else what(run)


def draw_all(run: Run) -> list[str]:
    """Write every plot that the run has data for to plots/<name>.png; the names drawn."""
    figures = {name: figure for name in PLOTS if (figure := draw(name, run)) is not None}
    for name, figure in figures.items():
        save(figure, run.folder / "plots" / f"{name}.png")
    return list(figures)
