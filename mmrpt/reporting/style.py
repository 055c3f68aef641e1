"""The look of every plot: one size, one palette that colour-blind readers can tell apart, small files, atomic writes.

Figures are made without pyplot, so that no backend is chosen, no window opens and nothing stays in memory.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from mmrpt.metrics import moving_average
from mmrpt.reporting.runfiles import write_atomically

# Okabe and Ito (2008): distinct under every common colour blindness.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#7F7F7F"
MODEL_COLOURS = {"warm": GREY, "reinforced": BLUE, "caption": ORANGE}

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "figure.dpi": 110,
}


def new_figure(columns: int = 1, rows: int = 1, width: float = 7.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns axes in reading order; width and height in inches for the whole figure."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG of 128 colours, a third of the size at no visible cost; the same numbers give the same bytes."""
    full, small = io.BytesIO(), io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(full, format="png")
    with Image.open(full) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return write_atomically(path, small.getvalue())


def smoothing_window(count: int) -> int:
    """Odd window of about a tenth of the points, so that short runs are hardly smoothed."""
    return max(1, count // 10 // 2 * 2 + 1)


def draw_curve(
    axis: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], colour: str, label: str, note: bool = True
) -> None:
    """Raw values faint, their moving average strong; NaN leaves a gap in the raw line. `note`: label names the mean."""
    window = smoothing_window(len(values))
    if window > 1:
        axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
        axis.plot(
            steps,
            moving_average(values, window),
            color=colour,
            label=f"{label} (mean of {window} steps)" if note else label,
        )
    else:
        axis.plot(steps, values, color=colour, label=label, marker="o", markersize=2.5)


def label_axes(axis: Axes, title: str, x: str, y: str, whole_x: bool = False) -> None:
    with rc_context(STYLE):
        axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if whole_x:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def legend(axis: Axes, **where: object) -> None:
    with rc_context(STYLE):
        axis.legend(**({"loc": "best"} | where))
