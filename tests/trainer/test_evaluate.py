"""Evaluation: what is asked, which image is shown, and counts made by hand with an oracle in the model's place."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mmrpt.held_out import (
    CONDITIONS,
    answer_samples,
    evaluate_policy,
    held_out_samples,
    sampled_answers,
    shown_images,
)
from mmrpt.masking.words import FUNCTION_WORDS
from mmrpt.types import Example
from mmrpt.world import World, WorldConfig
from tests.trainer.conftest import COLOURS, ColourPairs, masked_colour


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig(image_size=56))


# ------------------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("split", ["new_scenes", "new_combinations", "new_style"])
def test_held_out_questions_need_the_image_and_balance_kinds(world, split):
    source = world.source(split, 240)
    samples = held_out_samples(source, 120, mask="<mask>", seed=0)
    assert len(samples) == 120 and len({s.example_id for s in samples}) == 120
    truth = {source[i].id: source[i] for i in range(240)}
    used = Counter()
    for sample in samples:
        example = truth[sample.example_id]
        words = {(w.start, w.end): w for w in example.words}
        assert words[sample.start, sample.end].needs_image and sample.needs_image
        assert sample.kind == words[sample.start, sample.end].kind
        assert sample.masked_caption.replace("<mask>", sample.answer) == example.caption
        assert used[sample.kind] == min(used[w.kind] for w in example.words if w.needs_image)  # a kind that was behind
        used[sample.kind] += 1
    assert len(used) == 5 and min(used.values()) >= 10, used  # a fifth each would be 24; few captions hold a count


def test_questions_depend_on_the_seed_alone(world):
    source = world.source("new_scenes", 60)
    ids = []
    for seed in (0, 0, 1):
        np.random.seed(len(ids))
        ids.append([s.id for s in held_out_samples(source, 30, mask="_", seed=seed)])
    assert ids[0] == ids[1] != ids[2]


def test_real_pairs_are_asked_a_content_word_each():
    class Real(ColourPairs):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return Example(example.id, "It is there." if index == 2 else example.caption.capitalize())

    samples = held_out_samples(Real(6), 5, mask="<mask>", seed=0)
    assert [s.example_id for s in samples] == [f"colour/{i:03d}" for i in (0, 1, 3, 4, 5)]  # 2 has nothing to ask
    assert not any(s.answer.casefold() in FUNCTION_WORDS for s in samples)
    assert {(s.kind, s.needs_image) for s in samples} == {("", None)}


def test_a_small_source_is_asked_twice_rather_than_less():
    samples = held_out_samples(ColourPairs(4), 7, mask="_", seed=0)
    assert Counter(s.example_id for s in samples).most_common()[0][1] == 2 and len(samples) == 7


def test_a_pair_that_stands_in_for_an_unusable_row_is_asked_once():
    class Gap(ColourPairs):
        def __getitem__(self, index):
            return super().__getitem__(3 if index == 2 else index)

    samples = held_out_samples(Gap(6), 6, mask="_", seed=0)
    assert [s.example_id for s in samples] == [f"colour/{i:03d}" for i in (0, 1, 3, 4, 5)]


# ------------------------------------------------------------------------------------------------ what is shown


def test_conditions_show_the_own_a_grey_and_anothers_image():
    pairs = ColourPairs(8)
    samples = [masked_colour(pairs, i) for i in (0, 1, 1, 1, 5)]
    own = [pairs.image(s.example_id).tobytes() for s in samples]
    assert [i.tobytes() for i in shown_images(samples, pairs, "image")] == own
    grey = Image.new("RGB", (56, 56), (127, 127, 127)).tobytes()
    assert [i.tobytes() for i in shown_images(samples, pairs, "blanked")] == [grey] * 5
    swapped = [i.tobytes() for i in shown_images(samples, pairs, "swapped")]
    assert swapped == [own[1], own[4], own[4], own[4], own[0]]


def test_swapped_never_shows_the_own_image(world):
    source = world.source("new_scenes", 40)
    samples = held_out_samples(source, 40, mask="_", seed=0)
    own, swapped = (list(shown_images(samples, source, condition)) for condition in ("image", "swapped"))
    assert all(a.tobytes() != b.tobytes() for a, b in zip(own, swapped, strict=True))
    assert sorted(i.tobytes() for i in own) == sorted(i.tobytes() for i in swapped)  # each is shown once


def test_one_pair_alone_cannot_be_swapped():
    pairs = ColourPairs(8)
    with pytest.raises(ValueError, match="at least two different pairs"):
        shown_images([masked_colour(pairs, 1)] * 3, pairs, "swapped")


# ------------------------------------------------------------------------------------------------ what is counted


def colour_seen(image):
    """The card's colour, or None of a grey image."""
    pixel = image.getpixel((30, 40))
    return next((name for name, value in COLOURS.items() if value == pixel), None)


