"""The main job over several seeds: what it promises beside what was measured, mean and spread.

    python -m benchmarks.end_to_end                                    three seeds of the default run, one after another
    python -m benchmarks.end_to_end --seeds 0 1 -- rl.steps=50         other seeds, other settings
    python -m benchmarks.end_to_end --runs runs/end_to_end-...         goes on where it was cut off

Each seed is a run of its own, `python -m mmrpt.train seed=<n>`, in a process of its own; its folder keeps everything.
Writes `<results>/end_to_end-<device>.json` and `.png` and prints the tables; `--table FILE` prints them from a file.
The exit code tells whether the runs ended, not whether the promises were kept: the tables tell that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import DEFAULT_RESULTS, result_path
from benchmarks.measure import provenance
from mmrpt.reporting.targets import (
    MAX_BLANKED_RISE,
    MAX_SECONDS,
    MIN_AUC,
    MIN_GAIN_OVER_CAPTION,
    MIN_GAIN_OVER_WARM,
)

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("warm", "caption", "reinforced")
CONDITIONS = ("image", "blanked", "swapped")
ALL = "all sets"
# Small enough to end in well under a minute: shows that everything runs, measures nothing.
QUICK = ["warmup.steps=4", "masking.pairs=64", "rl.steps=2", "rollout.prompts=4", "evaluation.samples=8"]

Run = dict[str, Any]  # {"seed", "auc", "seconds": {phase: s}, "rows": as in evaluation.json}


class Promise(NamedTuple):
    """One target of the main job: its value in a run, and the bound; accuracies and gains are fractions."""

    name: str
    wanted: str
    values: list[float]
    met: bool  # by the mean over seeds


def run_seed(seed: int, folder: Path, overrides: Sequence[str]) -> Run | None:
    """Run one seed, or go on with it; None when it failed. Output passes through."""
    target = folder / f"seed-{seed}"
    command = [sys.executable, "-m", "mmrpt.train", f"output={folder}", f"name={target.name}"]
    command += ["--resume"] if (target / "config.yaml").exists() else [f"seed={seed}", *overrides]
    print(f"\n$ {' '.join(command)}", flush=True)
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        return None
    return read_run(target, seed)


def read_run(folder: Path, seed: int) -> Run:
    """What a finished run's evaluation.json says."""
    measured = json.loads((folder / "evaluation.json").read_text())
    rows = [{key: value for key, value in row.items() if key != "by_kind"} for row in measured["rows"]]
    return {"seed": seed, "auc": measured["dependency_auc"], "seconds": measured["seconds"], "rows": rows}


def sets_of(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(row["set"] for run in runs for row in run["rows"]))


def accuracy(run: Run, model: str, condition: str, where: str = ALL) -> float:
    """Accuracy of one model; over all sets it is the share of right answers, so larger sets weigh more."""
    rows = [
        row
        for row in run["rows"]
        if row["model"] == model and row["condition"] == condition and where in (ALL, row["set"])
    ]
    count = sum(row["count"] for row in rows)
    return sum(row["accuracy"] * row["count"] for row in rows) / count if count else float("nan")


