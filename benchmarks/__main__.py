"""Run operators' benchmarks, each in a process of its own, and print all tables at the end.

    python -m benchmarks                      every operator that has a benchmark
    python -m benchmarks logprobs divergence  these two
    python -m benchmarks end_to_end           the main job over several seeds (long; only when named)

Names come first. Options other than --budget (seconds for all together) go to each benchmark: --quick --device
--results --threads --only --contenders. The exit code is 0 when every benchmark's was.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
GRACE = 20.0  # seconds of a share kept for imports, compilation and the last case


def operators() -> list[str]:
    """Operators with a benchmark: the files of this folder that are named like a folder of mmrpt_kernels."""
    folders = {path.name for path in (HERE.parent / "mmrpt_kernels").iterdir() if path.is_dir()}
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem in folders)


def run_one(op: str, options: Sequence[str], limit: float) -> tuple[int, str]:
    """Exit code (124: stopped) and output of `python -m benchmarks.<op>`."""
    command = [sys.executable, "-m", f"benchmarks.{op}", *options]
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return 124, f"{text}\nFAILED {op}: stopped after {limit:.0f} s"
    return done.returncode, done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    known = [*operators(), "end_to_end"]
    usage = f"python -m benchmarks [name ...] [--budget SECONDS] [options of a benchmark]; names: {', '.join(known)}"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, allow_abbrev=False)
    parser.add_argument("--budget", type=float, default=None, help="seconds for all together (default 120 each)")
    words = list(sys.argv[1:] if argv is None else argv)
    # The options' own values are words too, so names are what stands before the first option.
    named = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    args, options = parser.parse_known_args(words[len(named) :])
    wrong = [name for name in named if name not in known]
    if wrong:
        parser.error(f"unknown benchmark {', '.join(wrong)}; expected some of {', '.join(known)}")
    names = named or operators()
    end = time.monotonic() + (args.budget or 120.0 * len(names))
    outputs, codes = {}, {}
    for place, name in enumerate(names):
        share = max((end - time.monotonic()) / (len(names) - place), 1.0)
        print(f"benchmark of {name}, {share:.0f} s ...", flush=True)
        if name == "end_to_end":
            codes[name], outputs[name] = run_one(name, options, limit=max(3600.0, args.budget or 0.0))
            continue
        reserve = min(GRACE, 0.3 * share)
        # A budget that was asked for is kept: what is left of it is the hard limit of every benchmark.
        limit = min(share + GRACE, end - time.monotonic()) if args.budget else 3 * share
        options_here = [*options, "--budget", f"{max(share - reserve, 1.0):.0f}"]
        codes[name], outputs[name] = run_one(name, options_here, max(limit, 1.0))
    for name in names:
        print(f"\n{outputs[name].strip()}")
    failed = [name for name in names if codes[name] != 0]
    print(f"\n{len(names) - len(failed)} of {len(names)} benchmarks done" + (f"; FAILED: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
