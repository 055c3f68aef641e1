"""Several runs that differ in their seed as one result: mean and spread of every measured number.

    python -m benchmarks.report_seeds --out benchmarks/results/main_job runs/seed0 runs/seed1 runs/seed2

writes main_job.json (every number of every run, with provenance), main_job.md (tables) and main_job.png.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import provenance
from mmrpt.metrics import mean_and_spread
from mmrpt.reporting import style
from mmrpt.reporting.markdown import table
from mmrpt.reporting.measured import (
    ALL_SETS,
    CONDITIONS,
    MODELS,
    SETS,
    Evaluation,
    difference,
    measured_auc,
    read_evaluation,
)
from mmrpt.reporting.progress import duration, phase_seconds, total_seconds
from mmrpt.reporting.runfiles import RunFiles, write_atomically
from mmrpt.reporting.summary import changed_settings
from mmrpt.reporting.targets import (
    MAX_BLANKED_RISE,
    MAX_SECONDS,
    MIN_AUC,
    MIN_GAIN_OVER_CAPTION,
    MIN_GAIN_OVER_WARM,
)

Numbers = dict[str, float]

# Settings that name a run or its seed may differ between the runs; any other difference makes them another experiment.
MAY_DIFFER = ("name", "output", "seed", "threads")
COMPARISONS = {"reinforced - warm": "warm", "reinforced - caption": "caption"}


def numbers_of(files: RunFiles, evaluation: Evaluation) -> Numbers:
    """Every number of evaluation.json and the differences of the models under path-like names; rates as fractions.

    "accuracy/<model>/<set>/<condition>[/<kind>]", "change/<comparison>/<set>/<condition>", "dependency_auc",
    "seconds/<phase>", "seconds/whole run". <set> is also "all sets".
    """
    found: Numbers = {"dependency_auc": measured_auc(files)[0]}
    for (model, name, condition), cell in evaluation.cells.items():
        found[f"accuracy/{model}/{name}/{condition}"] = cell.rate
    for (model, name, condition, kind), cell in evaluation.kinds.items():
        found[f"accuracy/{model}/{name}/{condition}/{kind}"] = cell.rate
    for condition in evaluation.conditions():
        for model in evaluation.models():
            if pooled := evaluation.pooled(model, condition, evaluation.sets()):
                found[f"accuracy/{model}/{ALL_SETS}/{condition}"] = pooled.rate
        for comparison, minus in COMPARISONS.items():
            for name, sets in [(ALL_SETS, None), *((one, [one]) for one in evaluation.sets())]:
                if change := difference(evaluation, "reinforced", minus, condition, sets):
                    found[f"change/{comparison}/{name}/{condition}"] = change.value
    seconds = phase_seconds(files)
    found |= {f"seconds/{phase}": value for phase, value in seconds.items() if phase != "total"}
    return found | {"seconds/whole run": total_seconds(seconds)}


def collect(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """The record: every run's numbers, and their spread. Raises ValueError for a run without an evaluation."""
    runs, configs = [], []
    for folder in run_dirs:
        files = RunFiles(folder)
        evaluation = read_evaluation(files)
        if not evaluation.cells:
            raise ValueError(f"{folder} has no evaluation.json with rows: let the run finish (`--resume`) first.")
        config = files.document("config.yaml")
        configs.append(config)
        run = {"name": Path(folder).resolve().name, "seed": config.get("seed")}
        run |= {"environment": files.document("environment.json"), "numbers": numbers_of(files, evaluation)}
        runs.append(run)
    if len({folder.resolve() for folder in map(Path, run_dirs)}) < len(runs):
        raise ValueError("the same run was given twice: a seed counts once. Pass different run folders.")
    names = list(dict.fromkeys(name for run in runs for name in run["numbers"]))
    spread = {name: mean_and_spread([run["numbers"].get(name, math.nan) for run in runs]) for name in names}
    return {
        "benchmark": "main_job",
        "provenance": provenance(torch.device("cpu")),
        "settings_that_differ": unexpected_differences(configs),
        "runs": runs,
        "numbers": {name: one._asdict() for name, one in spread.items()},
    }