def test_accuracies_are_counts_of_exact_answers(policy, small_settings, monkeypatch):
    """An oracle that names the colour it sees: right with the image, wrong without, by chance with another's."""

    def oracle(policy, samples, images, settings):
        return [f"<think> a look</think><answer> {colour_seen(image) or 'nothing'}</answer>" for image in images]

    monkeypatch.setattr("mmrpt.held_out.answer_samples", oracle)
    sets, ticks = {}, []
    for name, indices in (("new_scenes", (0, 1, 2, 3, 7, 5)), ("new_style", (0, 4, 8, 1))):  # 0, 4 and 8 look alike
        pairs = ColourPairs(12, name)
        sets[name] = (pairs, [masked_colour(pairs, i) for i in indices])
    rows, answers = evaluate_policy(policy, "warm", sets, small_settings(), lambda: ticks.append(1))
    assert len(rows) == len(ticks) == 6 and len(answers) == 3 * 10
    found = {(r["set"], r["condition"]): (r["accuracy"], r["count"]) for r in rows}
    assert found == {
        ("new_scenes", "image"): (1.0, 6),
        ("new_scenes", "blanked"): (0.0, 6),
        ("new_scenes", "swapped"): (1 / 6, 6),  # 3 is shown 7, which has its colour
        ("new_style", "image"): (1.0, 4),
        ("new_style", "blanked"): (0.0, 4),
        ("new_style", "swapped"): (0.5, 4),  # 0 is shown 4, and 4 is shown 8
    }
    for row in rows:
        assert row["model"] == "warm"
        assert row["by_kind"] == {"colour": [row["accuracy"], row["count"]]}
        own = [a for a in answers if (a["set"], a["condition"]) == (row["set"], row["condition"])]
        assert sum(a["exact"] for a in own) / len(own) == row["accuracy"]
        assert [a["sample_id"] for a in own] == [s.id for s in sets[row["set"]][1]]
        assert all(a["exact"] == (a["answer"] in a["completion"]) for a in own)


def test_kinds_are_counted_apart(policy, small_settings, world, monkeypatch):
    source = world.source("new_scenes", 40)
    samples = held_out_samples(source, 30, mask="<mask>", seed=0)
    kinds = {s.masked_caption: s.kind for s in samples}

    def knows_colours(policy, asked, images, settings):
        return [
            f"<think></think><answer>{s.answer if kinds[s.masked_caption] == 'colour' else 'no'}</answer>"
            for s in asked
        ]

    monkeypatch.setattr("mmrpt.held_out.answer_samples", knows_colours)
    rows, _ = evaluate_policy(policy, "m", {"new_scenes": (source, samples)}, small_settings())
    counts = Counter(s.kind for s in samples)
    for row in rows:
        assert row["by_kind"] == {k: [float(k == "colour"), counts[k]] for k in sorted(counts)}
        assert row["accuracy"] == pytest.approx(counts["colour"] / 30)


def test_answers_are_greedy_and_in_order_whatever_the_batch(looking_policy, small_settings):
    pairs = ColourPairs(8)
    samples = [masked_colour(pairs, i) for i in (3, 0, 2, 6, 1)]
    images = [pairs.image(s.example_id) for s in samples]
    together = answer_samples(looking_policy, samples, images, small_settings("evaluation.batch_size=5"))
    pieces = answer_samples(looking_policy, samples, images, small_settings("evaluation.batch_size=2"))
    alone = [
        answer_samples(looking_policy, [s], [i], small_settings())[0] for s, i in zip(samples, images, strict=True)
    ]
    assert together == pieces == alone and len(set(together)) > 1
    assert not any("<|im_end|>" in text for text in together)
    assert CONDITIONS == ("image", "blanked", "swapped")  # the report names them


@pytest.mark.parametrize("condition", CONDITIONS)
def test_images_are_decoded_batch_by_batch(looking_policy, small_settings, condition, monkeypatch):
    class Counted(ColourPairs):
        decoded = 0

        def image(self, example_id):
            self.decoded += 1
            return super().image(example_id)

    pairs, seen = Counted(8), []
    samples = [masked_colour(pairs, i) for i in range(5)]
    pixels = looking_policy.pixels

    def count(images):
        seen.append((pairs.decoded, len(images)))
        return pixels(images)

    monkeypatch.setattr(looking_policy, "pixels", count)
    settings = small_settings("evaluation.batch_size=2")
    answer_samples(looking_policy, samples, shown_images(samples, pairs, condition), settings)
    assert seen == [(2, 2), (4, 2), (5, 1)]


def test_sampled_answers_are_of_temperature_one_and_of_their_seed(looking_policy, small_settings):
    """Batches hold as many completions as in greedy decoding, so that memory is bounded by one setting."""
    pairs = ColourPairs(8)
    samples = [masked_colour(pairs, i) for i in range(4)]
    settings = small_settings("evaluation.batch_size=6", "rollout.temperature=0.01", "rollout.top_p=0.01")
    draw = [
        sampled_answers(looking_policy, samples, shown_images(samples, pairs, "image"), settings, count=3, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert draw[0] == draw[1] != draw[2] and [len(texts) for texts in draw[0]] == [3] * 4
    assert all(len(set(texts)) == 3 for texts in draw[0])  # cold or cut draws would agree


def test_avg_of_a_policy_without_doubt_is_its_accuracy(looking_policy, small_settings, monkeypatch):
    monkeypatch.setattr("mmrpt.held_out.is_exact", lambda text, answer: zlib.crc32(f"{text}|{answer}".encode()) % 2)
    pairs = ColourPairs(8)
    sets = {"held_out": (pairs, [masked_colour(pairs, i) for i in range(8)])}
    unsure, _ = evaluate_policy(looking_policy, "m", sets, small_settings(), sampled=3)
    assert any(row["sampled_accuracy"] != row["accuracy"] for row in unsure)
    with torch.no_grad():
        looking_policy.text_model.norm.weight.mul_(1e3)
    rows, answers = evaluate_policy(looking_policy, "m", sets, small_settings(), sampled=3)
    for key in ("accuracy", "by_kind"):
        assert [row[f"sampled_{key}"] for row in rows] == [row[key] for row in rows]
    assert all(answer["sampled"] == [answer["completion"]] * 3 for answer in answers)
    assert all(row["sampled"] == 3 for row in rows) and any(0 < row["accuracy"] < 1 for row in rows)
