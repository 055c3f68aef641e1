"""The command line: `python -m mmrpt.experiments NAME [--seeds 0,1,2] [--arms a,b] [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmrpt.command_line import tell
from mmrpt.experiments.arms import Experiment
from mmrpt.experiments.catalogue import EXPERIMENTS
from mmrpt.experiments.runner import Job, collect, plan, run_jobs
from mmrpt.settings import SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an experiment or goes on with it: 0 when every arm has a result, 2 after an error, told on stderr."""
    options = _parser().parse_intermixed_args(arguments)
    if options.list or options.name is None:
        print("\n".join(f"{one.name:<15} {one.question}" for one in EXPERIMENTS.values()))
        return 0
    try:
        return _experiment(_named(options.name), options)
    except (OSError, ValueError) as error:
        return tell(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmrpt.experiments",
        description="Run every arm of an experiment at every seed; what has a result is not run again. Without a "
        "name: list the experiments.",
    )
    parser.add_argument("name", nargs="?", help="the experiment")
    parser.add_argument("--list", action="store_true", help="list the experiments and stop")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default 0,1,2")
    parser.add_argument("--arms", help="comma-separated names of the arms to run; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="default: runs/experiments")
    parser.add_argument("--tiny", action="store_true", help="scale=tiny: seconds an arm, to see that it runs")
    parser.add_argument("--report-only", action="store_true", help="run nothing; tables and plot of what there is")
    parser.add_argument("--publish", action="store_true", help="fill in docs/experiments/ (and README.md), too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every arm, over its own")
    return parser


def _named(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise SettingsError(f"no experiment {name!r}: expected one of {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]


def _experiment(experiment: Experiment, options: argparse.Namespace) -> int:
    if options.tiny and options.publish:
        raise SettingsError("--publish with --tiny: what random layers answer is no result; leave one of them out.")
    overrides, seeds = [*(["scale=tiny"] if options.tiny else []), *options.overrides], _seeds(options.seeds)
    jobs = plan(experiment, seeds, options.out, overrides)
    failed = []
    if not options.report_only:
        failed = run_jobs(experiment, _chosen(experiment, jobs, options.arms), options.out)
    from mmrpt.experiments.page import publish, published, write  # matplotlib and torch are slow to import

    results = collect(experiment, seeds, options.out, overrides, published(experiment) if options.publish else None)
    if not results["seeds"] and options.report_only and not overrides and (known := published(experiment)):
        print(f"{options.out} has no result of {experiment.name}: taking docs/experiments/{experiment.name}.json")
        results = known
    for job in failed:
        print(f"not finished: {job.arm.name}, seed {job.seed} (look in {job.settings.run_dir})", file=sys.stderr)
    if not results["seeds"]:
        raise ValueError(f"experiment {experiment.name} has no result with these settings in {options.out}.")
    files = write(experiment, results, options.out / experiment.name)
    for path in files + (publish(experiment, results) if options.publish else []):
        print(path)
    return 2 if failed else 0


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"--seeds {text}: expected whole numbers, as in --seeds 0,1,2.") from None


def _chosen(experiment: Experiment, jobs: Sequence[Job], names: str | None) -> Sequence[Job]:
    if names is None:
        return jobs
    wanted = {name.strip() for name in names.split(",")}
    if unknown := wanted - {arm.name for arm in experiment.arms}:
        known = ", ".join(arm.name for arm in experiment.arms)
        raise SettingsError(f"--arms: no arm {', '.join(sorted(unknown))}: expected some of {known}.")
    return [job for job in jobs if job.arm.name in wanted]


if __name__ == "__main__":
    sys.exit(main())
