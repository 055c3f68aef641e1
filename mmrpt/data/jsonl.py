"""JSON lines on disk: whole files written atomically, growing files flushed row by row and healed after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(", ", ": "))


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows to `path`, one JSON object a line, and return how many.

    Readers see the old file or the new one, never a part: the rows go to a temporary name in the same folder, which
    is renamed when it is complete. Nothing is left behind when `rows` raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(_line(row) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read all rows of `path`. A last line without its newline was cut off by a crash and is left out.

    Raises ValueError with file and line number when any other line is not a JSON object.
    """
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and not _is_object(line):
                break
            if line.strip():
                rows.append(parse_row(line, f"{path}:{number}"))
    return rows


def parse_row(line: bytes | str, where: str) -> dict[str, Any]:
    """Parse one line as a JSON object; errors name `where` (file:line)."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where}: expected one JSON object a line, got broken JSON ({error}). Mend the line."
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}. Write one object a line.")
    return row


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


class JsonlWriter:
    """Append rows to a JSON lines file, each flushed as it is written, so that a kill loses at most one row.

    Opening a file whose last line was torn by a crash removes that line (or completes it when only its newline is
    missing), so that the next row starts on a line of its own. Use it as a context manager or call `close`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _heal(self.path)
        self._file = open(self.path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115  closed by close()

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(_line(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _heal(path: Path) -> None:
    """Cut a torn last line off, or give a whole one its missing newline."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "r+b") as file:
        data = file.read()
        if data.endswith(b"\n"):
            return
        start = data.rfind(b"\n") + 1
        if _is_object(data[start:]):
            file.write(b"\n")
        else:
            file.truncate(start)
