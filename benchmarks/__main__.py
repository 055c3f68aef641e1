"""Run operators' benchmarks, each in a process of its own, and print all tables at the end.

    python -m benchmarks                      every operator that has a benchmark
    python -m benchmarks logprobs divergence  these two
    python -m benchmarks end_to_end           the main job over several seeds (long; only when named)

Options other than the names and --budget (seconds for all together) go to each benchmark: --quick --device --results
--threads --only --contenders. The exit code is 0 when every benchmark's was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOT_OPERATORS = {"__init__", "__main__", "harness", "measure", "present", "end_to_end"}
GRACE = 20.0  # seconds beyond its budget that one benchmark gets for imports, compilation and its last case


def operators() -> list[str]:
    """Operators with a benchmark: the files of this folder that are not the machinery."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_OPERATORS)


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run operators' benchmarks.")
    parser.add_argument("names", nargs="*", help=f"operators (default: all): {', '.join(operators())}; or end_to_end")
    parser.add_argument("--budget", type=float, default=None, help="seconds for all together (default 120 each)")
    args, options = parser.parse_known_args(argv)
    known = [*operators(), "end_to_end"]
    wrong = [name for name in args.names if name not in known]
    if wrong:
        parser.error(f"unknown benchmark {', '.join(wrong)}; expected some of {', '.join(known)}")
    names = args.names or operators()
    end = time.monotonic() + (args.budget or 120.0 * len(names))
    outputs, codes = {}, {}
    for place, name in enumerate(names):
        share = max((end - time.monotonic()) / (len(names) - place), 1.0)
        print(f"benchmark of {name}, {share:.0f} s ...", flush=True)
        if name == "end_to_end":
            codes[name], outputs[name] = run_one(name, options, limit=max(3600.0, args.budget or 0.0))
            continue
        budget = max(share - 0.3 * min(share, GRACE), 1.0)
        codes[name], outputs[name] = run_one(name, [*options, "--budget", f"{budget:.0f}"], share + GRACE)
    for name in names:
        print(f"\n{outputs[name].strip()}")
    failed = [name for name in names if codes[name] != 0]
    print(f"\n{len(names) - len(failed)} of {len(names)} benchmarks done" + (f"; FAILED: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
