"""Runs the arms of an experiment, resumably, and collects what they gave.

    OUT/warm-starts/<key>   a warm start, shared by the runs whose settings are equal up to its end
    OUT/runs/<key>          a run, shared by the arms of any experiment that have its settings
    OUT/<experiment>/arms   the result of each arm at each seed; one that is there is not run again

A key is a seed and a hash of resolved settings: results of other settings are never taken for those of these.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrpt.command_line import CONFIG_FILE, run_command
from mmrpt.corpus import iter_jsonl, write_json
from mmrpt.experiments.arms import Arm, Experiment, Rows
from mmrpt.settings import Settings, SettingsError, given_settings, load_settings, save_settings

if TYPE_CHECKING:
    from mmrpt.engines.run import Run

SET_BY_OPTIONS = {"seed": "--seeds", "output": "--out", "name": "--out"}
NOT_COMPUTED_WITH = ("name", "output", "track")
# Younger than committed results, with the value that computes what was computed without them.
YOUNGER = {"engine": "native", "trl": {}}
# What a warm start does not depend on either. Of evaluation it takes whether validation pairs are kept apart.
AFTER_WARM_START = ("checkpoint_every", "patience", "evaluation", "masking", "rollout", "reward", "perception", "rl")
AFTER_WARM_START += ("control", "engine", "trl")
MADE_WITH = ("date", "commit", "cpu", "threads", "torch", "transformers")  # of environment.json


@dataclass(frozen=True)
class Job:
    """An arm at a seed: the settings of its run, and the file of its result."""

    arm: Arm
    seed: int
    settings: Settings
    result: Path


def plan(experiment: Experiment, seeds: Iterable[int], out: Path, overrides: Sequence[str] = ()) -> list[Job]:
    """Every arm at every seed; `overrides` go over the arms' own. Raises SettingsError, naming the arm, where settings
    cannot work or the run does not train the arm's model."""
    for name in given_settings(None, overrides).keys() & SET_BY_OPTIONS.keys():
        raise SettingsError(f"{name}= is no override of an experiment: use {SET_BY_OPTIONS[name]}.")
    return [_job(experiment, arm, seed, out, overrides) for seed in seeds for arm in experiment.arms]


def _job(experiment: Experiment, arm: Arm, seed: int, out: Path, overrides: Sequence[str]) -> Job:
    try:
        settings = load_settings(None, [*experiment.base, *arm.overrides, *overrides, f"seed={seed}"])
    except SettingsError as error:
        raise SettingsError(f"experiment {experiment.name}, arm {arm.name!r}: {error}") from error
    trained = ("warmup", "rl", *settings.control.phases)
    if arm.model not in trained:
        raise SettingsError(
            f"experiment {experiment.name}, arm {arm.name!r}: its model is {arm.model}, and its run has "
            f"{', '.join(trained)}: add the kind to control.kinds."
        )
    settings = replace(settings, output=str(out / "runs"), name=_key(settings, NOT_COMPUTED_WITH))
    name = re.sub(r"\W+", "-", arm.name.lower()).strip("-")
    return Job(arm, seed, settings, out / experiment.name / "arms" / f"{name}-{arm.model}-{settings.name}.json")


def _key(settings: Settings, left_out: Iterable[str], *more: Any) -> str:
    tree = {
        name: value
        for name, value in asdict(settings).items()
        if name not in left_out and not (name in YOUNGER and value == YOUNGER[name])
    }
    text = json.dumps([tree, *more], sort_keys=True)
    return f"seed{settings.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def warm_start_of(settings: Settings, out: Path) -> Settings:
    """The settings of the run that makes the warm start of a run of `settings`."""
    key = _key(settings, (*NOT_COMPUTED_WITH, *AFTER_WARM_START), settings.evaluation.every > 0)
    return replace(settings, output=str(out / "warm-starts"), name=key)


def run_jobs(experiment: Experiment, jobs: Sequence[Job], out: Path) -> list[Job]:
    """Does what is left of the jobs, run by run. Failures are told, the others go on; returns the failed jobs.

    Raises SettingsError where a package is not installed that the experiment requires.
    """
    groups: dict[Path, list[Job]] = {}
    for job in jobs:
        if not job.result.exists():
            groups.setdefault(job.settings.run_dir, []).append(job)
    if groups and experiment.requires and find_spec(experiment.requires.replace("-", "_")) is None:
        raise SettingsError(
            f"experiment {experiment.name} needs the package {experiment.requires}, which is not installed: "
            f"pip install {experiment.requires}, and give the command again."
        )
    failed: list[Job] = []
    for number, (folder, group) in enumerate(groups.items(), start=1):
        names = ", ".join(job.arm.name for job in group)
        print(f"run {number} of {len(groups)} ({folder}), seed {group[0].seed}: {names}", flush=True)
        if _finish(experiment, group, out):
            failed += group
    return failed


