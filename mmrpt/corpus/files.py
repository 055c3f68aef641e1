"""Files on disk: whole files written atomically, growing JSON lines flushed row by row and healed after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` when the block ends, whole and on disk, or not at all.

    It is written under a temporary name in the same folder (which is made if needed), synced, and renamed. When the
    block raises, the old file stays and nothing else is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk: a rename may otherwise outlive, in a power cut, what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, content: bytes) -> Path:
    with atomic_file(path) as file:
        file.write(content)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    return write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> Path:
    return write_bytes(path, _encode(value, indent=2))


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows to `path`, one JSON object a line, and return how many. Nothing is left behind when `rows` raises."""
    count = 0
    with atomic_file(path) as file:
        for row in rows:
            file.write(_encode(row))
            count += 1
    return count


def _encode(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold as an escape alone
        return json.dumps(value, indent=indent).encode() + b"\n"


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of `path`; see `iter_jsonl`."""
    return list(iter_jsonl(path))


def iter_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of `path` one by one. A last line without its newline was cut off by a crash and is left out.

    Raises ValueError with file and line number when any other line is not a JSON object.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_object(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}:{number}: {error}") from None
            yield row


def parse_object(data: bytes) -> dict[str, Any]:
    """One JSON object in UTF-8. Raises ValueError (UnicodeDecodeError where it is no UTF-8) with what to mend."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except RecursionError:
        raise ValueError("JSON nested too deeply to be read; expected one flat object. Mend or remove it.") from None
    except ValueError as error:
        reason = str(error)[:200]
        raise ValueError(f"broken JSON ({reason}); expected one JSON object a line. Mend or remove it.") from None
    if not isinstance(value, dict):
        raise ValueError(f"got a JSON {type(value).__name__}, expected a JSON object. Mend or remove it.")
    return value


class JsonlWriter:
    """Append rows to a JSON lines file, each flushed as it is written, so that a kill loses at most one row.

    Opening a file whose last line was torn by a crash removes that line (or completes it when only its newline is
    missing), so that the next row starts on a line of its own. Use it as a context manager or call `close`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _heal(self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115  closed by close()

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(_encode(row))
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
    """Cut a torn last line off, or give a whole one its missing newline. Reads the last line alone."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "r+b") as file:
        tail, start = b"", file.seek(0, os.SEEK_END)
        while start > 0 and b"\n" not in tail:
            size = min(start, 1 << 16)
            start = file.seek(start - size)
            tail = file.read(size) + tail
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return
        try:
            parse_object(torn)
        except ValueError:
            file.truncate(start + len(tail) - len(torn))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