def unexpected_differences(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Settings beside name and seed in which the runs differ: then the spread is not over seeds alone."""
    found = [
        f"{name}: {one!r} and {other!r}"
        for config in configs[1:]
        for name, other, one in changed_settings(config, configs[0])
        if name not in MAY_DIFFER and not name.endswith(".seed")
    ]
    return list(dict.fromkeys(found))


def render(record: dict[str, Any], picture: str) -> str:
    """The record as Markdown."""
    runs, origin = record["runs"], record["provenance"]
    seeds = ", ".join(f"{run['name']} (seed {run['seed']})" for run in runs)
    parts = [f"# Main job over {len(runs)} seeds", f"Runs: {seeds}."]
    if record["settings_that_differ"]:
        parts.append(f"**The runs differ in more than their seed**: {'; '.join(record['settings_that_differ'])}.")
    parts.append(_environments(runs))
    parts.append("Mean ± sample standard deviation (smallest to largest) over the runs.")
    parts += ["## Promises", _promises(record), f"![accuracy over seeds]({picture})"]
    parts += ["## Held-out accuracy (%)", _grid(record, "accuracy", list(MODELS), _rate, "model", MODELS)]
    parts += ["## Changes (points)", _grid(record, "change", list(COMPARISONS), _gain, "comparison", {})]
    times = [name for name in record["numbers"] if name.startswith("seconds/")]
    rows = [[name.removeprefix("seconds/"), _spread(record, name, duration)] for name in times]
    parts += ["## Time", table(["phase", "time"], rows, right=(1,))]
    parts.append(f"Written {origin['date']} at commit {origin['commit']} by `{origin['command']}`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(record: dict[str, Any], path: Path) -> Path | None:
    """Bars of the means over all sets per condition and model, a dot for every run, whiskers from least to most."""
    columns = [name for name in CONDITIONS if any(_known(record, _accuracy(model, name)) for model in MODELS)]
    models = [model for model in MODELS if any(_known(record, _accuracy(model, name)) for name in columns)]
    if not columns:
        return None
    figure, (axis,) = style.new_figure(height=3.6)
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        for group, condition in enumerate(columns):
            values = [100 * value for value in _values(record, _accuracy(model, condition))]
            if not values:
                continue
            x, mean = group + (place - (len(models) - 1) / 2) * width, float(np.mean(values))
            label = MODELS[model] if group == 0 else None
            axis.bar(x, mean, 0.92 * width, color=style.MODEL_COLOURS[model], label=label)
            whiskers = [[mean - min(values)], [max(values) - mean]]
            axis.errorbar(x, mean, yerr=np.maximum(whiskers, 0), color="black", linewidth=0.9, capsize=3)
            spots = x + (np.arange(len(values)) - (len(values) - 1) / 2) * 0.12 * width
            axis.scatter(spots, values, s=12, color="white", edgecolors="black", linewidths=0.7, zorder=3)
            axis.annotate(f"{mean:.1f}", (x, max(values) + 1), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(columns)), [CONDITIONS[name] for name in columns])
    axis.set_ylim(0, 108)
    axis.grid(axis="x", visible=False)
    number = len(record["runs"])
    style.label_axes(axis, f"Restored spans, all held-out sets, {number} seeds (dots)", "", "restored exactly (%)")
    style.legend(axis)
    return style.save(figure, path)


def write(record: dict[str, Any], out: Path) -> list[Path]:
    """`out`.json, `out`.md, `out`.png; returns the paths that were written."""
    picture = draw(record, out.with_name(f"{out.name}.png"))
    text = json.dumps(_without_nan(record), indent=1, ensure_ascii=False) + "\n"
    data = write_atomically(out.with_name(f"{out.name}.json"), text.encode())
    words = write_atomically(out.with_name(f"{out.name}.md"), render(record, f"{out.name}.png").encode())
    return [data, words, *([picture] if picture else [])]


def _environments(runs: Sequence[dict[str, Any]]) -> str:
    commits = dict.fromkeys(str(run["environment"].get("commit", "unknown")) for run in runs)
    return f"The runs' commit: {', '.join(commits)}; their versions and machines stand in the JSON."


def _promises(record: dict[str, Any]) -> str:
    """The main job's targets beside mean and spread, and how many of the runs keep each."""
    image, blanked = f"{ALL_SETS}/image", f"{ALL_SETS}/blanked"
    promises: list[tuple[str, str, Callable[[float], str], float, bool]] = [
        ("dependency AUC", "dependency_auc", lambda value: f"{value:.3f}", MIN_AUC, True),
        (
            "gain over the warm start, with image (points)",
            f"change/reinforced - warm/{image}",
            _gain,
            MIN_GAIN_OVER_WARM,
            True,
        ),
        (
            "gain over caption training, with image (points)",
            f"change/reinforced - caption/{image}",
            _gain,
            MIN_GAIN_OVER_CAPTION,
            True,
        ),
        (
            "change over the warm start, blanked (points)",
            f"change/reinforced - warm/{blanked}",
            _gain,
            MAX_BLANKED_RISE,
            False,
        ),
        ("time of the whole run", "seconds/whole run", duration, MAX_SECONDS, False),
    ]
    rows = []
    for label, name, show, bound, at_least in promises:
        values = [round(value, 9) for value in _values(record, name)]
        kept = sum(value >= bound if at_least else value < bound for value in values)
        wanted = f"{'>=' if at_least else '<'} {show(bound)}"
        rows.append([label, _spread(record, name, show), wanted, f"{kept} of {len(values)}" if values else "–"])
    return table(["promise", "measured", "wanted", "runs that keep it"], rows, right=(1, 3))


def _grid(
    record: dict[str, Any],
    head: str,
    subjects: Sequence[str],
    show: Callable[[float], str],
    title: str,
    labels: dict[str, str],
) -> str:
    """Sets by subject in rows, conditions in columns."""
    rows = []
    for name in (*_sets(record), ALL_SETS):
        for subject in subjects:
            cells = [_spread(record, f"{head}/{subject}/{name}/{condition}", show) for condition in CONDITIONS]
            if any(cell != "–" for cell in cells):
                rows.append([SETS.get(name, name), labels.get(subject, subject), *cells])
    header = ["held-out set", title, *CONDITIONS.values()]
    return table(header, rows, right=range(2, len(header)))


def _sets(record: dict[str, Any]) -> list[str]:
    seen = dict.fromkeys(name.split("/")[2] for name in record["numbers"] if name.startswith("accuracy/"))
    return [*(name for name in SETS if name in seen), *(name for name in seen if name not in (*SETS, ALL_SETS))]


def _accuracy(model: str, condition: str) -> str:
    return f"accuracy/{model}/{ALL_SETS}/{condition}"


def _known(record: dict[str, Any], name: str) -> bool:
    return bool(_values(record, name))


def _values(record: dict[str, Any], name: str) -> list[float]:
    values = [run["numbers"].get(name, math.nan) for run in record["runs"]]
    return [value for value in values if math.isfinite(value)]


def _spread(record: dict[str, Any], name: str, show: Callable[[float], str]) -> str:
    one = record["numbers"].get(name)
    if one is None or not one["count"]:
        return "–"
    if one["count"] == 1:
        return f"{show(one['mean'])} (1 run)"
    std = show(one["std"]).lstrip("+")
    return f"{show(one['mean'])} ± {std} ({show(one['low'])} to {show(one['high'])})"


def _rate(value: float) -> str:
    return f"{100 * value:.1f}"


def _gain(value: float) -> str:
    return f"{100 * value:+.1f}"


def _without_nan(value: Any) -> Any:
    """NaN as null: JSON has no NaN, and other readers refuse it."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report_seeds", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="path without ending, such as benchmarks/results/main_job"
    )
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
