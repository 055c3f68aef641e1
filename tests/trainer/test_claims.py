"""Experiments that ask more than the run's own questions: masks, later supervised training, and images of easy-VQA."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw

from mmrpt.captions import masked_batch
from mmrpt.corpus import read_jsonl, write_jsonl
from mmrpt.engines import native
from mmrpt.engines.run import open_run
from mmrpt.experiments import easy_vqa as easy
from mmrpt.experiments import robustness
from mmrpt.experiments.arms import Arm
from mmrpt.experiments.controls import which_card
from mmrpt.experiments.masking import masks
from mmrpt.experiments.page import page_block
from mmrpt.experiments.robustness import AFTER, BIASED, CLEAN, NOISY, PAIRS, ROBUSTNESS, tune, tuning_samples
from mmrpt.experiments.runner import Job, result_of, run_jobs
from mmrpt.held_out import shown_images
from mmrpt.masking.build import truth_masks
from mmrpt.objective import supervised_loss
from mmrpt.settings import SettingsError, load_settings
from mmrpt.settings.scale import ANY_REWARD, ANY_SIGNAL
from mmrpt.types import MaskedSample
from mmrpt.world import World
from mmrpt.world.concepts import USUAL_COLOUR
from tests.trainer.conftest import SMALL_RUN


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of seconds, with the control on random masks."""
    made = [f"output={tmp_path_factory.mktemp('claims')}", "name=run", *SMALL_RUN, "evaluation.samples=2"]
    made += ["control.kinds=[rl_random_masks]", f"reward.custom={{{ANY_REWARD}: 1}}"]
    run = open_run(load_settings(None, [*made, *(f"rl.{name}={value}" for name, value in ANY_SIGNAL.items())]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "report", lambda run: None)  # which takes longer than all else
        native.train(run)
    return run


# ------------------------------------------------------------------------------------------------ controls


def test_answers_of_another_card_are_told_from_other_wrong_ones(tmp_path):
    """Of each scene four answers on its first card's colour: right, another card's, one on no card, and none."""
    world, rows, several = World(), [], 0
    for index in range(12):
        cards = world.scene("new_scenes", index).cards
        own, other = cards[0].colour, next((c.colour for c in cards if c.colour != cards[0].colour), "white")
        several += other != "white"
        for given in (own, other, "white", None):
            completion = "<think> it" if given is None else f"<think> it</think><answer> {given}</answer>"
            row = {"model": "rl", "condition": "image", "kind": "colour", "answer": own, "completion": completion}
            rows.append(row | {"example_id": f"new_scenes/{index:06d}", "exact": given == own})
    rows += [
        row | change for row in rows for change in ({"model": "warmup"}, {"condition": "blanked"}, {"kind": "count"})
    ]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    run = SimpleNamespace(folder=tmp_path, sources=SimpleNamespace(world=world))
    count = sum(len(world.scene("new_scenes", index).cards) > 1 for index in range(12))
    assert 0 < several <= count < 12
    shares = which_card(run, Arm("RL"))
    assert shares == {
        "right, of one card": 0.25,
        "right, of several": 0.25,
        "another card's, of several": pytest.approx(several / (4 * count)),
    }
    assert which_card(run, Arm("other", model="grpo")) == {}


# ------------------------------------------------------------------------------------------------ masking


def test_masks_are_counted_by_the_truth_of_the_words_they_hide(run):
    samples = [MaskedSample(**row) for row in read_jsonl(run.folder / "masked.jsonl")]
    examples = [run.sources.train[i] for i in range(run.settings.masking.captions)]
    places = {(e.id, i) for e in examples for w in e.words if w.needs_image for i in range(w.start, w.end)}

    def share(samples: list[MaskedSample]) -> float:
        return np.mean([any((s.example_id, i) in places for i in range(s.start, s.end)) for s in samples])

    found, drawn = masks(run, Arm("a")), masks(run, Arm("b", model="rl_random_masks"))
    random = native.random_samples(run, samples)
    assert found["masked samples"] == len(samples) and drawn["masked samples"] == len(random)
    assert found["share that needs the image"] == share(samples)
    assert drawn["share that needs the image"] == share(random) not in (0, share(samples))
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    assert (
        found["AUC of sentences"] == evaluation["dependency_auc"] and found["AUC of tokens"] == evaluation["token_auc"]
    )
    assert "AUC of tokens" not in drawn and masks(run, Arm("c", model="warmup")) == {}


# ------------------------------------------------------------------------------------------------ robustness


def test_biased_pairs_have_usual_colours_alone_and_no_pair_of_the_run(run):
    own = {run.sources.train[i].caption for i in range(100)}
    for pairs in (CLEAN, BIASED, NOISY):
        source, samples = tuning_samples(run, pairs)
        assert len(source) == len(samples) == PAIRS and all(s.needs_image for s in samples)
        cards = [card for i in range(PAIRS) for card in source.world.scene("train", i).cards]
        usual = np.mean([card.colour == USUAL_COLOUR[card.category] for card in cards])
        assert usual == 1 if pairs == BIASED else usual < 0.6  # 0.3 of the time by intent, and then by chance
        assert len(own & {source[i].caption for i in range(100)}) < 10  # the world has few scenes of one card
        assert [s.example_id for s in samples] == [source[i].id for i in range(PAIRS)]


def test_wrong_answers_are_others_of_their_kind_and_as_many_as_asked_for(run):
    right, wrong = (tuning_samples(run, pairs)[1] for pairs in (CLEAN, NOISY))
    changed = [(a, b) for a, b in zip(right, wrong, strict=True) if a != b]
    assert len(changed) == 0.3 * PAIRS and tuning_samples(run, NOISY)[1] == wrong
    of_kind = {kind: {s.answer for s in right if s.kind == kind} for kind in {s.kind for s in right}}
    for a, b in changed:
        assert b == replace(a, answer=b.answer) and b.answer != a.answer and b.answer in of_kind[a.kind]
    assert len({a.kind for a, _ in changed}) == len(of_kind) == 5
    alike = [replace(right[0], answer="red")] * 4
    with pytest.raises(ValueError, match="samples have the answer 'red': none is wrong for another"):
        robustness.with_wrong_answers(alike, 0.5, seed=0)


def test_tuning_teaches_the_samples_and_begins_with_the_arms_model(run, monkeypatch):
    monkeypatch.setattr(robustness, "STEPS", 8)
    source, samples = tuning_samples(run, CLEAN)
    images = [source.image(s.example_id) for s in samples[:8]]

    def loss() -> float:
        with torch.no_grad():
            return float(
                supervised_loss(run.policy, masked_batch(run.policy, samples[:8], images, run.settings.prompts))
            )

    run.load("warmup")
    before = loss()
    tune(run, source, samples[:8])
    assert loss() < before
    asked = []
    monkeypatch.setattr(
        "mmrpt.held_out.evaluate_policy", lambda policy, name, sets, settings: asked.append((name, {*sets}, loss()))
    )
    (arm,) = (a for a in AFTER if (a.model, a.pairs) == ("rl", CLEAN))
    robustness.tuned_answers(run, arm)
    robustness.tuned_answers(run, arm)  # from RL's weights again, not from those of the first time
    robustness.tuned_answers(run, replace(arm, pairs=NOISY))
    robustness.tuned_answers(run, replace(arm, model="warmup"))
    assert asked[0] == asked[1] and asked[0][:2] == ("rl", {"new_scenes", "new_combinations", "new_style"})
    assert len({found for _, _, found in asked}) == 3
    assert robustness.tuned_answers(run, replace(arm, pairs="")) is None and len(asked) == 4


def test_an_arms_own_answers_take_the_place_of_the_runs(run, tmp_path):
    job = Job(Arm("a"), 0, run.settings, tmp_path / "a.json")
    own = result_of(job, {})
    assert set(own["hits"]) == {"new_scenes", "new_combinations", "new_style"} and len(own["rows"]) == 9
    row = {"model": "rl", "set": "other", "condition": "image"}
    question = {"sample_id": "1", "masked_caption": "<mask>", "answer": "a"}
    answers = [row | question | {"exact": exact} for exact in (True, False, True)]
    answers += [answers[0] | {"model": "warmup"}]
    rows = [row | {"accuracy": 2 / 3, "count": 3, "by_kind": {}}, row | {"model": "warmup"}]
    found = result_of(job, {"x": 1}, (rows, answers))
    assert found["hits"] == {"other": {"image": "101"}} and found["measured"] == {"x": 1}
    assert found["rows"] == [{"set": "other", "condition": "image", "accuracy": 2 / 3, "count": 3, "by_kind": {}}]
    assert found["questions"].keys() == {"other"} and found["questions"] != own["questions"]


def test_models_are_compared_after_the_same_tuning():
    """100 questions, of which an arm answers as many as stand in RIGHT with the image, and none without."""
    right = {"warm start": 40, "RL": 60, f"warm start then {BIASED}": 30, f"RL then {BIASED}": 55}

    def result(name: str) -> dict:
        hits = {"image": "1" * right[name] + "0" * (100 - right[name]), "blanked": "0" * 100, "swapped": "0" * 100}
        rows = [{"set": "s", "condition": "image", "count": 300, "accuracy": right[name] / 100, "by_kind": {}}]
        return {"hits": {"s": hits}, "rows": rows, "questions": {"s": "q"}, "model": "rl", "measured": {}} | {
            "seconds": {"rl": 1.0}
        }

    made = dict.fromkeys(("date", "commit", "cpu", "threads", "torch", "transformers"), "x")
    page = page_block(ROBUSTNESS, {"made": made, "base": [], "seeds": {"0": {name: result(name) for name in right}}})
    for pair, points in (
        (f"RL then {BIASED} − RL", "-5.0"),
        (f"warm start then {BIASED} − warm start", "-10.0"),
        (f"RL then {BIASED} − warm start then {BIASED}", "+25.0"),
    ):
        assert f"| {pair} | {points} (" in page


# ------------------------------------------------------------------------------------------------ easy-VQA

SHAPES = [  # colour by the data set's name, box in 64 x 64 pixels
    ("red", (2, 2, 20, 20)),
    ("gray", (40, 5, 60, 30)),
    ("brown", (3, 40, 25, 60)),
    ("blue", (20, 20, 45, 45)),
    ("gray", (32, 32, 63, 63)),
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Five images in the form of the package, with the questions it asks of each."""
    paths, questions = {}, []
    for number, (colour, box) in enumerate(SHAPES):
        image = Image.new("RGB", (64, 64), (240, 250, 245))
        ImageDraw.Draw(image).rectangle(box, fill=colour)
        paths[number] = str(tmp_path / f"{number}.png")
        image.save(paths[number])
        questions += [
            (f"what is the {colour} shape?", "rectangle", number),
            ("what color is the shape?", colour, number),
            ("what is the color of the rectangle?", colour, number),
            ("is there a blue shape?", "yes" if colour == "blue" else "no", number),
        ]
    module = ModuleType("easy_vqa")
    module.get_test_questions = lambda: tuple(list(column) for column in zip(*questions, strict=True))
    module.get_test_image_paths = lambda: paths
    monkeypatch.setitem(sys.modules, "easy_vqa", module)
    easy.easy_vqa.cache_clear()
    yield
    easy.easy_vqa.cache_clear()


def answers_of(source) -> list[tuple[str, str, str]]:
    return [(e.id, w.kind, e.caption[w.start : w.end]) for e in source.examples for w in e.words]


def test_colours_that_the_world_has_and_positions_without_doubt_are_asked(package):
    source = easy.easy_vqa(112, 99)
    assert answers_of(source) == [
        ("colour/000000", "colour", "red"),
        ("colour/000001", "colour", "grey"),
        ("colour/000003", "colour", "blue"),
        ("colour/000004", "colour", "grey"),
        ("position/000000", "position", "top left"),
        ("position/000001", "position", "top right"),
        ("position/000002", "position", "bottom left"),
        ("position/000004", "position", "bottom right"),  # the blue one reaches into all quarters
    ]
    words = {word for e in source.examples for word in e.caption.removesuffix(".").split()}
    assert words <= {*World().vocabulary()} and len({e.caption for e in source.examples}) == 8
    image = source.image("colour/000001")
    assert image.size == (112, 112) and image.getpixel((90, 30)) == ImageColor.getrgb("gray")
    assert [kind for _, kind, _ in answers_of(easy.easy_vqa(112, 3))] == ["colour"] * 3 + ["position"] * 3


def test_the_commonest_answer_needs_no_image(package, run):
    few = SimpleNamespace(settings=replace(run.settings, evaluation=replace(run.settings.evaluation, samples=99)))
    assert easy.majority(few, Arm("a")) == {"the commonest answer": {"colour": 0.5, "position": 0.25}}


def test_every_question_is_asked_with_its_own_image_a_grey_one_and_another(package, run):
    run = replace(run, settings=replace(run.settings, evaluation=replace(run.settings.evaluation, samples=99)))
    rows, answers = easy.zero_shot(run, Arm("a", model="warmup"))
    assert [(row["set"], row["condition"], row["count"]) for row in rows] == [
        ("easy-vqa", condition, 8) for condition in ("image", "blanked", "swapped")
    ]
    assert {row["model"] for row in rows} == {"warmup"} and len(answers) == 24
    source = easy.easy_vqa(112, 99)
    samples = [sample for e in source.examples for sample in truth_masks(e, mask="<mask>")]
    for sample, shown in zip(samples, shown_images(samples, source, "swapped"), strict=True):
        assert shown.tobytes() != source.image(sample.example_id).tobytes()


def test_a_package_that_is_missing_is_told_before_anything_is_trained(tmp_path):
    job = Job(Arm("a"), 0, load_settings(None, [f"output={tmp_path}"]), tmp_path / "a.json")
    with pytest.raises(SettingsError, match="needs the package no-such-thing, .* pip install no-such-thing"):
        run_jobs(replace(easy.EASY_VQA, requires="no-such-thing"), [job], tmp_path)
    assert not [*tmp_path.iterdir()]


def test_the_released_data_shows_what_is_asked():
    """The colour of a shape's pixels is the nearest to the one that is named; the others would not be."""
    pytest.importorskip("easy_vqa")
    easy.easy_vqa.cache_clear()
    source = easy.easy_vqa(64, 10_000)
    assert Counter(kind for _, kind, _ in answers_of(source)) == {"colour": 499, "position": 294}
    tints = {"red": "red", "yellow": "yellow", "green": "lime", "blue": "blue", "grey": "gray"}
    table = np.array([ImageColor.getrgb(tint) for tint in tints.values()])
    right = []
    for name, kind, answer in answers_of(source):
        if kind == "colour":
            *_, (_, shape), _ = sorted(source.image(name).getcolors(64 * 64))  # the background is larger
            right.append([*tints][np.abs(table - shape).sum(-1).argmin()] == answer)
    assert all(right)
