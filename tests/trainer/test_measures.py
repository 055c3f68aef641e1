"""Mirage Score, B-Clean, avg@k, the pool without unseen artwork and the AUC of tokens, each against a count by hand."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from mmrpt.corpus import read_jsonl
from mmrpt.report.numbers import numbers_of
from mmrpt.report.page import accuracies, headline
from mmrpt.report.read import read_run
from mmrpt.report.statistics import paired_difference_interval, paired_ratio_interval, roc_auc, wilson_interval
from mmrpt.report.tally import ALL_SETS, SEEN_ART
from mmrpt.settings import load_settings
from mmrpt.sources import open_sources
from mmrpt.train import main
from tests.trainer.conftest import SMALL_RUN
from tests.trainer.run_folder import write_lines

MODELS = ("warmup", "rl")
KINDS = {"new_scenes": ("colour", "object", "count", "colour"), "new_style": ("object", "object", "colour", "position")}
# Right or wrong of the four questions of new_scenes, then of new_style.
GREEDY = {
    ("warmup", "image"): "1010 0010",
    ("warmup", "blanked"): "0010 0000",
    ("warmup", "swapped"): "0000 0010",
    ("rl", "image"): "1111 0111",
    ("rl", "blanked"): "0011 0001",
    ("rl", "swapped"): "0010 0001",
}
# How many of three sampled answers to each are right.
SAMPLED = {
    ("warmup", "image"): "1020 0030",
    ("warmup", "blanked"): "0010 0000",
    ("warmup", "swapped"): "0100 0010",
    ("rl", "image"): "3213 0231",
    ("rl", "blanked"): "0031 0002",
    ("rl", "swapped"): "0130 1001",
}


def write_run(folder: Path, sampled: bool = True) -> Path:
    rows, answers = [], []
    for (model, condition), name in product(GREEDY, KINDS):
        at = list(KINDS).index(name)
        greedy, several = ([int(one) for one in table[model, condition].split()[at]] for table in (GREEDY, SAMPLED))
        where = {"model": model, "set": name, "condition": condition}
        row = where | {"count": 4}
        for prefix, hits, of in (("", greedy, 1), ("sampled_", several, 3)):
            kinds = {kind: [h for h, k in zip(hits, KINDS[name], strict=True) if k == kind] for kind in KINDS[name]}
            row[f"{prefix}accuracy"] = sum(hits) / of / 4
            row[f"{prefix}by_kind"] = {kind: [sum(own) / of / len(own), len(own)] for kind, own in kinds.items()}
        row["sampled"] = 3
        rows.append(row if sampled else {key: value for key, value in row.items() if "sampled" not in key})
        for question, (one, few, kind) in enumerate(zip(greedy, several, KINDS[name], strict=True)):
            answer = where | {"sample_id": f"{name}/{question}", "kind": kind, "exact": bool(one)}
            answers.append(answer | ({"sampled_exact": [i < few for i in range(3)]} if sampled else {}))
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows}))
    write_lines(folder / "answers.jsonl", answers)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def right(table: dict, model: str, condition: str, without: str = "") -> list[int]:
    """Of each question, but those at the places `without`."""
    return [int(one) for i, one in enumerate(table[model, condition].replace(" ", "")) if str(i) not in without]


def test_mirage_score_is_blanked_over_image(folder):
    numbers = numbers_of(read_run(folder))
    expected = {
        ("warmup", ALL_SETS): 1 / 3,
        ("rl", ALL_SETS): 3 / 7,
        ("warmup", "new_scenes"): 1 / 2,
        ("rl", "new_style"): 1 / 3,
        ("warmup", SEEN_ART): 1 / 3,
        ("rl", SEEN_ART): 3 / 6,
    }
    for (model, name), value in expected.items():
        assert numbers[f"mirage/{model}/{name}"].value == pytest.approx(value), (model, name)
    found = numbers[f"mirage/rl/{SEEN_ART}"]
    pairs = (right(GREEDY, "rl", condition, "45") for condition in ("blanked", "image"))
    assert found.interval == paired_ratio_interval(*pairs) and found.count == 6
    rows = [
        row | {"accuracy": 0.0, "by_kind": {}} for row in json.loads((folder / "evaluation.json").read_text())["rows"]
    ]
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows}))
    assert not [name for name in numbers_of(read_run(folder)) if name.startswith("mirage")], "nothing over nothing"


def test_b_clean_is_what_no_model_answers_blanked(folder):
    """The third question is answered by both without the image, the fourth and the last by RL alone."""
    numbers = numbers_of(read_run(folder))
    for name, clean, asked in ((ALL_SETS, 5, 8), ("new_scenes", 2, 4), ("new_style", 3, 4), (SEEN_ART, 3, 6)):
        share = numbers[f"b_clean_share/{name}"]
        assert share == (clean / asked, wilson_interval(clean, asked), asked), name
    warm, rl = [1, 0, 0, 0, 1], [1, 1, 0, 1, 1]  # with the image, of the questions 0, 1, 4, 5 and 6
    for model, hits in (("warmup", warm), ("rl", rl)):
        assert numbers[f"b_clean/accuracy/{model}/{ALL_SETS}/image"] == (
            sum(hits) / 5,
            wilson_interval(sum(hits), 5),
            5,
        )
    change = numbers[f"b_clean/change/rl - warmup/{ALL_SETS}/image"]
    differences = [a - b for a, b in zip(rl, warm, strict=True)]
    assert change.value == pytest.approx(2 / 5) and change.interval == paired_difference_interval(differences)
    assert numbers[f"b_clean/accuracy/warmup/{ALL_SETS}/swapped"].value == pytest.approx(1 / 5)
    assert numbers[f"b_clean/accuracy/warmup/{ALL_SETS}/gap"].value == pytest.approx(1 / 5)
    assert numbers[f"b_clean/accuracy/warmup/{SEEN_ART}/image"].value == pytest.approx(2 / 3)
    assert not [name for name in numbers if name.startswith("b_clean/") and name.endswith("blanked")]


def test_objects_of_the_new_style_are_left_out_of_a_second_pool(folder):
    numbers = numbers_of(read_run(folder))
    assert numbers[f"accuracy/rl/{ALL_SETS}/image"].value == pytest.approx(7 / 8)
    assert numbers[f"accuracy/rl/{SEEN_ART}/image"] == (1.0, wilson_interval(6, 6), 6)
    assert numbers[f"accuracy/warmup/{SEEN_ART}/image"].value == pytest.approx(3 / 6)
    gap = numbers[f"accuracy/rl/{SEEN_ART}/gap"]
    image, other = (right(GREEDY, "rl", condition, "45") for condition in ("image", "swapped"))
    assert gap.value == pytest.approx(4 / 6)
    assert gap.interval == paired_difference_interval([a - b for a, b in zip(image, other, strict=True)])
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    write_lines(folder / "answers.jsonl", [{k: v for k, v in row.items() if k != "kind"} for row in rows])
    gap = numbers_of(read_run(folder))[f"accuracy/rl/{SEEN_ART}/gap"]
    assert gap.value == pytest.approx(4 / 6) and gap.interval is None, "which answers it is of is not known"


def test_avg_is_the_mean_share_with_intervals_over_questions(folder):
    numbers = numbers_of(read_run(folder))
    for name, without, of in ((ALL_SETS, "", 8), (SEEN_ART, "45", 6)):
        hits = {key: right(SAMPLED, *key, without) for key in SAMPLED}
        image = numbers[f"sampled/accuracy/rl/{name}/image"]
        assert image.value == pytest.approx(sum(hits["rl", "image"]) / 3 / of) and image.count == of
        assert image.interval == wilson_interval(sum(hits["rl", "image"]) / 3, of)
        gaps = {m: [(a - b) / 3 for a, b in zip(hits[m, "image"], hits[m, "swapped"], strict=True)] for m in MODELS}
        change = numbers[f"sampled/change/rl - warmup/{name}/gap"]
        assert change.value == pytest.approx((sum(gaps["rl"]) - sum(gaps["warmup"])) / of)
        differences = [a - b for a, b in zip(gaps["rl"], gaps["warmup"], strict=True)]
        assert change.interval == pytest.approx(paired_difference_interval(differences, bound=2))
    assert numbers[f"sampled/accuracy/rl/{ALL_SETS}/image"].value == pytest.approx(15 / 24)


def test_the_tables_say_what_each_number_is(folder, tmp_path):
    run = read_run(folder)
    numbers = numbers_of(run)
    top, below = headline(run, numbers), "\n".join(accuracies(run, numbers))
    assert f"| {SEEN_ART} | RL | 100.0 % (" in top and "No training image shows that artwork" in top
    assert "| object | 3 |" in below and "in the new art style, whose artwork no training image shows | 2 |" in below
    interval = paired_ratio_interval(right(GREEDY, "rl", "blanked"), right(GREEDY, "rl", "image"))
    assert f"| {ALL_SETS} | RL | 0.43 ({interval.low:.2f} to {interval.high:.2f}) |" in below
    assert "Mirage Score = accuracy with the image blanked / accuracy with the image" in below
    low, high = wilson_interval(5, 8)
    assert f"62.5 % ({100 * low:.1f} to {100 * high:.1f}) of the 8 of {ALL_SETS}; 50.0 % (" in below
    low, high = wilson_interval(4, 5)
    assert f"| {ALL_SETS} | RL | 80.0 % ({100 * low:.1f} to {100 * high:.1f}) | – |" in below
    assert "avg@3" in below and f"| {ALL_SETS} | RL | 62.5 % (" in below
    run = read_run(write_run(tmp_path / "greedy", sampled=False))
    assert "avg@" not in "\n".join(accuracies(run, numbers_of(run)))


def test_a_run_samples_and_states_the_auc_of_its_tokens(tmp_path, rewards_with_signal, monkeypatch):
    """On the drawn world: the truth of a token is that of the word it is a part of; full stops have none."""
    monkeypatch.setattr("mmrpt.report.page.draw_all", lambda run: [])
    short = ["demo.vision_steps=1", "rl.steps=1", "rl.max_rounds=1", "warmup.steps=2", "evaluation.samples=2"]
    assert main([f"output={tmp_path}", "name=it", *SMALL_RUN, *short, "demo.size=24", "evaluation.sampled=2"]) == 0
    folder = tmp_path / "it"
    evaluation, train = (
        json.loads((folder / "evaluation.json").read_text()),
        open_sources(load_settings(folder / "config.yaml")).train,
    )
    words = {train[i].id: train[i].words for i in range(len(train))}
    masses: dict[bool, list[float]] = {True: [], False: []}
    for row in read_jsonl(folder / "scores.jsonl"):
        for (start, end), mass in zip(row["token_spans"], row["token_scores"], strict=True):
            if own := [word.needs_image for word in words[row["example_id"]] if word.start < end and start < word.end]:
                masses[any(own)].append(mass)
    beaten = [float(a > b) + (a == b) / 2 for a in masses[True] for b in masses[False]]
    assert evaluation["token_auc"] == pytest.approx(sum(beaten) / len(beaten), abs=1e-12)
    assert len(masses[True]) > 10 and len(masses[False]) > 50
    run = read_run(folder)
    found = numbers_of(run)["token_auc"]
    assert found.value == evaluation["token_auc"] and found.count == sum(map(len, masses.values()))
    assert found.interval.low < found.value < found.interval.high
    assert found.value == roc_auc(run.token_scores.needs_image, run.token_scores.scores)
    assert f"words that need it: {found.value:.3f} (" in (folder / "report.md").read_text()
    assert all(row["sampled"] == 2 for row in evaluation["rows"])
    assert {len(row["sampled"]) for row in read_jsonl(folder / "answers.jsonl")} == {2}
