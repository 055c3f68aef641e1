"""`python -m mmrpt.evaluate`: from saved models and pairs to the tables, and what is refused."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from mmrpt.corpus import open_corpus, read_jsonl, write_jsonl
from mmrpt.evaluate import main
from mmrpt.held_out import evaluate_policy, held_out_questions
from mmrpt.masking.build import random_masks
from mmrpt.policy import Policy
from mmrpt.report.markdown import points
from mmrpt.report.page import render
from mmrpt.report.read import read_run
from mmrpt.report.statistics import paired_difference_interval
from mmrpt.settings import load_settings
from mmrpt.sources import open_sources
from tests.trainer.conftest import SMALL_RUN, make_looking_policy
from tests.trainer.test_train_cli import BAD_ROWS, add_bad_rows, write_pairs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two policies whose words depend on the image."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        make_looking_policy(seed).write_files(folder / name)
    return [str(folder / name) for name in ("one", "two")]


@pytest.fixture
def pairs(tmp_path):
    add_bad_rows(tmp_path / "pairs", write_pairs(tmp_path / "pairs", 24))
    return tmp_path / "pairs" / "pairs.jsonl"


@pytest.fixture
def judged_by_bytes(monkeypatch):
    """Untrained policies never answer in the format; half of their completions count as right here."""
    monkeypatch.setattr(
        "mmrpt.held_out.is_exact", lambda text, answer: zlib.crc32(f"{text}|{answer}".encode()) % 2 == 0
    )


def evaluate(tmp_path, *arguments):
    output = [] if "--out" in arguments else [f"output={tmp_path / 'runs'}"]
    return main([*SMALL_RUN, *output, *arguments])


def result(folder):
    return json.loads((folder / "evaluation.json").read_text())["rows"], read_jsonl(folder / "answers.jsonl")


def test_two_models_on_given_pairs(models, pairs, tmp_path, capsys, judged_by_bytes):
    chosen = (f"data.pairs={pairs}", "data.held_out=25")  # of 26: an image that cannot be used is among them
    assert evaluate(tmp_path, *models, *chosen, "--samples", "10", "--sampled", "2") == 0
    folder = tmp_path / "runs" / "evaluate"
    printed, (rows, answers) = capsys.readouterr().out, result(folder)
    settings = load_settings(None, [*SMALL_RUN, *chosen, "evaluation.samples=10", f"output={tmp_path}", "name=by_hand"])
    settings.run_dir.mkdir()
    sets = held_out_questions(open_sources(settings).held_out, settings)
    expected = [evaluate_policy(Policy.load(name), name, sets, settings, sampled=2) for name in models]
    assert rows == expected[0][0] + expected[1][0] and answers == expected[0][1] + expected[1][1]
    assert len({row["accuracy"] for row in rows}) > 1 and all(row["count"] == 10 for row in rows)

    def right(model, condition, key="exact"):
        return np.array([np.mean(a[key]) for a in answers if (a["model"], a["condition"]) == (model, condition)])

    def told(values, bound=1.0):
        interval = paired_difference_interval(values, bound)
        return f"{points(values.mean())} ({points(interval.low)} to {points(interval.high)})"

    for key in ("exact", "sampled_exact"):
        gaps = [right(model, "image", key) - right(model, "swapped", key) for model in models]
        for gap in gaps:
            assert told(gap) in printed
        assert told(gaps[1] - gaps[0], 2.0) in printed
        assert told(right(models[1], "image", key) - right(models[0], "image", key)) in printed
    assert "avg@2" in printed and "| word | 10 |" in printed
    assert (folder / "evaluation.md").read_text() in printed
    rejected = read_jsonl(folder / "rejected.jsonl")
    assert rejected and {row["kind"] for row in rejected} <= set(BAD_ROWS) and str(folder / "rejected.jsonl") in printed


def test_the_drawn_world_and_a_new_folder_each_time(models, tmp_path, judged_by_bytes):
    """A run's settings name the run, not the folder of its evaluation."""
    config = tmp_path / "config.yaml"
    config.write_text("name: mine\nrollout: {max_new_tokens: 3}\n")
    assert [evaluate(tmp_path, models[0], "--config", str(config), "seed=3") for _ in range(2)] == [0, 0]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["evaluate", "evaluate-2"]
    first, second = (result(tmp_path / "runs" / name) for name in ("evaluate", "evaluate-2"))
    assert first == second
    rows, answers = first
    assert [(row["set"], row["condition"]) for row in rows] == [
        (name, condition)
        for name in ("new_scenes", "new_combinations", "new_style")
        for condition in ("image", "blanked", "swapped")
    ]
    assert len(answers) == 9 * 4 and {kind for row in rows for kind in row["by_kind"]} > {"colour", "object"}
    assert load_settings(tmp_path / "runs" / "evaluate" / "config.yaml").seed == 3
    page = render(read_run(tmp_path / "runs" / "evaluate"), [], {})
    assert "The run is finished" in page and "one" in page and "gap" in page


