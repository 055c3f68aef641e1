"""Rewards: what they pay, what they must never pay."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrpt.rewards import REWARDS, combine_rewards, exact_reward, format_reward, prefix_reward, semantic_reward
from mmrpt.rewards.semantic import similarity
from mmrpt.rewards.text import completion_text, extract_answer, is_well_formed


def said(answer: str, think: str = "a look") -> str:
    return f"<think> {think}</think><answer> {answer}</answer>"


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        (said("red"), True),
        ("  " + said("red") + "\n", True),
        ("<think></think><answer>red</answer>", True),
        (said(""), False),
        (said("  "), False),
        ("<answer> red</answer>", False),
        ("<think> a</think> red", False),
        (said("red") + " and more", False),
        ("so " + said("red"), False),
        (said("red") + said("blue"), False),
        (said("red", think="x <answer> y</answer>"), False),
        (said("red", think="x</think><think> y"), False),
        ("", False),
    ],
)
def test_form(text, well_formed):
    assert is_well_formed(text) is well_formed
    assert format_reward([text]) == [float(well_formed)]
    assert (extract_answer(text) is not None) is well_formed


def test_exact_ignores_case_and_punctuation_and_nothing_else():
    texts = [said("Red."), said("dark red"), said("re"), "red", said("two cats")]
    assert exact_reward(texts, answer=["red", "red", "red", "red", "two  cats"]) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_prefix_is_strict_and_never_pays_guess_lists():
    texts = [said("top"), said("top left"), said("top left red"), said("left"), said("to"), said("a tall")]
    answers = ["top left"] * 5 + ["a tall green tree"]
    assert prefix_reward(texts, answer=answers) == [0.5, 0.0, 0.0, 0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("given_text", "truth", "score"),
    [
        ("red", "red", 1.0),
        ("blue", "red", 0.0),
        ("blue card", "red card", 0.0),
        ("three cats", "two cats", 0.0),
        ("top left", "top right", 0.0),
        ("front left", "back left", 0.0),
        ("left of", "right of", 0.0),
        ("above", "below", 0.0),
        ("the cats", "a cat", 1.0),
        ("gray", "grey", 1.0),
        ("2 dogs", "two dogs", 1.0),
        ("a small red car", "a red car", 0.8),
        ("dog", "cat", 0.0),
        ("red blue green", "red", 0.0),
        ("", "red", 0.0),
        (None, "red", 0.0),
    ],
)
def test_semantic_is_attribute_aware(given_text, truth, score):
    assert similarity(given_text, truth) == pytest.approx(score)


@given(st.text(max_size=30), st.text(max_size=30))
def test_similarity_is_bounded_symmetric_and_whole_for_itself(a, b):
    assert 0.0 <= similarity(a, b) <= 1.0
    assert similarity(a, b) == pytest.approx(similarity(b, a))
    assert similarity(a, a) in (0.0, 1.0)


def test_every_reward_has_trls_signature():
    columns = {"answer": ["red"], "masked_caption": ["a <mask> card"], "trainer_state": None, "completion_ids": [[1]]}
    for name, reward in REWARDS.items():
        kinds = [p.kind for p in inspect.signature(reward).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD in kinds, name
        values = reward(prompts=["p"], completions=[said("red")], **columns)
        assert len(values) == 1 and isinstance(values[0], float), name
        messages = [[{"role": "assistant", "content": said("red")}]]
        assert reward(prompts=["p"], completions=messages, **columns) == values, name
    assert completion_text([{"role": "assistant", "content": "x"}]) == "x"


def test_combination_weighs_and_keeps_terms():
    totals, terms = combine_rewards({"format": 0.5, "exact": 2.0}, [said("red"), "red"], answer=["red", "red"])
    assert totals == [2.5, 0.0] and terms == {"format": [1.0, 0.0], "exact": [1.0, 0.0]}
    with pytest.raises(ValueError, match="unknown reward terms"):
        combine_rewards({"beauty": 1.0}, ["x"], answer=["y"])


def test_a_reward_that_is_no_number_names_its_sample(monkeypatch):
    texts, columns = [said("red"), said("blue"), "no form at all"], {"answer": ["red"] * 3, "id": ["a#0", "a#1", "b#0"]}
    for bad in (float("nan"), float("inf"), None, "1"):
        monkeypatch.setitem(REWARDS, "semantic", lambda completions, bad=bad, **_: [0.5, 1, bad])
        for weights in ({"exact": 1.0, "semantic": 0.2}, {"exact": 1.0, "semantic": 0.0}):
            with pytest.raises(ValueError, match=r"reward term 'semantic' is .* for sample b#0, .*'no form at all'"):
                combine_rewards(weights, texts, **columns)
    with pytest.raises(ValueError, match="for completion 2, which begins"):
        combine_rewards({"semantic": 1.0}, texts, answer=["red"] * 3)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_reward_of_the_wrong_length_names_itself(monkeypatch, count):
    monkeypatch.setitem(REWARDS, "prefix", lambda completions, **_: [0.0] * count)
    with pytest.raises(ValueError, match=f"reward term 'prefix' gave {count} values for 2 completions"):
        combine_rewards({"exact": 1.0, "prefix": 0.1}, [said("red")] * 2, answer=["red"] * 2)


def test_right_answer_always_beats_any_wrong_one_under_the_default_weights():
    weights = {"format": 0.1, "exact": 1.0, "prefix": 0.1, "semantic": 0.2}
    texts = [said("top left"), said("top"), said("top left top left"), said("bottom left"), "top left", ""]
    totals, _ = combine_rewards(weights, texts, answer=["top left"] * len(texts))
    assert totals[0] == max(totals) and sorted(totals)[-2] < totals[0] - 0.5
    assert semantic_reward([said("top left")], answer=["top left"]) == [1.0]
