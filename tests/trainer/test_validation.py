"""Validation during RL: when it asks and whom, which weights are kept, and what a cut-off run has of it in the end."""

from __future__ import annotations

import json
import re
import zlib

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmrpt.checkpoint import drop_older, load_checkpoint, load_state
from mmrpt.corpus import read_jsonl
from mmrpt.engines import native
from mmrpt.engines.run import open_run
from mmrpt.evaluate import main as evaluate
from mmrpt.held_out import evaluate_policy, held_out_samples
from mmrpt.policy import Policy
from mmrpt.report import page, plots
from mmrpt.report.read import read_run
from mmrpt.report.statistics import wilson_interval
from mmrpt.run_folder import RunError, RunFolder
from mmrpt.settings import load_settings
from mmrpt.sources import open_sources
from mmrpt.stopwatch import Stopwatch
from mmrpt.train import main as train
from mmrpt.validation import Validation
from tests.trainer.conftest import SMALL_RUN, ColourPairs, make_policy
from tests.trainer.run_folder import make_run, settings, write_lines
from tests.trainer.test_resume import kill, patch_outside_world, settings_in, without_seconds
from tests.trainer.test_train_cli import write_pairs

VALIDATE = ("evaluation.every=1", "data.validation=8")
EMPTY = (
    "warmup.steps=0",
    "demo.vision_steps=0",
    "control.kinds=[]",
    "evaluation.samples=2",
    "rl.optimiser.lr=0.02",
)


@pytest.fixture
def scripted(monkeypatch):
    """Makes each validation find the next of the given accuracies with the image."""

    def script(*accuracies):
        left = iter(accuracies)

        def answer(policy, name, sets, settings):
            image = next(left)
            cells = {"image": image, "blanked": 0.25, "swapped": 0.5}
            return [{"condition": key, "accuracy": value, "count": 4} for key, value in cells.items()], []

        monkeypatch.setattr("mmrpt.validation.evaluate_policy", answer)

    return script


def validation_of(tmp_path, *overrides):
    chosen = load_settings(None, [f"output={tmp_path}", "name=run", *SMALL_RUN, *VALIDATE, *overrides])
    return Validation(make_policy(), ColourPairs(8), RunFolder(chosen.run_dir), chosen)


def numbered(validation, step):
    """Weights that tell which step they are of."""
    with torch.no_grad():
        validation.policy.head_weight.fill_(step)


def number_of(folder):
    return Policy.load(folder).head_weight[0, 0].item()


# ------------------------------------------------------------------------------------------------ which weights


def test_the_weights_of_the_highest_accuracy_are_kept_and_of_several_the_first(tmp_path, scripted):
    scripted(0.25, 0.75, 0.5, 0.75)
    validation, checkpoints = validation_of(tmp_path), tmp_path / "run" / "checkpoints"
    kept = []
    for step in range(4):
        numbered(validation, step)
        validation.after(step, Stopwatch())
        validation.settle(step + 1)
        kept.append(number_of(checkpoints / "rl-best"))
        drop_older(checkpoints, "rl", keep=0)
    assert kept == [0, 1, 1, 1]
    rows = read_jsonl(tmp_path / "run" / "validation.jsonl")
    assert [(row["step"], row["image"], row["best_step"]) for row in rows] == [
        (0, 0.25, 0),
        (1, 0.75, 1),
        (2, 0.5, 1),
        (3, 0.75, 1),
    ]
    assert rows[0] == {"step": 0, "count": 4, "image": 0.25, "blanked": 0.25, "swapped": 0.5, "best_step": 0}
    assert "best after 2 of 6 steps, 75.0 % with the image" in validation.summary()
    assert [p.name for p in checkpoints.iterdir()] == ["rl-best"]
    assert load_checkpoint(checkpoints / "rl-best", make_policy())["step"] == 2


def test_best_weights_count_once_a_checkpoint_holds_their_step(tmp_path, scripted):
    """Of a run that died at step 4 and goes on from step 2, the best weights are those of its first two steps."""
    scripted(0.25, 0.5, 0.75, 1.0)
    validation, checkpoints = validation_of(tmp_path), tmp_path / "run" / "checkpoints"
    for step in range(4):
        numbered(validation, step)
        validation.after(step, Stopwatch())
        if step == 1:
            validation.settle(2)
    assert number_of(checkpoints / "rl-best") == 1 and number_of(checkpoints / "rl-best.new") == 3
    validation.folder.rewind("rl", 2)
    scripted(0.5, 0.6)
    again = validation_of(tmp_path)
    again.settle(2)
    assert [p.name for p in checkpoints.iterdir()] == ["rl-best"] and number_of(checkpoints / "rl-best") == 1
    for step in (2, 3):
        numbered(again, step + 10)
        again.after(step, Stopwatch())
    again.settle(6)
    assert number_of(checkpoints / "rl-best") == 13 and load_state(checkpoints / "rl-best") == {"step": 4}
    (checkpoints / "rl-best").rename(checkpoints / "rl-best.new")  # the process died in between
    again.settle(6)
    assert [p.name for p in checkpoints.iterdir()] == ["rl-best"] and number_of(checkpoints / "rl-best") == 13
    assert [row["best_step"] for row in read_jsonl(tmp_path / "run" / "validation.jsonl")] == [0, 1, 1, 3]


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5]), (4, [3, 5]), (3, [2, 5]), (100, [5])])
def test_it_asks_at_its_steps_and_after_the_last(tmp_path, scripted, every, steps):
    scripted(*[0.5] * 6)
    validation, watch = validation_of(tmp_path, f"evaluation.every={every}"), Stopwatch()
    sent = []
    validation.folder.trackers.log = lambda phase, step, row: sent.append((phase, step, row["image"]))
    for step in range(6):
        validation.after(step, watch)
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "validation.jsonl")] == steps
    assert sent == [("validation", step, 0.5) for step in steps] and watch.seconds["validation"] > 0