def test_exactly_the_given_questions_are_asked(models, pairs, tmp_path, capsys, judged_by_bytes):
    corpus, rng = open_corpus(pairs), np.random.default_rng(0)
    good = [i for i in range(len(corpus)) if i not in range(3, 7)]
    samples = [s for i in good for s in random_masks(corpus[i], 2, mask="<gone>", rng=rng)]
    write_jsonl(tmp_path / "masked.jsonl", [sample.to_json() for sample in samples])
    (pairs.parent / "0.png").unlink()
    lost = corpus[0].id
    chosen = (models[0], f"data.pairs={pairs}", "--masked", str(tmp_path / "masked.jsonl"))
    assert evaluate(tmp_path, *chosen, "--out", str(tmp_path / "all")) == 0
    rows, answers = result(tmp_path / "all")
    kept = [s for s in samples if s.example_id != lost]
    assert {row["set"] for row in rows} == {"masked"} and len(kept) < len(samples)
    assert [a["sample_id"] for a in answers] == [s.id for s in kept] * 3
    assert all("<gone>" in a["masked_caption"] for a in answers)
    (row,) = read_jsonl(tmp_path / "all" / "rejected.jsonl")
    assert (row["kind"], row["id"]) == ("image_missing", lost)
    assert evaluate(tmp_path, *chosen, "--samples", "4", "--out", str(tmp_path / "few")) == 0
    few = [a["sample_id"] for a in result(tmp_path / "few")[1] if a["condition"] == "image"]
    assert len(samples) == 48 and few == [s.id for s in samples[::12] if s.example_id != lost]
    assert evaluate(tmp_path, models[0], "--masked", str(tmp_path / "masked.jsonl")) == 2
    assert "Give the data.pairs that it was made of" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model was given"),
        (["nowhere"], "no config.json in nowhere"),
        (["{pairs}"], "expected a Hugging Face model folder"),
        (["{one}", "{one}/"], "was given more than once"),
        (["{one}", "{pairs}"], "no config.json in"),
        (["{one}", "name=it"], "give --out FOLDER"),
        (["{one}", "--out", "{pairs}"], "exists already: choose another folder"),
        (["{one}", "output=x", "--out", "{one}/new"], "give --out FOLDER"),
        (["{one}", "--sampled", "-1"], "evaluation.sampled is -1"),
        (["{one}", "--samples", "1"], "evaluation.samples is 1"),
        (["{one}", "rl.lr=1"], "unknown setting 'rl.lr'"),
        (["{one}", "data.pairs=nowhere.jsonl"], "there is no such file"),
        (["{one}", "device=cuda:77"], "cannot be used here"),
        (["{one}", "--masked", "{pairs}/pairs.jsonl"], "expected what mmrpt.mask or mmrpt.train writes"),
        (["{one}", "--masked", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_work_is_one_message_and_leaves_nothing(models, pairs, tmp_path, capsys, arguments, message):
    arguments = [text.format(one=models[0], pairs=pairs.parent) for text in arguments]
    assert evaluate(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and error.startswith("error: ") and message in error
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_model_of_the_hub_is_downloaded_by_its_name(models, pairs, tmp_path, capsys, monkeypatch):
    asked = []

    def download(name, **_):
        asked.append(name)
        if name == "owner/none":
            raise OSError("404 Client Error")
        return models[0]

    monkeypatch.setattr("mmrpt.families.snapshot_download", download)
    chosen = (f"data.pairs={pairs}", "data.held_out=4", "evaluation.samples=2")
    assert evaluate(tmp_path, "owner/model", *chosen) == 0
    assert {row["model"] for row in result(tmp_path / "runs" / "evaluate")[0]} == {"owner/model"}
    assert evaluate(tmp_path, models[1], "owner/none", *chosen) == 2
    assert "no model of that name (404 Client Error)" in capsys.readouterr().err
    assert asked == ["owner/model", "owner/none"] and len(list((tmp_path / "runs").iterdir())) == 1


def test_what_earlier_models_gave_survives_a_model_that_fails(models, pairs, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    chosen = (f"data.pairs={pairs}", "data.held_out=4", "evaluation.samples=2")
    assert evaluate(tmp_path, models[0], str(tmp_path / "other"), *chosen) == 2
    error = capsys.readouterr().err
    assert "holds a 'bert'" in error and f"gave is in {tmp_path / 'runs' / 'evaluate'}" in error
    rows, answers = result(tmp_path / "runs" / "evaluate")
    assert {row["model"] for row in rows} == {models[0]} and len(answers) == 3 * 2
