"""What pytest-benchmark lacks: timing in turns, with device events on a GPU; peak memory; where and with what."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "RESULTS",
    "device_name",
    "held_bytes",
    "peak_bytes",
    "provenance",
    "quartiles",
    "result_path",
    "time_in_turns",
]

Call = Callable[[], Any]

RESULTS = Path(__file__).resolve().parent / "results"

# Larger than the level-2 cache of any GPU so far (H200: 60 MB, B200: 126 MB).
L2_FLUSH_BYTES = 256 * 2**20
# A CPU sample shorter than this repeats the call: the clock's and the interpreter's own cost stays under a per cent.
MIN_SAMPLE_SECONDS = 2e-3
# The profiler that sees CPU memory greets on stderr at every start unless told not to.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
DISTRIBUTIONS = ("torch", "triton", "transformers", "numpy", "liger-kernel", "cut-cross-entropy", "trl", "verl")


def quartiles(values: Sequence[float]) -> list[float]:
    """Median, lower and upper quartile; of a single value, that value three times."""
    if len(values) < 2:
        return [values[0]] * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return [median, low, high]


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


class _CudaSampler:
    """Times one call with events on the current stream, after flushing the level-2 cache.

    Calls are queued without waiting, so a call's launch cost counts only where the GPU runs dry, as in training;
    `seconds` waits once.
    """

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
        self.device = device

    def start(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        return begin, end

    def seconds(self, events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


def _rounds(seconds: list[float], budget: float, low: int, high: int) -> int:
    return max(low, min(high, int(budget / max(sum(seconds), 1e-9))))


def time_in_turns(
    calls: Sequence[Call], device: torch.device, *, budget: float, low: int = 5, high: int = 50
) -> list[list[float]]:
    """Seconds of every call in every round: list over calls of lists over rounds, all of one length.

    Every round runs every call once, in an order that turns by one each round, so that a drifting clock or a noisy
    neighbour meets all contenders alike and the ratio within a round means something.

    Args:
        calls: warm already (compilation, caches, allocator).
        budget: seconds to spend after one call each; between `low` and `high` rounds are run whatever it says.
    """
    first = []
    for call in calls:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        first.append(time.perf_counter() - start)
    gc.collect()
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        if device.type == "cuda":
            return _time_cuda(calls, device, _rounds(first, budget, low, high))
        return _time_cpu(calls, first, budget, low, high)
    finally:
        if was_collecting:
            gc.enable()


def _time_cpu(calls: Sequence[Call], first: list[float], budget: float, low: int, high: int) -> list[list[float]]:
    repeats = [max(1, min(1000, int(MIN_SAMPLE_SECONDS / max(seconds, 1e-9)))) for seconds in first]
    per_round = [seconds * times for seconds, times in zip(first, repeats, strict=True)]
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(_rounds(per_round, budget, low, high)):
        for step in range(len(calls)):
            i = (step + turn) % len(calls)
            samples[i].append(_cpu_seconds(calls[i], repeats[i]))
    return samples


def _time_cuda(calls: Sequence[Call], device: torch.device, rounds: int) -> list[list[float]]:
    sampler = _CudaSampler(device)
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for turn in range(rounds):
        for step in range(len(calls)):
            i = (step + turn) % len(calls)
            events[i].append(sampler.start(calls[i]))
        if turn % 8 == 7:  # keeps the queue, and with it the memory held by results in flight, short
            torch.cuda.synchronize(device)
    return [sampler.seconds(pairs) for pairs in events]


def peak_bytes(call: Call, device: torch.device) -> int:
    """Highest device memory of one call above what was live before it, in bytes; its results count.

    CUDA: the caching allocator's peak. CPU: every allocation and release of PyTorch's CPU allocator as its profiler
    sees it, operators inside custom ops included; scratch that a math library allocates by itself is not seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    changes = _allocations(call)[0]
    return max(accumulate(changes), default=0)


def held_bytes(call: Call, device: torch.device) -> int:
    """Memory that a call leaves above what was live before it, in bytes: its results and what autograd saved for them.

    Seen as by `peak_bytes`.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = call()
        held = torch.cuda.memory_allocated(device) - before
        del result
        return held
    changes, result = _allocations(call)
    del result
    return sum(changes)


def _allocations(call: Call) -> tuple[list[int], Any]:
    """Bytes that PyTorch's CPU allocator gave (above 0) and took back while a call ran, in order; and its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())], result


def device_name(device: torch.device) -> str:
    """The device's marketing name; for a CPU what the kernel calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def result_path(folder: Path, name: str, device: str, device_name: str) -> Path:
    """<folder>/<name>-<device>.json: "cpu" for any CPU, a GPU by its name, so that two GPUs keep their own files."""
    where = "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return folder / f"{name}-{where}.json"


def _commit() -> str:
    """The checkout's commit, with "+" when files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("MMRPT_COMMIT", "unknown")
    try:
        run = ["git", "-C", str(root)]
        head = subprocess.run([*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        # Results are written while the benchmarks run; only a change of the code makes the commit untrue.
        changed = subprocess.run(
            [*run, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def provenance(device: torch.device) -> dict[str, Any]:
    """Where, when and with what: stands in every result file."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": device_name(device),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
