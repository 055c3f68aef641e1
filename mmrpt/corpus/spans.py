"""Rows that are byte ranges of one file: lines of JSON, entries of a JSON list, records of a CSV file.

Opening such a file finds the ranges in one pass with bounded memory (24 bytes a row); rows are parsed when asked for.
"""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmrpt.corpus.images import ImageFinder
from mmrpt.corpus.rows import CAPTION_COLUMNS, BadRow, CorpusError, Row, caption_column, row_of

MAX_ROW_BYTES = 1 << 24
BLOCK = 1 << 22
SWEEP = 1 << 18  # bytes of rows read together
_KINDS = np.zeros(256, np.int8)  # what a byte is to the structure of JSON; 0: nothing
_OPEN, _CLOSE, _COMMA, _QUOTE, _BACKSLASH, _NEWLINE = range(1, 7)
for _bytes, _kind in ((b"[{", 1), (b"]}", 2), (b",", 3), (b'"', 4), (b"\\", 5), (b"\n", 6)):
    _KINDS[list(_bytes)] = _kind


class ByteFile:
    """Reads byte ranges of a file; may be shared by threads, forked and pickled."""

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor, self._process = path, -1, -1

    def read(self, start: int, end: int) -> bytes:
        if self._process != os.getpid():  # also after a fork, so that no process closes another's
            self._descriptor, self._process = os.open(self.path, os.O_RDONLY), os.getpid()
        return os.pread(self._descriptor, end - start, start)

    def __getstate__(self) -> dict[str, Path | int]:
        return {"path": self.path, "_descriptor": -1, "_process": -1}

    def __del__(self) -> None:
        if self._process == os.getpid():
            os.close(self._descriptor)


@dataclass(frozen=True)
class SpanIndex:
    """Row i is bytes starts[i] to ends[i]; its range begins on line lines[i] (white space first, perhaps)."""

    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray


class SpanTable:
    """A Table of byte ranges, each made a row by `parse`."""

    def __init__(
        self, path: Path, index: SpanIndex, parse: Callable[[bytes, str], Row], finder: ImageFinder, name: str = ""
    ) -> None:
        self.name, self._index, self._parse, self._finder = name or path.stem, index, parse, finder
        self._file = ByteFile(path)

    def __len__(self) -> int:
        return len(self._index.starts)

    def where(self, index: int) -> str:
        start = int(self._index.starts[index])
        return self._where(index, self._file.read(start, min(int(self._index.ends[index]), start + 4096)))

    def row(self, index: int) -> Row:
        start, end = int(self._index.starts[index]), int(self._index.ends[index])
        return self._made(index, self._file.read(start, min(end, start + MAX_ROW_BYTES + 1)))

    def rows(self) -> Iterator[Row | BadRow]:
        block, first = b"", 0
        for index, (start, end) in enumerate(zip(self._index.starts, self._index.ends, strict=True)):
            start, end = int(start), min(int(end), int(start) + MAX_ROW_BYTES + 1)
            if end > first + len(block):
                block, first = self._file.read(start, max(end, start + SWEEP)), start
            try:
                yield self._made(index, block[start - first : end - first])
            except BadRow as error:
                yield error

    def picture(self, index: int, row: Row) -> Path:
        return self._finder.find(row.image, row.where)

    def _where(self, index: int, head: bytes) -> str:
        blank = head[: len(head) - len(head.lstrip())]
        return f"{self._file.path}:{int(self._index.lines[index]) + blank.count(10)}"

    def _made(self, index: int, data: bytes) -> Row:
        where = self._where(index, data)
        if len(data) > MAX_ROW_BYTES:
            reason = f"the row is longer than {MAX_ROW_BYTES >> 20} MiB. Expected a path and a caption; shorten it."
            raise BadRow(where, "row_too_long", reason)
        return self._parse(data, where)


def index_of(starts: array, ends: array, lines: array) -> SpanIndex:
    return SpanIndex(*(np.array(values, dtype=np.int64) for values in (starts, ends, lines)))


