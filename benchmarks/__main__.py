"""Run operators' benchmarks, each in a process of its own, and write what was measured.

    python -m benchmarks                      every operator that has a benchmark
    python -m benchmarks logprobs divergence  these two
    python -m benchmarks step                 one optimiser step of a 0.5B model by part (long; only when named)

Names come first. --results names the folder of the JSON files and plots, --budget the seconds for all together; other
options go to pytest: --quick --device --threads --only --contenders, and pytest-benchmark's own, such as
--benchmark-autosave and --benchmark-compare. The exit code is 0 when every benchmark's was.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.goals import cases_of
from benchmarks.measure import RESULTS, result_path
from benchmarks.plot import draw

HERE = Path(__file__).resolve().parent
GRACE = 20.0  # seconds of a share kept for imports, compilation and the last case
LONG = {"step": 1200.0}  # seconds; run only when named
WRITING = 15.0  # seconds for pytest to write what it has, when it is interrupted


def operators() -> list[str]:
    """What has a benchmark of minutes: the files bench_<name>.py of this folder, but for the long ones."""
    return sorted({path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py")} - set(LONG))


def command_of(name: str, options: Sequence[str], results: Path) -> list[str]:
    """Pytest over an operator's file, which writes <results>/<name>.json.tmp."""
    quiet = [] if any(word.startswith("--benchmark-compare") for word in options) else ["--benchmark-quiet"]
    store = ["--benchmark-json", str(results / f"{name}.json.tmp")]
    words = ["-q", "-rfE", "--disable-warnings", *quiet, *store, *options]
    return [sys.executable, "-m", "pytest", str(HERE / f"bench_{name}.py"), *words]


def run_one(command: Sequence[str], limit: float) -> tuple[int, str]:
    """Exit code (124: stopped) and output. What is stopped may first write what it has measured."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    # Started from a shell's background, this process ignores interrupts, and what it starts would too.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=HERE.parent, preexec_fn=heard, **pipes)
    try:
        output = process.communicate(timeout=limit)[0]
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        output = process.communicate(timeout=WRITING)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0]
    return 124, f"{output}\nFAILED: stopped after {limit:.0f} s"


def keep(name: str, results: Path) -> None:
    """Give what pytest wrote its name, which says where it was measured, and draw its plot."""
    written = results / f"{name}.json.tmp"
    if not written.exists() or written.stat().st_size == 0:
        return
    record = json.loads(written.read_text())
    machine = record["machine_info"]
    path = result_path(results, name, machine["device"], machine["device_name"])
    written.replace(path)
    drawn = draw(cases_of(record), machine, path.with_suffix(".png"))
    print(f"written: {path}" + (f" and {drawn.name}" if drawn else ""), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    known = [*operators(), *LONG]
    usage = f"python -m benchmarks [name ...] [--budget SECONDS] [options of pytest]; names: {', '.join(known)}"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, allow_abbrev=False)
    parser.add_argument("--budget", type=float, help="seconds for all together (default 120 each; step 1200)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for JSON and plots")
    words = list(sys.argv[1:] if argv is None else argv)
    # The options' own values are words too, so names are what stands before the first option.
    named = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    args, options = parser.parse_known_args(words[len(named) :])
    if wrong := [name for name in named if name not in known]:
        parser.error(f"unknown benchmark {', '.join(wrong)}; expected some of {', '.join(known)}")
    names, results = named or operators(), args.results.absolute()
    if importlib.util.find_spec("pytest_benchmark") is None:
        parser.error("pytest-benchmark is not installed: pip install -e '.[bench]'")
    results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (args.budget or sum(LONG.get(name, 120.0) for name in names))
    codes = {}
    for place, name in enumerate(names):
        share = max((end - time.monotonic()) / (len(names) - place), 1.0)
        print(f"\nbenchmark of {name}, {share:.0f} s ...", flush=True)
        # A budget that was asked for is kept: what is left of it is the hard limit of every benchmark.
        limit = min(share + GRACE, end - time.monotonic()) if args.budget else 3 * share
        reserve, own = min(GRACE, 0.3 * share), args.budget or name in LONG
        options_here = [*options, *(("--budget", f"{max(share - reserve, 1.0):.0f}") if own else ())]
        codes[name], output = run_one(command_of(name, options_here, results), max(limit, 1.0))
        print(output.strip(), flush=True)
        keep(name, results)
    failed = [name for name in names if codes[name] != 0]
    print(f"\n{len(names) - len(failed)} of {len(names)} benchmarks done" + (f"; FAILED: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
