"""The leak filter: answers that stand elsewhere, and answers that a blinded model gives anyway."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mmrpt.masking.build import build_masked_samples
from mmrpt.masking.forward import PolicyModel
from mmrpt.masking.leaks import answer_probabilities, is_repeated
from mmrpt.masking.words import word_spans
from mmrpt.perturbation import blank
from mmrpt.rollout.prompts import begun_thought, restore_text
from mmrpt.settings import PromptSettings
from mmrpt.types import Example, SentenceScore
from tests.trainer.conftest import ColourPairs, make_looking_policy, masked_colour, response_logits


@pytest.mark.parametrize(
    ("caption", "answer", "repeated"),
    [
        ("A red car. The RED bus.", "red", True),
        ("A red car. It is redder.", "red", False),  # another word
        ("left of it, the card left", "left of", False),  # one of the words alone
        ("Left  of it; card left of me", "Left  of", True),
        ("the red card, red", "red card", False),
        ("cat and cat's toy", "cat", False),
        ("红色的猫坐在大红色沙发上", "红色", True),  # wherever words are cut
        ("红色的猫坐在蓝色沙发上", "红色", False),
        ("... a b", "...", False),
    ],
)
def test_an_answer_is_repeated_where_its_words_stand_elsewhere(caption, answer, repeated):
    start = caption.index(answer)
    assert is_repeated(caption, start, start + len(answer)) is repeated


def test_repeated_answers_are_passed_over_and_counted():
    caption = "a red card lies beside one red fox here"
    spans = word_spans(caption)
    masses = tuple(0.9 if w == "red" else 0.5 if w == "fox" else 0.1 for w in caption.split())
    score = SentenceScore("e", 0, 0, len(caption), 0.5, tuple(spans), masses)
    options = {"mask": "_", "spans_per_caption": 1, "max_span_words": 1}
    dropped, used = Counter(), Counter()
    kept = build_masked_samples(Example("e", caption), [score], 0.0, **options, dropped=Counter(), used=used)
    assert [s.answer for s in kept] == ["fox"] and used == {"other": 1}
    (kept,) = build_masked_samples(Example("e", caption), [score], 0.0, **options, dropped=dropped)
    assert kept.answer == "fox" and dropped == {"repeated": 2}  # both "red"
    assert [s.answer for s in build_masked_samples(Example("e", caption), [score], 0.0, **options)] == ["red"]


def test_the_probability_of_an_answer_is_that_of_its_tokens_after_prompt_and_thought():
    policy, pairs, prompts = make_looking_policy(), ColourPairs(), PromptSettings()
    model = PolicyModel(policy)
    model_prompts, samples, thoughts = [], [], []
    for index in (0, 1, 3):
        sample = masked_colour(pairs, index)
        samples.append(sample)
        thoughts.append(begun_thought(pairs[index].caption, sample))
        model_prompts.append(model.prompt(restore_text(sample, prompts), blank(pairs.image(sample.example_id))))
    assert thoughts == ["<think> a", "<think> the card is", "<think> the card is"]
    found = answer_probabilities(model, samples, model_prompts, thoughts)
    policy.suppressed_ids = []  # the teacher-forced answer is read with every word allowed
    for sample, prompt, thought, probability in zip(samples, model_prompts, thoughts, found, strict=True):
        ids = policy.encode_text(f"{thought} {sample.answer}")
        before = len(policy.encode_text(thought))
        assert policy.tokenizer.decode(ids[before:]).strip() == sample.answer
        pixels = policy.pixels([blank(pairs.image(sample.example_id))])
        batch = policy.batch([prompt.ids], [ids], pixels, [0])
        with torch.no_grad():
            (logits,) = response_logits(policy, batch)
        logps = logits.log_softmax(-1)[range(before, len(ids)), ids[before:]]
        assert probability == pytest.approx(float(logps.sum().exp()), rel=1e-4)
    assert len(set(found)) == 3