def index_lines(path: Path) -> SpanIndex:
    """The lines of a file that are not blank."""
    starts, ends, lines = array("q"), array("q"), array("q")
    position, number = 0, 1
    with open(path, "rb") as file:
        while piece := file.readline(BLOCK):
            start, blank = position, not piece.strip()
            while not piece.endswith(b"\n") and (rest := file.readline(BLOCK)):  # a line longer than a block
                position += len(piece)
                piece, blank = rest, blank and not rest.strip()
            position += len(piece)
            if not blank:
                starts.append(start), ends.append(position), lines.append(number)
            number += 1
    return index_of(starts, ends, lines)


# ---------------------------------------------------------------- entries of a JSON list


def index_list(path: Path) -> SpanIndex:
    """The entries of a JSON list: what stands between its brackets and the commas that lie in no entry.

    Nothing is parsed: an entry that is broken inside spoils itself alone. What follows the list, and what a torn file
    ends with, are rows too, so that both are named as bad ones.
    """
    cuts, lines = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    scan = _ListScan()
    with open(path, "rb") as file:
        skip_head(file)
        scan.position = file.tell()
        while block := file.read(BLOCK):
            found, on_line = scan.cuts(np.frombuffer(block, np.uint8))
            cuts.append(found), lines.append(on_line)
        size = file.tell()
    places, on_line = np.concatenate(cuts), np.concatenate(lines)
    starts, ends = places + 1, np.append(places[1:], size)
    blank = [not _holds_text(path, int(s), int(e)) for s, e in zip(starts[-2:], ends[-2:], strict=True)]
    keep = np.ones(len(starts), bool)
    if not scan.ended:  # torn: an empty row at the end, which no parser takes, also where whole entries came before
        starts, ends, on_line = np.append(starts, size), np.append(ends, size), np.append(on_line, scan.line)
        keep = np.append(keep, True)
    elif blank[-1]:  # nothing after the list
        keep[-1] = False
        if len(keep) == 2 and blank[0]:  # an empty list
            keep[0] = False
    return SpanIndex(starts[keep], ends[keep], on_line[keep])


def skip_head(file: BinaryIO) -> None:
    """Past a byte order mark."""
    file.seek(3 if file.read(3) == b"\xef\xbb\xbf" else 0)


def _holds_text(path: Path, start: int, end: int) -> bool:
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and (block := file.read(min(BLOCK, end - start))):
            if block.strip():
                return True
            start += len(block)
    return False


