"""The folder of a run: settings, metrics, samples and pictures, each file readable by a person at any time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from mmrpt.data.jsonl import JsonlWriter, read_jsonl, write_jsonl

PHASES = ("sight", "warmup", "rl", "control")
STEP_FILES = ("metrics.jsonl", "samples.jsonl", "perception.jsonl")


class RunLog:
    """Appends rows to the run's JSON-lines files; `rewind` drops what a resumed phase is going to write again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._writers: dict[str, JsonlWriter] = {}
        self._started = time.perf_counter()

    def write(self, file: str, row: dict[str, Any]) -> None:
        if file not in self._writers:
            self._writers[file] = JsonlWriter(self.folder / file)
        self._writers[file].write(row)

    def metrics(self, phase: str, step: int, **values: Any) -> None:
        seconds = round(time.perf_counter() - self._started, 3)
        self.write("metrics.jsonl", {"phase": phase, "step": step, "seconds": seconds, **values})

    def rewind(self, phase: str, step: int) -> None:
        """Forgets rows of `phase` at or past `step`, and all rows of later phases."""
        later = PHASES[PHASES.index(phase) + 1 :]
        for name in STEP_FILES:
            path = self.folder / name
            if not path.exists():
                continue
            rows = read_jsonl(path)
            kept = [
                r
                for r in rows
                if r.get("phase", "rl") not in later and not (r.get("phase", "rl") == phase and r["step"] >= step)
            ]
            if len(kept) < len(rows):
                self.close(name)
                write_jsonl(path, kept)

    def close(self, *names: str) -> None:
        for name in names or tuple(self._writers):
            writer = self._writers.pop(name, None)
            if writer is not None:
                writer.close()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name, then renames."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for the report."""
    import transformers

    import mmrpt

    return {
        "date": time.strftime("%Y-%m-%d"),
        "mmrpt": mmrpt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        out = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None
