"""The supervised phase: the stream of items, the rows that it makes of them, and that a model learns from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrpt.captions import caption_batch, restored_response
from mmrpt.corpus import epoch_order, items_at
from mmrpt.masking.build import random_masks
from mmrpt.objective import supervised_loss
from mmrpt.optimiser import Optimiser
from mmrpt.rewards.exact import is_exact
from mmrpt.rewards.text import extract_answer
from mmrpt.settings import OptimiserSettings, PromptSettings
from mmrpt.types import Example, Word
from mmrpt.world.warm_start import lesson_of, sentence_example
from tests.trainer.conftest import ColourPairs, make_policy

PROMPTS = PromptSettings()


@given(st.integers(1, 12), st.integers(0, 40), st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_the_stream_does_not_depend_on_how_it_is_cut(size, first, counts):
    whole = items_at(first, sum(counts), size, 3, "x")
    pieces, at = [], first
    for count in counts:
        pieces += items_at(at, count, size, 3, "x")
        at += count
    assert pieces == whole


@given(st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_visits_every_item_once(size, epoch):
    assert sorted(items_at(epoch * size, size, size, 1, "x")) == list(range(size))
    assert items_at(epoch * size, size, size, 1, "x") == epoch_order(size, 1, "x", epoch).tolist()


def test_orders_differ_between_epochs_seeds_and_phases():
    orders = [items_at(start, 50, 50, seed, phase) for start in (0, 50) for seed in (0, 1) for phase in ("rl", "x")]
    assert len({tuple(o) for o in orders}) == 8
    np.random.seed(7)
    assert items_at(0, 50, 50, 0, "rl") == orders[0]


def rows_of(policy, pairs, items, fraction, seed=0):
    """(user turn, response text, response ids) of each row."""
    batch = caption_batch(policy, pairs, items, PROMPTS, restore_fraction=fraction, seed=seed)
    rows = []
    for ids, mask, attention in zip(batch.input_ids, batch.response_mask, batch.attention_mask, strict=True):
        response = ids[mask].tolist()
        assert response[-1] == policy.eos_token_id and response.count(policy.eos_token_id) == 1
        assert torch.equal(mask.nonzero()[:, 0], torch.arange(int(attention.sum()) - len(response), attention.sum()))
        rows.append((policy.tokenizer.decode(ids[attention.bool() & ~mask]), policy.tokenizer.decode(response[:-1])))
    return batch, rows


def test_rows_describe_or_restore(policy, pairs):
    items = list(range(24))
    _, rows = rows_of(policy, pairs, items, 0.5)
    restored = 0
    for item, (prompt, response) in zip(items, rows, strict=True):
        example = pairs[item]
        if "restore: " not in prompt:
            assert PROMPTS.describe in prompt and response == example.caption
            continue
        restored += 1
        masked = next(m for m in every_mask(example) if m.masked_caption in prompt)
        assert is_exact(response, masked.answer)
    assert 5 <= restored <= 19  # of 24 at one half
    assert not any("restore: " in prompt for prompt, _ in rows_of(policy, pairs, items, 0.0)[1])


def test_every_class_of_words_is_hidden_as_often(policy):
    """Nine of ten content words are names of things; drawn as they come, colours would be 2 of 24 hidden words."""

    class MostlyThings(ColourPairs):
        def __getitem__(self, index):
            caption = "the kite, drum, tent, honey, lion, peach, bell, spoon and lamp lie on a red sheet."
            return Example(f"colour/{index:03d}", caption)

    pairs, items = MostlyThings(), list(range(24))
    for cut in (None, lambda example, rng: example):
        batch = caption_batch(policy, pairs, items, PROMPTS, restore_fraction=0.999, seed=0, cut=cut)
        answers = [
            extract_answer(policy.tokenizer.decode(ids[mask][:-1]))
            for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True)
        ]
        assert answers.count("red") == 12 and len(set(answers)) > 5, answers


def every_mask(example):
    return random_masks(example, 99, mask=PROMPTS.mask, rng=np.random.default_rng(0))


def test_a_sentence_keeps_its_words_and_prefers_to_need_the_image():
    caption = "paper is thin. a red card! it is one of three."
    words = (Word(17, 20, "colour", True), Word(21, 25, "object", False), Word(40, 45, "count", True))
    assert [caption[w.start : w.end] for w in words] == ["red", "card", "three"]
    seen = set()
    for seed in range(20):
        part = sentence_example(Example("e", caption, words), np.random.default_rng(seed))
        seen.add((part.caption, *((part.caption[w.start : w.end], w.kind, w.needs_image) for w in part.words)))
    assert seen == {
        ("a red card!", ("red", "colour", True), ("card", "object", False)),
        ("it is one of three.", ("three", "count", True)),
    }
    unknown = {sentence_example(Example("e", caption), np.random.default_rng(seed)).caption for seed in range(20)}
    assert len(unknown) == 3  # without truth, any sentence


def test_single_sentences_are_rows_of_their_own(policy, pairs):
    batch = caption_batch(policy, pairs, [0, 1], PROMPTS, restore_fraction=0.0, seed=0, cut=sentence_example)
    said = [policy.tokenizer.decode(i[m][:-1]) for i, m in zip(batch.input_ids, batch.response_mask, strict=True)]
    assert said == ["a red card.", "the card is green."]


def test_lessons_go_from_facts_to_captions():
    lessons, again = ([lesson_of(s, steps=2000, fact_steps=500, seed=0) for s in range(2000)] for _ in range(2))
    assert lessons == again
    assert set(lessons[:500]) == {"facts"}
    early, late = lessons[500:800].count("captions") / 300, lessons[1700:].count("captions") / 300
    assert 0.25 < early < 0.5 and 0.65 < late < 0.85  # of a quarter that rises to three quarters
    assert {lesson_of(step, steps=10, fact_steps=0, seed=0) for step in range(10)} == {"captions"}


def test_each_row_shows_the_image_of_its_own_pair(policy, pairs):
    items = [5, 2, 2, 9]
    batch, _ = rows_of(policy, pairs, items, 0.0)
    wanted = policy.pixels([pairs.image(pairs[i].id) for i in items])
    assert torch.equal(batch.pixels.pixel_values, wanted.pixel_values) and batch.image_index.tolist() == [0, 1, 2, 3]


def test_rows_depend_on_the_seed_alone(policy, pairs):
    drawn = []
    for seed in (4, 4, 5):
        torch.manual_seed(len(drawn))
        np.random.seed(len(drawn))
        drawn.append(rows_of(policy, pairs, list(range(12)), 0.5, seed)[1])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_wanted_completion_earns_the_full_reward():
    pairs = ColourPairs()
    for index in range(4):
        for sample in every_mask(pairs[index]):
            text = restored_response(pairs[index].caption, sample)
            assert is_exact(text, sample.answer), text
            thought = text.removeprefix("<think> ").partition("</think>")[0]
            assert sample.answer in thought and thought in pairs[index].caption


def test_a_caption_without_content_words_is_described(policy):
    class Bare(ColourPairs):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return type(example)(example.id, "it is there.")

    _, rows = rows_of(policy, Bare(), [0, 1], 0.999)
    assert [response for _, response in rows] == ["it is there."] * 2


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_loss_falls(kind):
    pairs, policy = ColourPairs(), make_policy(seed=1)
    optimiser = Optimiser(policy.model, OptimiserSettings(kind=kind, lr=5e-3, warmup_steps=2))
    losses = []
    for step in range(40):
        batch = caption_batch(
            policy, pairs, items_at(step * 8, 8, len(pairs), 0), PROMPTS, restore_fraction=0.2, seed=step
        )
        loss = supervised_loss(policy, batch)
        loss.backward()
        losses.append(loss.item())
        assert not optimiser.step(step, 40)["skipped"]
    assert losses[0] > 5 and losses[-1] < 0.4 * losses[0], losses
