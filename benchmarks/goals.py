"""Result files as cases and rows, and goals judged from them: what every operator's `goals` is written with.

def goals(cases, device):
    found = Goals()
    for case in cases:
        found.at_most("time / bare products", case.name, case.of("triton", "of_floor"), 1.10)
    return found.rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["CaseRows", "Goals", "cases_of", "ratio", "worst_error_ratio"]

Row = dict[str, Any]
NO_ERROR = 1e-12  # a yardstick that happens to be exact
LOSS = "value"  # what harness.with_backward calls it


class Goals:
    """Rows {"goal", "case", "measured", "limit", "met"}; where what a goal takes was not measured there is none."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def at_least(self, goal: str, case: str, measured: float | None, limit: float) -> None:
        self._judge(goal, case, measured, f">= {limit:g}", measured is not None and measured >= limit)

    def at_most(self, goal: str, case: str, measured: float | None, limit: float) -> None:
        self._judge(goal, case, measured, f"<= {limit:g}", measured is not None and measured <= limit)

    def _judge(self, goal: str, case: str, measured: float | None, limit: str, met: bool) -> None:
        if measured is not None:
            self.rows.append({"goal": goal, "case": case, "measured": measured, "limit": limit, "met": met})


class CaseRows:
    """One case of an operator: its params, and a row of `harness.compare` by contender. None: not measured."""

    def __init__(self, op: str, name: str, params: dict[str, Any], rows: dict[str, Row]) -> None:
        self.op, self.name, self.params, self.rows = op, name, params, rows

    @property
    def baseline(self) -> Row:
        return next((row for row in self.rows.values() if row["kind"] == "baseline"), {})

    def of(self, contender: str | None, what: str) -> float | None:
        """ "seconds", "speedup" or "of_floor" (medians), "peak_bytes" or another number of a contender's row."""
        value = self.rows.get(contender, {}).get(what)
        return value[0] if isinstance(value, list) else value

    def fastest(self, chosen: Callable[[str, Row], bool]) -> str | None:
        """The name of the contender with the least time among those of which chosen(name, row) is true."""
        timed = [name for name, row in self.rows.items() if "seconds" in row and chosen(name, row)]
        return min(timed, key=lambda name: self.of(name, "seconds")) if timed else None

    def error_ratio(self, contender: str, yardstick: str) -> float | None:
        return worst_error_ratio(self.rows.get(contender, {}), self.rows.get(yardstick, {}))


def cases_of(record: dict[str, Any]) -> list[CaseRows]:
    """The cases of a file that pytest-benchmark wrote with what `conftest.py` adds; [] for another kind of file."""
    if "machine_info" not in record:
        return []
    cases = {(one["op"], one["name"]): CaseRows(**one, rows={}) for one in record["cases"]}
    for bench in record["benchmarks"]:
        where = bench["params"]
        stats = bench["stats"]
        timed = {"seconds": [stats[key] for key in ("median", "q1", "q3")], "rounds": stats["rounds"]}
        cases[bench["extra_info"]["op"], where["case"]].rows[where["contender"]] = bench["extra_info"] | timed
    for row in record["not_timed"]:
        cases[row["op"], row["case"]].rows[row["contender"]] = row
    return list(cases.values())


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below, None where either is missing."""
    return above / below if above is not None and below else None


def worst_error_ratio(row: Row, yardstick: Row) -> float | None:
    """The largest, over results, of a row's error against float64 as a multiple of the yardstick's own; of losses, one
    number that either may hit by luck, where there is nothing else."""
    errors, own = row.get("errors") or {}, yardstick.get("errors") or {}
    shared = [name for name in errors if name in own]
    names = [name for name in shared if name != LOSS] or shared
    return max((errors[name] / max(own[name], NO_ERROR) for name in names), default=None)
