"""Read the files of runs/<name>/, whole or cut short.

A run may have been killed at any moment: the last line of a file may be torn, a resumed run may have written a step
twice, a metric may be NaN, a file may not exist. Whatever is unusable is left out and named in `problems`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

Row = dict[str, Any]

PHASES = ("sight", "warmup", "rl", "control")


class RunFiles:
    """One run folder; each file is read when first asked for and kept. `problems` fills as files are read."""

    def __init__(self, run_dir: Path | str) -> None:
        self.folder = Path(run_dir)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not a folder: pass a run folder, such as runs/demo")
        self.problems: list[str] = []
        self._cache: dict[str, Any] = {}

    def rows(self, name: str) -> list[Row]:
        """The JSON lines of a file, in order; [] when it is absent."""
        return self._once(name, self._read_lines, [])

    def document(self, name: str) -> Row:
        """A JSON or YAML document; {} when it is absent."""
        return self._once(name, self._read_document, {})

    def phase(self, phase: str) -> list[Row]:
        """Rows of one phase of metrics.jsonl by ascending step, the last writing of each step."""
        rows = [row for row in self.rows("metrics.jsonl") if row.get("phase") == phase and "step" in row]
        by_step = {row["step"]: row for row in rows}
        return [by_step[step] for step in sorted(by_step)]

    def replayed(self, name: str) -> list[Row]:
        """Rows of a per-step file as one uninterrupted run would have written them.

        A resumed run goes back to its last checkpoint and writes the steps after it again: when the step falls, the
        earlier rows from there on are dropped.
        """
        kept: list[Row] = []
        for row in self.rows(name):
            if "step" not in row:
                continue
            if kept and row["step"] < kept[-1]["step"]:
                kept = [earlier for earlier in kept if earlier["step"] < row["step"]]
            kept.append(row)
        return kept

    def _once(self, name: str, read: Callable[[Path], Any], empty: Any) -> Any:
        if name not in self._cache:
            path = self.folder / name
            self._cache[name] = read(path) if path.is_file() else empty
            if not path.is_file():
                self.problems.append(f"`{name}` is not there")
        return self._cache[name]

    def _read_lines(self, path: Path) -> list[Row]:
        lines = path.read_bytes().split(b"\n")
        rows: list[Row] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:  # bad JSON or a cut UTF-8 character
                torn = number == len(lines)  # a whole line ends with a newline
                self.problems.append(
                    f"`{path.name}` line {number} is {'cut short (the run was stopped there)' if torn else 'not JSON'}"
                )
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                self.problems.append(f"`{path.name}` line {number} is {type(row).__name__}, expected an object")
        return rows

    def _read_document(self, path: Path) -> Row:
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError):
            self.problems.append(f"`{path.name}` cannot be parsed")
            return {}
        if not isinstance(content, dict):
            self.problems.append(f"`{path.name}` holds {type(content).__name__}, expected an object")
            return {}
        return content


def number(row: Row, key: str) -> float:
    """row[key] as a float; NaN when it is absent, null or not a number."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def column(rows: Iterable[Row], key: str) -> NDArray[np.float64]:
    """(N,) one key of N rows, NaN where it is absent."""
    return np.array([number(row, key) for row in rows], dtype=np.float64)


def has_values(rows: Iterable[Row], key: str) -> bool:
    return bool(np.isfinite(column(rows, key)).any())


def flatten(settings: Row, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b.c": value}; an empty group keeps its name."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def find_setting(settings: Row, key: str) -> Any:
    """The first value under `key` at any depth of nested settings, or None."""
    if key in settings:
        return settings[key]
    for value in settings.values():
        if isinstance(value, dict) and (found := find_setting(value, key)) is not None:
            return found
    return None


def plot_path(run_dir: Path | str, name: str) -> Path:
    return Path(run_dir) / "plots" / f"{name}.png"


def image_name(example_id: str, suffix: str = "") -> str:
    """File name under images/ of an example: its id with / replaced by _, as the trainer names it."""
    return f"{example_id.replace('/', '_')}{suffix}.png"


def write_atomically(path: Path, content: bytes) -> Path:
    """Write beside and rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path
