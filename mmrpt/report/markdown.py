"""Small pieces of GitHub Markdown: escaped text, tables, numbers."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import quote

from mmrpt.report.statistics import Interval

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~$&#])")


def escape(text: object) -> str:
    """Text that Markdown shows as it is, also inside a table cell; line breaks become a visible mark."""
    return _SPECIAL.sub(r"\\\1", str(text)).replace("\r", "").replace("\n", " ⏎ ")


def code(text: object) -> str:
    """A code span; characters that would end it or split a table cell are replaced."""
    plain = str(text).replace("`", "'").replace("|", "¦").replace("\n", " ")
    return f"`{plain}`" if plain.strip() else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table; cells are Markdown already. Columns whose index is in `right` are right-aligned."""
    aligned = set(right)
    rule = ["---:" if column in aligned else "---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def picture(path: str, label: str) -> str:
    """An image, 168 pixels wide; `path` is relative to the report."""
    shown = html.escape(label).replace("|", "&#124;")  # a bare bar would split a table cell
    return f'<img src="{quote(path)}" width="168" alt="{shown}">'


def percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def points(value: float) -> str:
    """A difference of rates in percentage points, signed."""
    return f"{100 * value:+.1f}"


def interval_of(interval: Interval | None, show: Callable[[float], str]) -> str:
    return f" ({show(interval.low)} to {show(interval.high)})" if interval else ""


def figure(value: float) -> str:
    """A number to three significant digits; a dash for NaN."""
    return f"{value:.3g}" if math.isfinite(value) else "–"


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60:02d} s"