def test_captions_without_a_word_to_hide_are_refused(tmp_path):
    class Silent(ColourPairs):
        def __getitem__(self, index):
            return type(super().__getitem__(index))(f"a/{index}", "...")

    chosen = load_settings(None, [f"output={tmp_path}", *SMALL_RUN, *VALIDATE])
    with pytest.raises(RunError, match="no word of the pairs for validation"):
        Validation(make_policy(), Silent(8), RunFolder(chosen.run_dir), chosen)


# ------------------------------------------------------------------------------------------------ which pairs


def test_given_pairs_for_validation_are_masked_for_nobody(tmp_path, capsys, rewards_with_signal):
    write_pairs(tmp_path / "pairs", 20)
    pairs = (f"data.pairs={tmp_path / 'pairs' / 'pairs.jsonl'}", "data.held_out=4", "data.validation=5")
    run = [f"output={tmp_path}", "name=it", *SMALL_RUN, *EMPTY, *pairs, "masking.captions=20"]
    assert train([*run, "evaluation.every=2", "rl.steps=2"]) == 0
    assert "validation: best after 2 of 2 steps" in capsys.readouterr().out
    sources = open_sources(load_settings(tmp_path / "it" / "config.yaml"))
    parts = [sources.train, sources.held_out["held_out"], sources.validation]
    ids = [{part[i].id for i in range(len(part))} for part in parts]
    assert [len(one) for one in ids] == [11, 4, 5] and len(set().union(*ids)) == 20
    masked = {row["example_id"] for row in read_jsonl(tmp_path / "it" / "masked.jsonl")}
    assert masked and masked <= ids[0]
    asked = {row["example_id"] for row in read_jsonl(tmp_path / "it" / "answers.jsonl")}
    assert asked and asked <= ids[1]
    assert "| best: after step 2 |" in (tmp_path / "it" / "report.md").read_text()
    assert train([*run, "evaluation.every=1", "data.validation=16", "name=more"]) == 2
    assert "data.held_out is 4 and data.validation 16 of 20 rows" in capsys.readouterr().err


