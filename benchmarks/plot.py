"""A result file as a picture: one panel a case, who is how many times as fast as eager, and with how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.goals import CaseRows

__all__ = ["described", "draw", "times"]

# Okabe and Ito's colours, told apart by colour-blind readers: ours in blues, eager grey, each peer its own.
OURS = ("#0072B2", "#56B4E9", "#004166")
EAGER, COMPILED, FLOOR = "#999999", "#E69F00", "#D55E00"
PEERS = ("#009E73", "#CC79A7", "#F0E442", "#882255", "#000000")
PANELS_A_ROW = 2
LEGEND = ("median of speed over eager within a round, with quartiles", "ours bold, framed")
FLOORS_LEGEND = "dashed: the matrix products alone"
MOST_MEMORY = 200.0  # per cent of eager's; longer bars are cut, their numbers are not


def _shown(case: CaseRows) -> list[str]:
    """Timed contenders, the slowest first; no variants of others, and the floor is a line."""
    names = [name for name, row in case.rows.items() if "speedup" in row and not row.get("variant")]
    names = [name for name in names if case.rows[name]["kind"] != "floor"]
    return sorted(names, key=lambda name: case.of(name, "speedup"))


def _colours(cases: list[CaseRows]) -> dict[str, str]:
    """One colour a contender, the same in every panel."""
    kinds = {name: case.rows[name]["kind"] for case in cases for name in case.rows if name in _shown(case)}
    ours, peers = iter(OURS * 4), iter(PEERS * 4)
    found = {}
    for name, kind in kinds.items():
        if kind == "baseline":
            found[name] = EAGER
        elif name.endswith("compiled"):
            found[name] = COMPILED
        else:
            found[name] = next(ours if kind == "ours" else peers)
    return found


def _panel(case: CaseRows, speed: Any, memory: Any, colours: dict[str, str]) -> None:
    names = _shown(case)
    ours = [case.rows[name]["kind"] == "ours" for name in names]
    edges = ["black" if mine else "none" for mine in ours]
    style = {"color": [colours[name] for name in names], "edgecolor": edges, "linewidth": 1.2, "height": 0.72}
    _draw_speed(case, names, speed, style)
    shares = [100 * case.rows[name]["memory_ratio"] for name in names]
    memory.barh(names, [min(share, MOST_MEMORY) for share in shares], **style)
    for place, share in enumerate(shares):
        memory.text(1.02 * min(share, MOST_MEMORY) + 2, place, f"{share:.0f} %", va="center", fontsize=8)
    memory.set_xlim(0, 1.4 * min(MOST_MEMORY, max(shares)))
    speed.set_yticks(range(len(names)), [f"ours: {n}" if mine else n for n, mine in zip(names, ours, strict=True)])
    for label, mine in zip(speed.get_yticklabels(), ours, strict=True):
        label.set_fontweight("bold" if mine else "normal")
    memory.tick_params(axis="y", left=False, labelleft=False)
    speed.set_title(case.name, fontsize=10, loc="left", fontweight="bold", pad=26)
    place_at = {"xy": (0, 1), "xytext": (0, 15), "xycoords": "axes fraction", "textcoords": "offset points"}
    words = speed.annotate(described(case.params), fontsize=8, color="#444444", **place_at)
    words.set_in_layout(False)  # it may run on over the memory's panel
    for axes, label in ((speed, "speed, eager = 1"), (memory, "peak memory, % of eager's")):
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_speed(case: CaseRows, names: list[str], axes: Any, style: dict[str, Any]) -> None:
    """Bars of speed over eager with quartiles and numbers, lines at eager and at the floor."""
    medians = [case.rows[name]["speedup"] for name in names]
    below, above = [one[0] - one[1] for one in medians], [one[2] - one[0] for one in medians]
    values = [one[0] for one in medians]
    axes.barh(names, values, xerr=[below, above], error_kw={"elinewidth": 0.8, "ecolor": "#444444"}, **style)
    axes.axvline(1.0, color=EAGER, linewidth=0.8)
    floor = next((row["speedup"][0] for row in case.rows.values() if row["kind"] == "floor" and "speedup" in row), None)
    if floor is not None:
        axes.axvline(floor, color=FLOOR, linestyle="--", linewidth=1.2)
        over = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(floor, 1.01, f"bare products {times(floor)}", color=FLOOR, fontsize=7.5, **over)
    widest = max([one[2] for one in medians] + [floor or 0.0])
    axes.set_xlim(0, 1.18 * widest)
    readable = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # over the floor's line
    for place, (value, high) in enumerate(zip(values, above, strict=True)):
        axes.text(value + high + 0.015 * widest, place, times(value), va="center", fontsize=8, bbox=readable)


def times(value: float) -> str:
    return f"{value:.1f}x" if value >= 1 else f"{value:.2f}x"


def described(params: dict[str, Any]) -> str:
    """A case's sizes in words: what is off or usual is left out, what is on stands by its name."""
    shown = {name: value for name, value in params.items() if value not in (None, [], False, "flat")}
    words = {name: "+".join(value) if isinstance(value, list) else value for name, value in shown.items()}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in words.items())


def draw(cases: list[CaseRows], machine: dict[str, Any], path: Path) -> Path | None:
    """Write the picture; the path, or None without matplotlib or without anything timed beside a baseline.

    machine: "device_name" and "threads" of the file's `machine_info`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    cases = [case for case in cases if _shown(case)]
    if not cases:
        return None
    columns = min(PANELS_A_ROW, len(cases))
    groups = [cases[start : start + columns] for start in range(0, len(cases), columns)]
    heights = [max(len(_shown(case)) for case in group) * 0.26 + 1.15 for group in groups]
    figure = Figure(figsize=(7.2 * columns, sum(heights) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    floors = any(row["kind"] == "floor" for case in cases for row in case.rows.values())
    head = f"{cases[0].op} on {machine['device_name']}, threads: {machine['threads']}"
    legend = ("; " if columns > 1 else "\n").join((*LEGEND, FLOORS_LEGEND) if floors else LEGEND)
    figure.suptitle(f"{head}\n{legend}", fontsize=10)
    shape = {"height_ratios": heights, "width_ratios": [3, 1.3] * columns}
    grid = figure.subplots(len(groups), 2 * columns, squeeze=False, **shape)
    colours = _colours(cases)
    for row, group in zip(grid, groups, strict=True):
        for case, speed, memory in zip(group, row[::2], row[1::2], strict=False):
            _panel(case, speed, memory, colours)
        for axes in row[2 * len(group) :]:
            axes.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
    return path
