"""Experiments: the catalogue can run; two tiny arms share a warm start, are resumed, and give their runs' numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmrpt.corpus import read_jsonl
from mmrpt.engines import native
from mmrpt.engines.run import open_run
from mmrpt.experiments import catalogue
from mmrpt.experiments.__main__ import main
from mmrpt.experiments.arms import Arm, Experiment
from mmrpt.experiments.catalogue import EXPERIMENTS
from mmrpt.experiments.page import NOT_RUN, PAGES, evidence, fill, page_block, publish, published
from mmrpt.experiments.runner import collect, plan, warm_start_of
from mmrpt.run_folder import RunError
from mmrpt.settings import SettingsError
from tests.trainer.conftest import SMALL_RUN
from tests.trainer.test_experiment_numbers import RESULTS
from tests.trainer.test_resume import outside_world  # noqa: F401  a fixture: coloured cards, rewards with a signal

# ------------------------------------------------------------------------------------------------ the catalogue


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_arm_has_settings_that_work(experiment, tmp_path):
    """And its run trains its model, which `plan` checks. Two arms of one run and model would be one arm, unless the
    experiment asks the model itself."""
    jobs = plan(experiment, (0, 1), tmp_path)
    assert len(jobs) == 2 * len(experiment.arms) == len({job.result for job in jobs})
    assert experiment.answer or len({(job.settings.name, job.arm.model) for job in jobs}) == len(jobs)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_experiment_has_a_page_that_shows_its_results(experiment):
    page = (PAGES / f"{experiment.name}.md").read_text()
    _, _, rest = page.partition("<!-- results:begin -->\n")
    block, end, _ = rest.partition("\n<!-- results:end -->")
    results = published(experiment)
    assert end and block == page_block(experiment, results, f"{experiment.name}.png")
    assert results or page.count(NOT_RUN) == 2, "a page without results says so, also under what it shows"
    assert f"python -m mmrpt.experiments {experiment.name}" in page
    assert f"[{experiment.name}]({experiment.name}.md)" in (PAGES / "README.md").read_text()


def test_what_an_experiment_cannot_be():
    arms = (Arm("one"), Arm("two"))
    for wrong in (
        {"baseline": "three"},
        {"method": "three"},
        {"compared": (("one", "three"),)},
        {"arms": (Arm("one"), Arm("one"))},
    ):
        with pytest.raises(ValueError, match="three|differ"):
            Experiment(**{"name": "x", "question": "?", "arms": arms, "baseline": "one"} | wrong)
    with pytest.raises(SettingsError, match="arm 'one': its model is grpo, and its run has warmup, rl, control"):
        plan(Experiment("x", "?", (Arm("one", model="grpo"),), "one"), [0], Path("out"))


# One setting of each group, with another value than the default.
OF_THE_WARM_START = ("data.cache_mb=1", "model.dtype=bfloat16", "prompts.describe=tell", "warmup.steps=7", "seed=1")
OF_THE_WARM_START += ("demo.world.language_bias=0.5", "threads=7", "device=meta", "scale=tiny")
AFTER_IT = ("masking.captions=7", "rollout.prompts=17", "reward.exact=0.5", "rl.steps=7", "perception.keep_ratio=0.3")
AFTER_IT += ("control.kinds=[grpo]", "evaluation.samples=7", "patience=7", "checkpoint_every=7")
AFTER_IT += ("engine=trl", "trl={fsdp:true} engine=trl")
OF_NO_RUN = ("track=[tensorboard]",)


def test_a_warm_start_is_shared_by_runs_that_differ_after_it_alone(tmp_path):
    def keys(*overrides: str, seed: int = 0) -> tuple[str, str]:
        (job,) = plan(Experiment("x", "?", (Arm("one", overrides),), "one"), [seed], tmp_path)
        return warm_start_of(job.settings, tmp_path).name, job.settings.name

    warm, run = keys()
    (job,) = plan(Experiment("x", "?", (Arm("one"),), "one"), [0], tmp_path)
    named = [re.match(r"\w+", override)[0] for override in OF_THE_WARM_START + AFTER_IT + OF_NO_RUN]
    assert {*named, "name", "output"} == asdict(job.settings).keys() and len(named) == len({*named})
    for override in OF_THE_WARM_START + AFTER_IT + OF_NO_RUN:
        own_warm, own_run = keys(seed=1) if override == "seed=1" else keys(*override.split())
        assert (own_warm != warm) == (override in OF_THE_WARM_START), override
        assert (own_run != run) == (override not in OF_NO_RUN), override
    assert keys("evaluation.every=3")[0] != warm  # of given pairs, some are then kept from training
    assert keys("evaluation.every=3")[0] == keys("evaluation.every=4")[0]


# ------------------------------------------------------------------------------------------------ two arms, end to end


def measure(run, arm):
    return {"steps": run.settings.rl.steps, "norm": {arm.model: float(run.policy.head_weight.detach().norm())}}


TWO = Experiment(
    name="two",
    question="Does the number of steps matter?",
    base=(*SMALL_RUN, "evaluation.samples=12", "evaluation.batch_size=12", "control.kinds=[]"),
    arms=(
        Arm("warm start", ("rl.steps=2",), model="warmup"),
        Arm("two steps", ("rl.steps=2",)),
        Arm("four steps", ("rl.steps=4", "perception.keep_ratio=0.5"), against="two steps"),
    ),
    baseline="warm start",
    measure=measure,
    method="two steps",
    by_kind=True,
)


@pytest.fixture(scope="module")
def out(tmp_path_factory, outside_world):  # noqa: F811
    """The folder of a finished experiment, and how often each function of it was called."""
    folder, calls = tmp_path_factory.mktemp("out"), Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(catalogue.EXPERIMENTS, "two", TWO)
        drawn = np.random.default_rng(0)  # an untrained model is never right
        patch.setattr("mmrpt.held_out.is_exact", lambda text, answer: bool(drawn.random() < 0.4))
        for name in ("lesson_at", "vision_step", "train"):
            owner, attribute = (native.VisionPretraining, "loss") if name == "vision_step" else (native, name)
            patch.setattr(owner, attribute, counted(getattr(owner, attribute), calls, name))
        assert main(["two", "--seeds", "3,4", "--out", str(folder)]) == 0
    return folder, calls


def counted(function, calls: Counter, name: str):
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call


def results_in(folder: Path) -> dict:
    return json.loads((folder / "two" / "results.json").read_text())


def test_arms_share_runs_and_runs_their_warm_start(out):
    """Of each seed one warm start (5 steps, 3 of vision) and two runs, one of which serves two arms."""
    folder, calls = out
    assert calls == {"lesson_at": 2 * 5, "vision_step": 2 * 3, "train": 2 * 2}
    assert len([*(folder / "warm-starts").iterdir()]) == 2 and len([*(folder / "runs").iterdir()]) == 4
    for seed, found in results_in(folder)["seeds"].items():
        assert found["warm start"]["run"] == found["two steps"]["run"] != found["four steps"]["run"]
        assert all(arm["run"].startswith(f"seed{seed}-") for arm in found.values())


def test_a_shared_warm_start_gives_the_weights_of_a_run_on_its_own(out, tmp_path):
    folder, _ = out
    job = next(job for job in plan(TWO, [4], folder) if job.arm.name == "four steps")
    alone = replace(job.settings, output=str(tmp_path))
    native.train(open_run(alone))
    for phase in ("vision_pretraining", "warmup", "rl"):
        own, other = (load_file(s.run_dir / "checkpoints" / phase / "model.safetensors") for s in (job.settings, alone))
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own), phase
    names = [
        [(row["phase"], row["step"]) for row in read_jsonl(s.run_dir / "metrics.jsonl")] for s in (job.settings, alone)
    ]
    assert names[0] == names[1]
    seconds = json.loads((job.settings.run_dir / "seconds.json").read_text())
    assert {"vision_pretraining", "warmup", "scoring", "rl", "evaluation"} == seconds.keys()


def test_results_are_those_of_the_runs(out):
    folder, _ = out
    results = results_in(folder)
    assert [*results["seeds"]] == ["3", "4"] and results["base"] == [*TWO.base]
    varied = set()
    for job in plan(TWO, (3, 4), folder):
        found, run = results["seeds"][str(job.seed)][job.arm.name], job.settings.run_dir
        evaluation = json.loads((run / "evaluation.json").read_text())["rows"]
        assert [{"model": job.arm.model} | row for row in found["rows"]] == [
            row for row in evaluation if row["model"] == job.arm.model
        ]
        assert found["seconds"] == json.loads((run / "seconds.json").read_text())
        assert found["samples_masked"] == len(read_jsonl(run / "masked.jsonl")) == 12
        assert found["overrides"] == [*job.arm.overrides] and found["measured"]["steps"] == job.settings.rl.steps
        answers = [row for row in read_jsonl(run / "answers.jsonl") if row["model"] == job.arm.model]
        for row in found["rows"]:
            hits = found["hits"][row["set"]][row["condition"]]
            own = [a for a in answers if a["condition"] == row["condition"]]
            assert hits == "".join("01"[a["exact"]] for a in own)
            assert len(hits) == row["count"] == 12 and hits.count("1") == round(12 * row["accuracy"])
            varied.add(hits)
    assert len(varied) > 4, "the comparison would hold of any order of arms and conditions"
    assert results["made"]["torch"] == torch.__version__ and results["made"]["threads"] == "1"


def test_what_has_a_result_is_not_run_again(out, monkeypatch, capsys):
    folder, _ = out
    monkeypatch.setitem(catalogue.EXPERIMENTS, "two", TWO)
    monkeypatch.setattr("mmrpt.experiments.runner.run_command", None)  # calling it raises
    before, page = ((folder / "two" / name).read_bytes() for name in ("results.json", "two.md"))
    assert main(["two", "--seeds", "4,3", "--out", str(folder)]) == 0
    assert main(["two", "--seeds", "3", "--arms", "two steps", "--out", str(folder)]) == 0  # the others stay in
    assert main(["two", "--report-only", "--out", str(folder)]) == 0
    assert ((folder / "two" / "results.json").read_bytes(), (folder / "two" / "two.md").read_bytes()) == (before, page)
    capsys.readouterr()
    assert main(["two", "--report-only", "--out", str(folder), "rl.optimiser.lr=0.5"]) == 2  # results of other settings
    assert "experiment two has no result with these settings in" in capsys.readouterr().err


def test_results_from_before_stand_in_for_seeds_that_are_not_there(out, tmp_path):
    """As when another machine adds a seed to the committed JSON. Results of other settings do not."""
    folder, _ = out
    whole = results_in(folder)
    known = {**whole, "made": whole["made"] | {"cpu": "another"}}
    shutil.copytree(folder / "two" / "arms", tmp_path / "two" / "arms")
    for path in (tmp_path / "two" / "arms").glob("*-seed4-*"):
        path.unlink()
    assert [*collect(TWO, [3], tmp_path)["seeds"]] == ["3"]
    joined = collect(TWO, [3], tmp_path, (), known)
    assert joined["seeds"] == whole["seeds"] and joined["made"]["cpu"] == f"{whole['made']['cpu']}, another"
    for arms in known["seeds"].values():
        arms["four steps"]["run"] = "seed4-0123456789"
    joined = collect(TWO, [3], tmp_path, (), known)
    assert [*joined["seeds"]["3"]] == [*whole["seeds"]["3"]] and [*joined["seeds"]["4"]] == ["warm start", "two steps"]


def test_a_run_that_fails_leaves_the_others_their_results(out, monkeypatch, capsys, tmp_path):
    train = native.train

    def fails(run):
        if run.settings.rl.steps == 2:
            raise RunError("the disk is full")
        return train(run)

    monkeypatch.setitem(catalogue.EXPERIMENTS, "two", TWO)
    monkeypatch.setattr(native, "train", fails)
    assert main(["two", "--seeds", "3", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "error: the disk is full" in told and "not finished: two steps, seed 3" in told
    assert [*results_in(tmp_path)["seeds"]["3"]] == ["four steps"]
    assert "**Not run yet**: warm start (seed 3); two steps (seed 3)." in (tmp_path / "two" / "two.md").read_text()
    monkeypatch.setattr(native, "train", train)
    assert main(["two", "--seeds", "3", "--out", str(tmp_path)]) == 0
    assert len(results_in(tmp_path)["seeds"]["3"]) == 3


# ------------------------------------------------------------------------------------------------ pages


def test_the_page_compares_what_the_arms_name(out):
    folder, _ = out
    page = (folder / "two" / "two.md").read_text()
    shown = [
        "| four steps − two steps |",
        "| two steps − warm start |",
        "| two steps − four steps |",
        "| four steps | 4 |",
    ]
    shown += ["| measured (mean over seeds) | steps |", "| norm | warmup | rl |", "| % | colour, 24 questions |"]
    assert all(text in page for text in shown), [text for text in shown if text not in page]
    assert not any(text in page for text in ("four steps − warm start", "two steps − two steps", NOT_RUN[:-1]))


def test_publishing_fills_the_blocks_and_nothing_else(out, tmp_path):
    folder, _ = out
    results, pages = results_in(folder), tmp_path / "docs" / "experiments"
    pages.mkdir(parents=True)
    before, after = "# Two\n\nNot run yet. <!-- other:begin -->\n", "\n\n## What it shows\n\nNot run yet.\n"
    (pages / "two.md").write_text(f"{before}<!-- results:begin -->\nold\n<!-- results:end -->{after}")
    (tmp_path / "README.md").write_text("a\n<!-- two:begin -->\nold\n<!-- two:end -->\nb\n")
    publish(TWO, results, tmp_path)
    block = page_block(TWO, results, "two.png")
    assert (pages / "two.md").read_text() == f"{before}<!-- results:begin -->\n{block}\n<!-- results:end -->{after}"
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith(f"a\n<!-- two:begin -->\n{evidence(TWO, results)}\n") and readme.endswith(
        "<!-- two:end -->\nb\n"
    )
    assert json.loads((pages / "two.json").read_text()) == results
    assert (pages / "two.png").read_bytes() == (folder / "two" / "two.png").read_bytes()
    (tmp_path / "README.md").write_text("no markers\n")
    publish(TWO, results, tmp_path)
    assert (tmp_path / "README.md").read_text() == "no markers\n"


def test_a_block_needs_both_markers_and_an_experiment_its_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- results:end --> <!-- results:begin -->\n")
    with pytest.raises(ValueError, match="has no <!-- results:begin --> followed by <!-- results:end -->"):
        fill(page, "results", "text")
    with pytest.raises(FileNotFoundError, match="two.md is not there: publish from a checkout"):
        publish(TWO, RESULTS, tmp_path)


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing"], "no experiment 'nothing': expected one of controls, masking, vppo,"),
        (["vppo", "--arms", "neither,all of it"], "no arm all of it: expected some of warm start, neither,"),
        (["vppo", "--seeds", "one"], "--seeds one: expected whole numbers"),
        (["vppo", "seed=3"], "seed= is no override of an experiment: use --seeds"),
        (["vppo", "rl.stepz=3"], "experiment vppo, arm 'warm start': bad settings:\n  unknown setting 'rl.stepz'"),
        (["vppo", "--tiny", "--publish"], "--publish with --tiny"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, told, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_a_name_the_experiments_are_listed(capsys):
    for arguments in ([], ["--list"]):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == [*EXPERIMENTS]


def test_report_only_takes_the_committed_results_where_nothing_was_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(catalogue.EXPERIMENTS, "x", Experiment("x", "?", (Arm("one"), Arm("other")), "other"))
    monkeypatch.setattr("mmrpt.experiments.page.PAGES", tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(RESULTS))
    assert main(["x", "--report-only", "--out", str(tmp_path / "out")]) == 0
    assert "has no result of x: taking docs/experiments/x.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "x" / "results.json").read_text()) == RESULTS