def test_drawn_scenes_for_validation_change_no_other_set():
    plain, validated = (
        open_sources(load_settings(None, [f"evaluation.every={n}", "demo.size=9", "evaluation.samples=20"]))
        for n in (0, 5)
    )
    assert plain.validation is None and len(validated.validation) == 100
    assert plain.held_out.keys() == validated.held_out.keys() == {"new_scenes", "new_combinations", "new_style"}
    for name, pairs in plain.held_out.items():
        assert list(pairs) == list(validated.held_out[name])


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def outside_world():
    """A run's world by hand; of the untrained policy's answers half count as right, by their bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch_outside_world(patch)
        patch.setattr("mmrpt.held_out.is_exact", lambda text, answer: zlib.crc32(f"{text}|{answer}".encode()) % 2 == 0)
        yield


@pytest.fixture(scope="module")
def straight(outside_world, tmp_path_factory):
    """The folder of a run that validates at each step and that nothing disturbed."""
    chosen = settings_in(tmp_path_factory.mktemp("straight"), *VALIDATE, *EMPTY)
    native.train(open_run(chosen))
    return chosen.run_dir


def test_validation_leaves_no_trace_in_the_weights(straight, tmp_path):
    chosen = settings_in(tmp_path, *EMPTY)
    native.train(open_run(chosen))
    found, wanted = (load_file(f / "checkpoints" / "rl" / "model.safetensors") for f in (straight, chosen.run_dir))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    logs = [without_seconds(read_jsonl(folder / "metrics.jsonl")) for folder in (straight, chosen.run_dir)]
    assert logs[0] == logs[1]
    assert all(row["seconds_validation"] > 0 for row in read_jsonl(straight / "metrics.jsonl"))
    assert not (chosen.run_dir / "validation.jsonl").exists()
    assert not (chosen.run_dir / "checkpoints" / "rl-best").exists()


def test_the_best_weights_answer_as_they_did(straight, tmp_path, capsys):
    """Loaded as an ordinary folder, on the same questions."""
    rows, chosen = read_jsonl(straight / "validation.jsonl"), settings_in(tmp_path, *VALIDATE, *EMPTY)
    best, last = max(rows, key=lambda row: row["image"]), rows[-1]
    assert len({row["image"] for row in rows}) > 1 and last["best_step"] == best["step"] and len(rows) == 6
    pairs = ColourPairs(8, "validation")
    questions = held_out_samples(pairs, 8, mask=chosen.prompts.mask, seed=chosen.seed)
    for name, row in (("rl-best", best), ("rl", last)):
        policy = Policy.load(straight / "checkpoints" / name)
        cells, _ = evaluate_policy(policy, name, {"validation": (pairs, questions)}, chosen)
        assert {cell["condition"]: cell["accuracy"] for cell in cells} == {
            condition: row[condition] for condition in ("image", "blanked", "swapped")
        }, name
    folder = str(straight / "checkpoints" / "rl-best")
    assert evaluate([folder, *SMALL_RUN, f"output={tmp_path}", "evaluation.samples=2"]) == 0
    assert folder in capsys.readouterr().out.replace("\\", "")


DEATHS = {
    "in a validation": ("mmrpt.validation.evaluate_policy", 2, False),
    "between the best weights and their row": ("mmrpt.validation.save_checkpoint", 1, True),
    "between a validation and the step's log": ("mmrpt.engines.native.log_step", 2, False),
    "between a checkpoint and what follows": ("mmrpt.engines.phase.drop_older", 3, True),  # two phases have no steps
    "between the last step and the end": ("mmrpt.engines.native.log_step", 2, True),
}


def check_best_weights_are_there(folder):
    """Of the steps that a checkpoint holds, whatever came after them."""
    checkpoints = folder / "checkpoints"
    saved = max((load_state(path)["step"] for path in checkpoints.glob("rl-[0-9]*")), default=0)
    rows = read_jsonl(folder / "validation.jsonl") if (folder / "validation.jsonl").exists() else []
    held = [row for row in rows if row["step"] < saved]
    there = {load_state(path)["step"] for path in checkpoints.glob("rl-best*") if path.suffix != ".tmp"}
    assert not held or max(held, key=lambda row: row["image"])["step"] + 1 in there


def test_a_killed_run_ends_with_the_same_validations_and_best_weights(straight, tmp_path):
    chosen = settings_in(tmp_path, *VALIDATE, *EMPTY)
    for path, call, after in DEATHS.values():
        kill(chosen, path, call, after=after)
        check_best_weights_are_there(chosen.run_dir)
    native.train(open_run(chosen))
    assert (chosen.run_dir / "validation.jsonl").read_bytes() == (straight / "validation.jsonl").read_bytes()
    names = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert sorted(path.name for path in (chosen.run_dir / "checkpoints").iterdir()) == names == ["rl", "rl-best"]
    for name in names:
        found, wanted = (load_file(f / "checkpoints" / name / "model.safetensors") for f in (chosen.run_dir, straight))
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
    logs = [without_seconds(read_jsonl(folder / "metrics.jsonl")) for folder in (straight, chosen.run_dir)]
    assert logs[0] == logs[1]


# ------------------------------------------------------------------------------------------------ the report


def with_validation(run, rows):
    (run / "config.yaml").write_text(yaml.safe_dump(settings() | {"evaluation": {"every": 40}}))
    write_lines(run / "validation.jsonl", rows)
    return read_run(run)


ROWS = [
    {"step": step, "count": 50, "image": image, "blanked": 0.2, "swapped": 0.1, "best_step": 39}
    for step, image in ((39, 0.5), (79, 0.48), (119, 0.5))
]


def test_the_report_shows_the_best_and_the_last_with_their_intervals(tmp_path):
    run = with_validation(make_run(tmp_path / "run"), ROWS)
    text = page.render(run, [], {})

    def share(right):
        low, high = wilson_interval(right, 50)
        return f"{2 * right:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    controls = f"{share(10)} | {share(5)}"
    assert "| validation, 50 questions | with image |" in text
    assert f"| best: after step 40 | {share(25)} | {controls} | +40.0 |" in text
    assert f"| last: after step 120 | {share(25)} | {controls} | +40.0 |" in text
    _, _, axis = plots.draw("reward", run).axes
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines["image"].get_xdata()) == [39, 79, 119] and list(lines["image"].get_ydata()) == [0.5, 0.48, 0.5]
    assert {"blanked", "swapped"} <= lines.keys() and axis.get_xlabel() == "validation step"


def test_a_report_without_validation_does_not_miss_it(tmp_path):
    run = make_run(tmp_path / "run")
    assert "alidation" not in re.sub(r"\n\n!.*", "", page.render(read_run(run), [], {}))
    assert len(plots.draw("reward", read_run(run)).axes) == 2
    (run / "config.yaml").write_text(yaml.safe_dump(settings() | {"evaluation": {"every": 40}}))
    assert "`validation.jsonl` is not there" in page.render(read_run(run), [], {})
    run = with_validation(run, [*ROWS[:1], {"step": 40}, ROWS[1] | {"image": float("nan")}])
    (run.folder / "validation.jsonl").write_text(
        (run.folder / "validation.jsonl").read_text() + json.dumps(ROWS[2])[:30]
    )
    assert "| last: after step 40 |" in page.render(read_run(run.folder), [], {})
