"""The main job over several seeds, and what it promises beside what was measured.

    python -m benchmarks.end_to_end                                three seeds of the default run, one after another
    python -m benchmarks.end_to_end --seeds 0 1 rl.steps=50        other seeds, other settings
    python -m benchmarks.end_to_end --runs runs/end_to_end-...     goes on where it was cut off

Each seed is a run of its own, `python -m mmrpt.train seed=<n>`, in a process of its own; its folder keeps everything.
`benchmarks.report_seeds` then writes `<results>/end_to_end-<device>.json`, `.md` and `.png`. The exit code tells
whether the runs ended, not whether the promises were kept: the tables tell that.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report_seeds
from benchmarks.measure import RESULTS, device_name, result_path

ROOT = Path(__file__).resolve().parent.parent
# A few steps of everything: shows that all runs, measures nothing.
QUICK = (
    "demo.vision_steps=2",
    "warmup.steps=4",
    "masking.captions=64",
    "masking.threshold=quantile:0.5",
    "rollout.prompts=4",
    "rl.steps=2",
    "evaluation.samples=8",
)


def run_seed(seed: int, folder: Path, overrides: Sequence[str]) -> Path | None:
    """Run one seed, or go on with it; its folder, or None when it failed. Output passes through."""
    target = folder / f"seed-{seed}"
    command = [sys.executable, "-m", "mmrpt.train", f"output={folder}", f"name={target.name}"]
    command += ["--resume"] if (target / "config.yaml").exists() else [f"seed={seed}", *overrides]
    print(f"\n$ {' '.join(command)}", flush=True)
    return target if subprocess.run(command, cwd=ROOT).returncode == 0 else None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=None, help="folder of the runs; one that exists is gone on with")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for JSON, tables and plot")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--quick", action="store_true", help="a few steps: a check that all runs")
    args, words = parser.parse_known_args(argv)
    wrong = [word for word in words if word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"got {' '.join(wrong)}: expected settings of mmrpt.train such as rl.steps=50")
    args.overrides = [*(QUICK if args.quick else ()), f"device={args.device}", *words]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (args.runs or ROOT / "runs" / f"end_to_end-{stamp}").absolute()
    runs = [run for seed in args.seeds if (run := run_seed(seed, folder, args.overrides)) is not None]
    if runs:
        out = result_path(args.results, "end_to_end", args.device.type, device_name(args.device)).with_suffix("")
        out.parent.mkdir(parents=True, exist_ok=True)
        paths = report_seeds.write(report_seeds.collect(runs), out)
        print(f"\n{out.with_suffix('.md').read_text()}\nwritten: {', '.join(map(str, paths))}")
    missing = len(args.seeds) - len(runs)
    if missing:
        print(f"FAILED end_to_end: {missing} of {len(args.seeds)} runs did not end; see {folder}")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