def _finish(experiment: Experiment, group: Sequence[Job], out: Path) -> int:
    """Trains the run of a group of arms, or goes on with it, and writes their results; 0, or 2 after an error."""
    settings = group[0].settings
    from_files = experiment.measure is None and experiment.answer is None
    if from_files and (settings.run_dir / "evaluation.json").exists():
        for job in group:
            write_json(job.result, result_of(job, {}))
        return 0

    def train_and_measure(run: Run) -> Path:
        from mmrpt.engines import native

        report = native.train(run)
        for job in group:
            measured = experiment.measure(run, job.arm) if experiment.measure else {}
            answered = experiment.answer(run, job.arm) if experiment.answer else None
            write_json(job.result, result_of(job, measured, answered))
        return report

    return _take_warm_start(settings, out) or _work_in(settings, train_and_measure)


def _take_warm_start(settings: Settings, out: Path) -> int:
    """Puts the warm start into the run's folder, trained if no run before this one has done so; 0, or 2 on an error."""
    steps = {"vision_pretraining": settings.demo.vision_steps, "warmup": settings.warmup.steps}
    own, shared = settings.run_dir, warm_start_of(settings, out)
    wanted = [phase for phase in steps if steps[phase] and not (own / "checkpoints" / phase).exists()]
    if not wanted:
        return 0

    def warm_start(run: Run) -> Path:
        from mmrpt.engines import native

        native.warm_start(run)
        return native.report(run)

    made = [shared.run_dir / "checkpoints" / phase for phase in wanted]
    if not all(folder.exists() for folder in made) and (code := _work_in(shared, warm_start)):
        return code
    for name in ("metrics.jsonl", "seconds.json"):
        own.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shared.run_dir / name, own / name)
    for folder in made:  # a phase whose folder is there is done, so it appears whole
        part = own / "checkpoints" / f"{folder.name}.{os.getpid()}.tmp"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(folder, part)
        os.replace(part, own / "checkpoints" / folder.name)
    return 0


def _work_in(settings: Settings, work: Callable[[Run], Path]) -> int:
    """`run_command` on the folder of these settings, which is made or gone on with."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    if not (settings.run_dir / CONFIG_FILE).exists():
        save_settings(settings, settings.run_dir / CONFIG_FILE)
    gc.unfreeze()  # `run_command` freezes, and the cycles of the run before this one are to be freed
    gc.collect()
    overrides = [f"output={json.dumps(settings.output)}", f"name={settings.name}"]
    return run_command(Namespace(config=None, overrides=overrides, show=False, resume=True), work)


def result_of(job: Job, measured: dict[str, Any], answered: tuple[Rows, Rows] | None = None) -> dict[str, Any]:
    """What a finished run says of an arm, for results.json; `answered`: rows and answers in the place of the run's."""
    folder, model = job.settings.run_dir, job.arm.model
    evaluation, seconds, masking, environment = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("evaluation", "seconds", "masking", "environment")
    )
    rows, answers = answered or (evaluation["rows"], iter_jsonl(folder / "answers.jsonl"))
    hits: dict[str, dict[str, str]] = {}
    asked: dict[str, Any] = {}
    for row in answers:
        if row["model"] == model:
            of_set = hits.setdefault(row["set"], {})
            of_set[row["condition"]] = of_set.get(row["condition"], "") + str(int(row["exact"]))
            if row["condition"] == "image":
                text = "|".join((row["sample_id"], row["masked_caption"], row["answer"]))
                asked.setdefault(row["set"], hashlib.sha256()).update(text.encode())
    return {
        "overrides": list(job.arm.overrides),
        "model": model,
        "run": folder.name,
        "seconds": seconds,
        "rows": [{k: v for k, v in row.items() if k != "model"} for row in rows if row["model"] == model],
        "hits": hits,
        "questions": {name: digest.hexdigest()[:12] for name, digest in asked.items()},
        "samples_masked": masking["samples"],
        "measured": measured,
        "made": {name: environment.get(name) for name in MADE_WITH},
    }


def collect(
    experiment: Experiment,
    seeds: Iterable[int],
    out: Path,
    overrides: Sequence[str] = (),
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The results of every arm that has one, at `seeds` and at any other seed that was run with these settings.

    `known`: results from before, of which those of these settings stand in for what is not in `out`.
    """
    files = (out / experiment.name / "arms").glob("*.json")
    found = {int(match[1]) for file in files if (match := re.search(r"-seed(-?\d+)-\w+\.json$", file.name))}
    before: dict[str, Any] = known["seeds"] if known else {}
    results: dict[str, Any] = {
        "experiment": experiment.name,
        "question": experiment.question,
        "made": {},
        "base": [*experiment.base, *overrides],
        "seeds": {},
    }
    made: dict[str, set[str]] = {name: set() for name in MADE_WITH}
    for job in plan(experiment, sorted({*seeds, *found, *map(int, before)}), out, overrides):
        result = before.get(str(job.seed), {}).get(job.arm.name)
        if job.result.exists():
            result = json.loads(job.result.read_text())
            for name, value in result.pop("made").items():
                made[name].add(str(value))
        elif result is None or result["run"] != job.settings.name:
            continue
        else:
            for name in MADE_WITH:
                made[name] |= set(known["made"][name].split(", "))
        results["seeds"].setdefault(str(job.seed), {})[job.arm.name] = result
    results["made"] = {name: ", ".join(sorted(values)) for name, values in made.items()}
    return results
