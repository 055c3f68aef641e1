"""Several runs that differ in their seed as one result: mean and spread of every measured number.

    python -m benchmarks.report_seeds --out benchmarks/results/main_job runs/seed0 runs/seed1 runs/seed2

writes main_job.json (every number of every run, with provenance), main_job.md (tables) and main_job.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context

from benchmarks.measure import provenance
from mmrpt.corpus import write_bytes
from mmrpt.report import plots
from mmrpt.report.markdown import duration, table
from mmrpt.report.numbers import (
    ALL_SETS,
    COMPARISONS,
    CONDITIONS,
    MAY_DIFFER,
    MODELS,
    POOLS,
    PROMISES,
    SETS,
    numbers_of,
)
from mmrpt.report.page import accuracy_table, format_of
from mmrpt.report.read import changed_settings, read_run


def mean_and_spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation (None for a single value), smallest and largest."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "low": min(values), "high": max(values), "count": len(values)}


def collect(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """The record: every run's numbers, and their spread. Raises ValueError for a run without an evaluation."""
    if len({folder.resolve() for folder in run_dirs}) < len(run_dirs):
        raise ValueError("the same run was given twice: a seed counts once. Pass different run folders.")
    runs, differ, first = [], {}, None
    for folder in run_dirs:
        run = read_run(folder)
        if not run.evaluation:
            raise ValueError(f"{folder} has no evaluation.json with rows: let the run finish (`--resume`) first.")
        first = first or run
        for name, one, other in changed_settings(first.settings, run.settings):
            if name not in MAY_DIFFER and not name.endswith(".seed"):
                differ[f"{name}: {one!r} and {other!r}"] = None
        numbers = {name: estimate.value for name, estimate in numbers_of(run).items()}
        entry = {"name": folder.resolve().name, "seed": run.settings.get("seed"), "environment": run.environment}
        runs.append(entry | {"numbers": numbers})
    names = dict.fromkeys(name for run in runs for name in run["numbers"])
    spread = {name: mean_and_spread([run["numbers"][name] for run in runs if name in run["numbers"]]) for name in names}
    record = {
        "benchmark": "main_job",
        "provenance": provenance(torch.device("cpu")),
        "settings_that_differ": list(differ),
    }
    return record | {"runs": runs, "numbers": spread}


def render(record: dict[str, Any], picture: str) -> str:
    """The record as Markdown."""
    runs, numbers, origin = record["runs"], record["numbers"], record["provenance"]
    seeds = ", ".join(f"{run['name']} (seed {run['seed']})" for run in runs)
    commits = dict.fromkeys(str(run["environment"].get("commit", "unknown")) for run in runs)
    parts = [f"# Main job over {len(runs)} seeds", f"Runs: {seeds}."]
    if record["settings_that_differ"]:
        parts.append(f"**The runs differ in more than their seed**: {'; '.join(record['settings_that_differ'])}.")
    parts.append(f"The runs' commit: {', '.join(commits)}; their versions and machines stand in the JSON.")
    parts.append(
        "Mean ± sample standard deviation (smallest to largest) over the runs; rates in %, differences in points."
    )
    parts += ["## Promises", _promises(record), f"![accuracy over seeds]({picture})", "## Held-out accuracy"]
    subjects = {f"accuracy/{model}": label for model, label in MODELS.items()}
    subjects |= {f"change/{one} - {other}": f"**{label}**" for (one, other), label in COMPARISONS.items()}
    parts.append(accuracy_table([*SETS, *POOLS], subjects, lambda name: _spread(numbers.get(name), format_of(name))))
    times = [name for name in numbers if name.startswith("seconds/")]
    rows = [[name.removeprefix("seconds/"), _spread(numbers[name], duration)] for name in times]
    parts += ["## Time", table(["phase", "time"], rows, right=(1,))]
    parts.append(f"Written {origin['date']} at commit {origin['commit']} by `{origin['command']}`.")
    return "\n\n".join(parts) + "\n"


def draw(record: dict[str, Any], path: Path) -> Path:
    """Bars of the means over all sets per condition and model, whiskers from the least run to the most."""
    names = {(model, one): f"accuracy/{model}/{ALL_SETS}/{one}" for model in MODELS for one in CONDITIONS}
    found = {key: record["numbers"][name] for key, name in names.items() if name in record["numbers"]}
    with rc_context(plots.STYLE):
        figure, (axis,) = plots.new_figure(height=3.6)
        models = [model for model in MODELS if any(key[0] == model for key in found)]
        plots.draw_bars(axis, models, {key: (one["mean"], one["low"], one["high"]) for key, one in found.items()})
        title = f"Restored spans, all held-out sets, {len(record['runs'])} seeds (whiskers: least to most)"
        axis.set(title=title, ylabel="restored exactly (%)")
        axis.legend()
        return plots.save(figure, path)


def write(record: dict[str, Any], out: Path) -> list[Path]:
    """`out`.json, `out`.md, `out`.png; returns the paths that were written."""
    picture, page, data = (out.with_name(f"{out.name}.{ending}") for ending in ("png", "md", "json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return [
        write_bytes(data, text.encode()),
        write_bytes(page, render(record, picture.name).encode()),
        draw(record, picture),
    ]


def _promises(record: dict[str, Any]) -> str:
    """The promises of the default run beside mean and spread, and how many of the runs keep each."""
    rows = []
    for promise in PROMISES:
        values = [run["numbers"][promise.number] for run in record["runs"] if promise.number in run["numbers"]]
        kept = f"{sum(map(promise.kept, values))} of {len(values)}" if values else "–"
        measured = _spread(record["numbers"].get(promise.number), promise.show) or "–"
        rows.append([promise.name, measured, promise.wanted, kept])
    return table(["promise", "measured", "wanted", "runs that keep it"], rows, right=(1, 3))


def _spread(one: dict[str, Any] | None, show: Callable[[float], str]) -> str:
    if one is None:
        return ""
    if one["count"] == 1:
        return f"{show(one['mean'])} (1 run)"
    return f"{show(one['mean'])} ± {show(one['std']).lstrip('+')} ({show(one['low'])} to {show(one['high'])})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report_seeds", description=__doc__.splitlines()[0])
    out = "path without ending, such as benchmarks/results/main_job"
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders that differ in their seed")
    parsed = parser.parse_args(arguments)
    try:
        record = collect(parsed.runs)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for path in write(record, parsed.out):
        print(path)


if __name__ == "__main__":
    main()
