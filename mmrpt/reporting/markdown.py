"""Small pieces of GitHub Markdown: escaped text, tables, bars of block characters, token strips."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from mmrpt.metrics import Interval

BARS = "▁▂▃▄▅▆▇█"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~$&#])")
# How byte-level BPE vocabularies write a space and a line break in a token's raw form.
_BYTE_LEVEL = str.maketrans({"Ġ": " ", "Ċ": "\n"})


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
    lines = [list(header), rule, *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(path: str, label: str, width: int) -> str:
    """An image of fixed width in pixels; `path` is relative to the report."""
    shown = html.escape(label).replace("|", "&#124;")  # a bare bar would split a table cell
    return f'<img src="{quote(path)}" width="{width}" alt="{shown}">'


def bar(value: float, low: float, high: float) -> str:
    """One block character: its height is where value lies between low and high; a space for NaN."""
    if not math.isfinite(value):
        return " "
    share = (value - low) / (high - low) if high > low else 0.0
    return BARS[min(len(BARS) - 1, max(0, int(share * len(BARS))))]


def token_strip(tokens: Sequence[str], heights: Sequence[float], strong: Sequence[bool] | None = None) -> str:
    """Tokens in a row, each followed by a bar of its height between the row's smallest and largest; strong ones bold.

    Shorter of the lists wins. HTML tags, since Markdown's stars do not close beside punctuation and spaces.
    """
    finite = [height for height in heights if math.isfinite(height)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    marks = strong if strong is not None else [False] * len(tokens)
    parts = []
    for token, height, mark in zip(tokens, heights, marks, strict=False):
        text = token.translate(_BYTE_LEVEL)
        gap, shown = " " if text[:1].isspace() else "", escape(text.strip(" ")) or "␣"
        parts.append(f"{gap}{f'<b>{shown}</b>' if mark else shown}<sub>{bar(height, low, high)}</sub>")
    return "".join(parts).strip()


def percent(rate: float) -> str:
    return f"{100 * rate:.1f} %" if math.isfinite(rate) else "–"


def percent_with(rate: float, interval: Interval) -> str:
    """A rate in per cent with its interval."""
    return f"{100 * rate:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})" if math.isfinite(rate) else "–"


def figure(value: float, digits: int = 3) -> str:
    """A number to some significant digits; a dash for NaN."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "–"
