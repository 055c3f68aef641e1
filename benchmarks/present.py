"""Result files as tables and plots. Reads the records that harness.run writes; needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.goals import worst_error_ratio

__all__ = ["draw", "table"]

Record = dict[str, Any]
Row = dict[str, Any]
COLUMNS = (
    "case",
    "contender",
    "time (ms)",
    "speed-up",
    "of floor",
    "peak MiB",
    "of baseline",
    "TFLOP/s",
    "max error",
    "error / eager's",
    "note",
)


def _milliseconds(row: Row) -> str:
    if "seconds" not in row:
        return "-"
    median, low, high = (1e3 * value for value in row["seconds"])
    digits = 3 if median < 1 else 2 if median < 100 else 0
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _speedup(row: Row) -> str:
    if "speedup" not in row:
        return "-"
    if row["baseline"]:
        return "1"
    median, low, high = row["speedup"]
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _mib(count: int) -> str:
    mib = count / 2**20
    return f"{mib:.2f}" if mib < 10 else f"{mib:.0f}"


def _cells(case: dict[str, Any], row: Row) -> tuple[str, ...]:
    errors = row.get("errors")
    baseline = next((one for one in case["contenders"] if one["baseline"]), {})
    worse = None if row is baseline else worst_error_ratio(row, baseline)
    facts = [f"{name} {value:.3g}" for name, value in row.get("facts", {}).items()]
    note = "baseline" if row is baseline and row["status"] == "ok" else row["status"]
    note = ", ".join(facts) if note == "ok" and facts else note
    return (
        case["name"],
        row["name"],
        _milliseconds(row),
        _speedup(row),
        f"{row['of_floor'][0]:.2f}" if "of_floor" in row else "-",
        _mib(row["peak_bytes"]) if "peak_bytes" in row else "-",
        f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "-",
        f"{row['tflops']:.1f}" if "tflops" in row else "-",
        f"{max(errors.values()):.1e}" if errors else "-",
        f"{worse:.2g}" if worse is not None else "-",
        # The whole message is in the JSON; a table cell is one short line.
        "" if note == "ok" else " ".join(note.split()).replace("|", "/")[:90],
    )


def table(record: Record) -> str:
    """A Markdown table, one row a contender.

    Times are medians (lower to upper quartile), speed-ups medians of the ratios within a round, "of floor" likewise
    against the bare products. "max error" is against float64 and relative to the largest value; "error / eager's" the
    worst result's as a multiple of the baseline's. Columns that nobody fills are left out.
    """
    origin = record["provenance"]
    rows = [_cells(case, row) for case in record["cases"] for row in case["contenders"]]
    used = [i for i in range(len(COLUMNS)) if i < 2 or any(row[i] not in ("-", "") for row in rows)]
    lines = [tuple(COLUMNS[i] for i in used), *(tuple(row[i] for i in used) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    head = (
        f"{record['op']} on {origin['device_name']} ({origin['threads']} threads), {origin['date'][:10]}, commit "
        f"{origin['commit']}; {versions}{'; quick' if record.get('quick') else ''}"
    )
    return "\n".join([head, "", *text, *_goals(record)])


def _goals(record: Record) -> list[str]:
    """Lines of a second table, one a goal and case; nothing for an operator without goals."""
    lines = [
        f"| {row['goal']} | {row['case']} | {row['measured']:.3g} | {row['limit']} | {'yes' if row['met'] else 'no'} |"
        for row in record.get("goals", [])
    ]
    return ["", "| goal | case | measured | limit | met |", "|---|---|---|---|---|", *lines] if lines else []


def draw(record: Record, path: Path) -> Path | None:
    """Bars of time and of peak memory by case; the path, or None without matplotlib or without anything timed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    cases = [case for case in record["cases"] if any("seconds" in row for row in case["contenders"])]
    if not cases:
        return None
    names = list(dict.fromkeys(row["name"] for case in cases for row in case["contenders"] if "seconds" in row))
    figure = Figure(figsize=(max(8.0, 2.0 + 1.1 * len(cases)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        rows = [next((r for r in case["contenders"] if r["name"] == name), {}) for case in cases]
        spots = [place - 0.4 + width * (number + 0.5) for place in range(len(cases))]
        timed = [(x, [1e3 * s for s in row["seconds"]]) for x, row in zip(spots, rows, strict=True) if "seconds" in row]
        if timed:
            medians = [ms[0] for _, ms in timed]
            bars = [[ms[0] - ms[1] for _, ms in timed], [ms[2] - ms[0] for _, ms in timed]]
            left.bar([x for x, _ in timed], medians, width, yerr=bars, label=name, error_kw={"elinewidth": 0.8})
        sized = [(x, r["peak_bytes"] / 2**20) for x, r in zip(spots, rows, strict=True) if r.get("peak_bytes")]
        right.bar([x for x, _ in sized], [mib for _, mib in sized], width, label=name)
    for axes, title in ((left, "time (ms), median and quartiles"), (right, "peak memory (MiB)")):
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(cases)), [case["name"] for case in cases], rotation=20, ha="right", fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"{record['op']} on {record['provenance']['device_name']}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
