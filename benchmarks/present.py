"""Result files as tables.

python -m benchmarks.present benchmarks/results/*.json     prints the tables and draws the plots again
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.goals import CaseRows, cases_of, worst_error_ratio
from benchmarks.plot import described, draw

__all__ = ["goals_table", "origin", "show", "table"]

Row = dict[str, Any]
COLUMNS = (
    "contender",
    "speed-up",
    "of floor",
    "time (ms)",
    "peak MiB",
    "of baseline",
    "TFLOP/s",
    "max error",
    "error / eager's",
    "note",
)


def _milliseconds(row: Row) -> str:
    median, low, high = (1e3 * value for value in row["seconds"])
    digits = 3 if median < 1 else 2 if median < 100 else 0
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _speedup(row: Row) -> str:
    median, low, high = row["speedup"]
    return "1" if row["kind"] == "baseline" else f"{median:.2f} ({low:.2f} to {high:.2f})"


def _mib(row: Row) -> str:
    mib = row["peak_bytes"] / 2**20
    return f"{mib:.2f}" if mib < 10 else f"{mib:.0f}"


def _cells(name: str, row: Row, baseline: Row) -> tuple[str, ...]:
    errors = row.get("errors")
    worse = None if row is baseline else worst_error_ratio(row, baseline)
    facts = [f"{name} {value:.3g}" for name, value in row.get("facts", {}).items()]
    note = ", ".join([row["kind"]] * (row["kind"] in ("baseline", "floor")) + facts)
    note = note if row["status"] == "ok" else row["status"]
    return (
        name,
        _speedup(row) if "speedup" in row else "-",
        f"{row['of_floor'][0]:.2f}" if "of_floor" in row else "-",
        _milliseconds(row),
        _mib(row),
        f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "-",
        f"{row['tflops']:.1f}" if "tflops" in row else "-",
        f"{max(errors.values()):.1e}" if errors else "-",
        f"{worse:.2g}" if worse is not None else "-",
        # The whole message is in the JSON; a table cell is one short line.
        " ".join(note.split()).replace("|", "/")[:90],
    )


def table(case: CaseRows) -> str:
    """A Markdown table of one case, the fastest first.

    Times are medians (lower to upper quartile), speed-ups medians of the ratios within a round, "of floor" likewise
    against the bare products. "max error" is against float64 and relative to the largest value; "error / eager's" the
    worst result's as a multiple of the baseline's. Columns that nobody fills are left out.
    """
    timed = [name for name, row in case.rows.items() if "seconds" in row]
    rows = [_cells(name, case.rows[name], case.baseline) for name in sorted(timed, key=lambda n: case.of(n, "seconds"))]
    used = [i for i in range(len(COLUMNS)) if i == 0 or any(row[i] not in ("-", "") for row in rows)]
    lines = [tuple(COLUMNS[i] for i in used), *(tuple(row[i] for i in used) for row in rows)]
    blocks = [f"{case.op}, {case.name}: {described(case.params)}", *([_aligned(lines)] if rows else [])]
    return "\n\n".join([*blocks, *_not_timed(case)])


def _not_timed(case: CaseRows) -> list[str]:
    """One paragraph that names who was not timed, together with those of the same reason; [] for nobody."""
    reasons: dict[str, list[str]] = {}
    for name, row in case.rows.items():
        if "seconds" not in row:
            why = "passed the gate" if row["status"] == "ok" else row["status"].removeprefix("skipped: ")
            reasons.setdefault(" ".join(why.split())[:120], []).append(name)
    text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return [f"Not timed: {text}"] if text else []


def goals_table(goals: list[Row]) -> str:
    """One line a goal and case; "" without goals."""
    head = ("goal", "case", "measured", "limit", "met")
    lines = [
        (goal["goal"], goal["case"], f"{goal['measured']:.3g}", goal["limit"], "yes" if goal["met"] else "no")
        for goal in goals
    ]
    return _aligned([head, *lines]) if lines else ""


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def origin(record: dict[str, Any]) -> str:
    """Where, when and with what a file was measured, in a line."""
    machine, commit = record["machine_info"], record["commit_info"]["id"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    quick = "; quick" if record.get("quick") else ""
    where = f"{machine['device_name']} ({machine['threads']} threads), {record['datetime'][:10]}"
    return f"{where}, commit {commit}; {versions}{quick}"


def show(path: Path) -> None:
    """Print a result file's tables and draw its plot; nothing for another kind of JSON."""
    record = json.loads(path.read_text())
    if not (cases := cases_of(record)):
        return
    goals = goals_table(record["goals"])
    print("\n\n".join([origin(record), *map(table, cases), *([goals] if goals else [])]) + "\n")
    drawn = draw(cases, record["machine_info"], path.with_suffix(".png"))
    print(f"{path}" + (f" and {drawn.name}" if drawn else " (no plot: nothing timed, or matplotlib is not installed)"))


if __name__ == "__main__":
    for file in sys.argv[1:]:
        show(Path(file))