def promises(runs: Sequence[Run]) -> list[Promise]:
    """The main job's targets, over all held-out sets."""

    def gain(over: str, condition: str) -> list[float]:
        return [accuracy(run, "reinforced", condition) - accuracy(run, over, condition) for run in runs]

    def promise(name: str, values: list[float], bound: float, at_least: bool, wanted: str) -> Promise:
        # Rounded at 1e-9: 0.7 - 0.6 is a hair under 0.1, and a gain of exactly ten points is ten points.
        mean = round(statistics.fmean(values), 9)
        return Promise(name, wanted, values, mean >= bound if at_least else mean < bound)

    over_warm, over_caption = gain("warm", "image"), gain("caption", "image")
    seconds = [sum(run["seconds"].values()) for run in runs]
    return [
        promise("AUC of dependency scores", [run["auc"] for run in runs], MIN_AUC, True, f">= {MIN_AUC}"),
        promise("gain over the warm start", over_warm, MIN_GAIN_OVER_WARM, True, f">= {MIN_GAIN_OVER_WARM:.2f}"),
        promise(
            "gain over equal caption training", over_caption, MIN_GAIN_OVER_CAPTION, True, f">= {MIN_GAIN_OVER_CAPTION}"
        ),
        promise(
            "rise with the image blanked", gain("warm", "blanked"), MAX_BLANKED_RISE, False, f"< {MAX_BLANKED_RISE}"
        ),
        promise("seconds of the whole run", seconds, MAX_SECONDS, False, f"< {MAX_SECONDS:.0f}"),
    ]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (n - 1); 0 for one seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _percent(values: Sequence[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.1f} ± {100 * spread:.1f}"


def tables(record: dict[str, Any]) -> str:
    """Markdown: accuracies (per cent, mean ± standard deviation over seeds), then promises."""
    runs, origin = record["runs"], record["provenance"]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    settings = f"; {' '.join(record['overrides'])}" if record["overrides"] else ""
    lines = [
        f"main job on {origin['device_name']} ({origin['threads']} threads), {origin['date'][:10]}, commit "
        f"{origin['commit']}, seeds {seeds}{settings}",
        "",
        "| held-out set | shown | warm start | equal caption training | reinforced |",
        "|---|---|---|---|---|",
    ]
    for where in [ALL, *sets_of(runs)]:
        for condition in CONDITIONS:
            cells = [_percent([accuracy(run, model, condition, where) for run in runs]) for model in MODELS]
            lines.append(f"| {where} | {condition} | " + " | ".join(cells) + " |")
    lines += ["", "| promise | wanted | mean ± sd | each seed | |", "|---|---|---|---|---|"]
    for promise in promises(runs):
        digits = 0 if "seconds" in promise.name else 3
        mean, spread = mean_and_spread(promise.values)
        each = ", ".join(f"{value:.{digits}f}" for value in promise.values)
        verdict = "kept" if promise.met else "MISSED"
        numbers = f"{mean:.{digits}f} ± {spread:.{digits}f} | {each}"
        lines.append(f"| {promise.name} | {promise.wanted} | {numbers} | {verdict} |")
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Accuracy by model and condition, one panel a held-out set; bars are means, whiskers standard deviations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = record["runs"]
    names = sets_of(runs)
    figure = Figure(figsize=(3.4 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, where in zip(panels, names, strict=True):
        for number, model in enumerate(MODELS):
            cells = [mean_and_spread([100 * accuracy(run, model, c, where) for run in runs]) for c in CONDITIONS]
            spots = [place + 0.27 * (number - 1) for place in range(len(CONDITIONS))]
            axes.bar(spots, [mean for mean, _ in cells], 0.25, yerr=[spread for _, spread in cells], label=model)
        axes.set_xticks(range(len(CONDITIONS)), CONDITIONS)
        axes.set_title(where.replace("_", " "), fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("restored spans, %")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=None, help="folder of the runs; one that exists is gone on with")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, help="folder for JSON and plot")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--quick", action="store_true", help="a few steps: a check that all runs")
    parser.add_argument("--table", type=Path, default=None, help="print the tables of this file and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of mmrpt.train")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.table is not None:
        print(tables(json.loads(args.table.read_text())))
        return 0
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (args.runs or ROOT / "runs" / f"end_to_end-{stamp}").absolute()
    overrides = (QUICK if args.quick else []) + [f"device={args.device}"] * (args.device.type != "cpu") + args.overrides
    runs = [run for seed in args.seeds if (run := run_seed(seed, folder, overrides)) is not None]
    if not runs:
        print(f"FAILED end_to_end: no run ended; see {folder}")
        return 1
    record = {"op": "end_to_end", "provenance": provenance(args.device), "overrides": overrides, "runs": runs}
    path = result_path(args.results, "end_to_end", args.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, path.with_suffix(".png"))
    print(f"\n{tables(record)}\n\nwritten: {path} and {path.with_suffix('.png').name}")
    missing = len(args.seeds) - len(runs)
    if missing:
        print(f"FAILED end_to_end: {missing} of {len(args.seeds)} runs did not end; see {folder}")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