class _ListScan:
    """Finds the opening bracket, the commas and the closing bracket of a JSON list, block by block."""

    def __init__(self) -> None:
        self.position, self.line, self.depth = 0, 1, 0
        self.in_string = self.ended = False
        self.backslashes = 0  # how many stand at the end of the block before, modulo 2

    def cuts(self, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Absolute places of the cuts in this block, and the line each is on."""
        kinds = _KINDS[block]
        places = np.flatnonzero(kinds)
        kinds = kinds[places]
        quotes = places[kinds == _QUOTE]
        quotes = quotes[~self._escaped(len(block), places[kinds == _BACKSLASH], quotes)]
        newlines = places[kinds == _NEWLINE]
        marks, kinds = places[kinds <= _COMMA], kinds[kinds <= _COMMA]
        outside = (np.searchsorted(quotes, marks) + self.in_string) % 2 == 0
        marks, kinds = marks[outside], kinds[outside]
        change = (kinds == _OPEN).astype(np.int64) - (kinds == _CLOSE)
        after = self.depth + np.cumsum(change)
        before = after - change
        ends = np.flatnonzero(after <= 0)  # the list's own bracket closes, and cuts end
        cut = ((before == 0) & (after == 1)) | ((after == 1) & (change == 0)) | ((before == 1) & (after == 0))
        cut[ends[0] + 1 if len(ends) else len(cut) :] = False
        chosen = marks[cut & (not self.ended)]
        self.ended |= len(ends) > 0
        lines = self.line + np.searchsorted(newlines, chosen)
        places = chosen + self.position
        self.position += len(block)
        self.line += len(newlines)
        self.depth = int(after[-1]) if len(after) else self.depth
        self.in_string ^= len(quotes) % 2 == 1
        return places, lines

    def _escaped(self, size: int, slashes: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """Which quotes of a block of `size` bytes follow an odd number of backslashes."""
        first = np.ones(len(slashes), bool)
        first[1:] = np.diff(slashes) > 1
        run_start = np.maximum.accumulate(np.where(first, slashes, 0)) if len(slashes) else slashes
        length = slashes - run_start + 1 + np.where(run_start == 0, self.backslashes, 0)
        before = np.searchsorted(slashes, quotes) - 1
        follows = (before >= 0) & (slashes[before] == quotes - 1) if len(slashes) else np.zeros(len(quotes), bool)
        escaped = np.zeros(len(quotes), bool)
        escaped[follows] = length[before[follows]] % 2 == 1
        if len(quotes) and quotes[0] == 0:
            escaped[0] = self.backslashes % 2 == 1
        at_end = len(slashes) and slashes[-1] == size - 1
        self.backslashes = int(length[-1]) % 2 if at_end else 0
        return escaped


# ---------------------------------------------------------------- records of a CSV file


def open_csv(path: Path, finder: ImageFinder, name: str) -> SpanTable:
    """The records of a CSV file with a header line, a record over several lines included."""
    starts, ends, lines = array("q"), array("q"), array("q")
    position, number = 0, 0

    def counted(file: BinaryIO) -> Iterator[str]:
        nonlocal position, number
        while line := file.readline(BLOCK):
            position += len(line)
            number += line.endswith(b"\n")
            yield line.decode("latin-1")  # never fails; quotes, commas and line ends are those of UTF-8

    with open(path, "rb") as file:
        reader = csv.reader(counted(file))
        while True:
            start, line = position, number
            try:
                record = next(reader)
            except StopIteration:
                break
            except csv.Error:  # too long a field: the bytes it took are a row, which is named when it is read
                record = ["?"]
            if record:
                starts.append(start), ends.append(position), lines.append(line + 1)
    index = index_of(starts, ends, lines)
    if not len(index.starts):
        raise CorpusError(f"{path}: the file is empty. Expected a header line with file_name and text.")
    with open(path, "rb") as file:
        header = file.read(int(index.ends[0])).decode("utf-8-sig", errors="replace")
    columns = next(csv.reader(header.splitlines()))
    if "file_name" not in columns or caption_column(columns) is None:
        raise CorpusError(
            f"{path}:1: got the columns {columns}; expected file_name and {' or '.join(CAPTION_COLUMNS)}. Rename them."
        )
    body = SpanIndex(index.starts[1:], index.ends[1:], index.lines[1:])
    return SpanTable(path, body, partial(_parse_record, tuple(columns)), finder, name)


def _parse_record(columns: tuple[str, ...], data: bytes, where: str) -> Row:
    try:
        records = list(csv.reader(data.decode().splitlines(keepends=True)))
    except UnicodeDecodeError:
        raise BadRow(where, "not_utf8", "the row is not UTF-8. Save the file as UTF-8 or remove the row.") from None
    except csv.Error as error:
        raise BadRow(where, "not_csv", f"the row cannot be read ({error}). Check its quotes.") from None
    if len(records) != 1 or len(records[0]) != len(columns):
        got = f"{len(records[0])} cells" if len(records) == 1 else f"{len(records)} records"
        raise BadRow(where, "not_csv", f"got {got}, expected {len(columns)} cells. Quote cells that hold commas.")
    entry = dict(zip(columns, records[0], strict=True))
    return row_of({name: cell for name, cell in entry.items() if cell or name != "id"}, where)
