"""The folder of a run: phases, logs, wall times and the lock; each file readable by a person at any time."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from mmrpt.corpus import JsonlWriter, read_jsonl, write_json, write_jsonl
from mmrpt.settings import CONTROL_PHASES
from mmrpt.trackers import Trackers

# The phases that train, in order; each leaves checkpoints/<phase>.
PHASES = ("vision_pretraining", "warmup", "rl", *CONTROL_PHASES.values())
STEP_FILES = ("metrics.jsonl", "samples.jsonl", "perception.jsonl", "validation.jsonl")


class RunError(RuntimeError):
    """The run cannot go on; the message says why and how to mend it."""


class RunFolder:
    """Files of one run, in which one process at a time works (`lock`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._writers: dict[str, JsonlWriter] = {}
        self._lock: IO[str] | None = None
        self._started = time.perf_counter()
        self.trackers = Trackers(())

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def lock(self) -> None:
        """Holds the folder until the process ends. Raises RunError while another process holds it."""
        file = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  open as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise RunError(
                f"{self.path} is in use by another process (id {holder}): wait until it has ended, or stop it."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._lock = file

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---------------------------------------------------------------- logs

    def write(self, file: str, row: dict[str, Any]) -> None:
        """Appends a row to a JSON-lines file."""
        if file not in self._writers:
            self._writers[file] = JsonlWriter(self.path / file)
        self._writers[file].write(row)

    def metrics(self, phase: str, step: int, **values: Any) -> None:
        """A row of metrics.jsonl, and of the trackers. `seconds` are those of this process's work on the run."""
        row = {"seconds": round(time.perf_counter() - self._started, 3), **values}
        self.write("metrics.jsonl", {"phase": phase, "step": step, **row})
        self.trackers.log(phase, step, row)

    def rewind(self, phase: str, step: int) -> None:
        """Forgets rows of `phase` at or past `step`, and all rows of later phases."""
        later = PHASES[PHASES.index(phase) + 1 :]

        def stays(row: dict[str, Any]) -> bool:
            of = row.get("phase", "rl")
            return of not in later and not (of == phase and row["step"] >= step)

        for name in STEP_FILES:
            path = self.path / name
            if not path.exists():
                continue
            rows = read_jsonl(path)
            kept = [row for row in rows if stays(row)]
            if len(kept) < len(rows):
                self.close(name)
                write_jsonl(path, kept)

    def close(self, *names: str) -> None:
        for name in names or tuple(self._writers):
            writer = self._writers.pop(name, None)
            if writer is not None:
                writer.close()

    # ---------------------------------------------------------------- wall times, environment

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds a phase's wall time to seconds.json, over every process that worked on it."""
        seconds = self.seconds()
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds[phase] = round(seconds.get(phase, 0.0) + time.perf_counter() - start, 2)
            write_json(self.path / "seconds.json", seconds)

    def seconds(self) -> dict[str, float]:
        path = self.path / "seconds.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def record_environment(self, device: str) -> None:
        """environment.json: where the run began, and under "resumed" each other environment that went on with it."""
        path, now = self.path / "environment.json", environment(device)
        if path.exists():
            begun = json.loads(path.read_text())
            resumed = begun.pop("resumed", [])
            last = resumed[-1] if resumed else begun
            if any(last.get(name) != value for name, value in now.items() if name != "date"):
                resumed.append(now)
            now = {**begun, **({"resumed": resumed} if resumed else {})}
        write_json(path, now)


def environment(device: str) -> dict[str, Any]:
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
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "commit": _commit(),
    }


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere its family."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
