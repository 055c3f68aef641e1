"""Masking: scores against eager attention weights; thresholds, spans and masked samples against their laws."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from mmrpt.masking.build import build_masked_samples, random_masks, truth_masks
from mmrpt.masking.forward import PolicyModel, Prompt
from mmrpt.masking.score import CaptionRow, _sentences, layer_indices, score_sentences
from mmrpt.masking.sentences import sentence_spans
from mmrpt.masking.spans import GROWTH, choose_spans
from mmrpt.masking.threshold import choose_threshold
from mmrpt.masking.words import FUNCTION_WORDS, PHRASES, is_content, word_spans
from mmrpt.types import Example, SentenceScore, Word
from tests.trainer.conftest import ColourPairs, forward_inputs, make_policy

# ------------------------------------------------------------------------------------------------ dependency scores


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """The tiny policy, its attention neither uniform nor all on one key, and the same model in eager."""
    policy = make_policy(seed=3)
    with torch.no_grad():
        for name, parameter in policy.text_model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(0.16 / parameter.std())
    folder = tmp_path_factory.mktemp("eager") / "model"
    policy.write_files(folder)
    return policy, AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()


def shares_by_hand(policy, eager_model, example, image, layers, attention_row):
    """V / (V + T) of each caption token, heads and layers averaged, one caption at a time, in float64."""
    pixels = policy.pixels([image])
    prompt = policy.encode_prompt("describe", int(pixels.tokens_per_image(2)))
    encoded = policy.tokenizer(example.caption, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    batch = policy.batch([prompt], [ids], pixels, [0])
    with torch.no_grad():
        out = eager_model.model(**forward_inputs(policy, batch), output_attentions=True)
    visual = (batch.input_ids[0] == policy.image_token_id).double()
    text = torch.zeros_like(visual)
    text[len(prompt) :] = 1
    shares = []
    for position in range(len(prompt), len(prompt) + len(ids)):
        row = position - 1 if attention_row == "before" else position
        per_layer = []
        for layer in layers:
            weights = out.attentions[layer][0, :, row].double().mean(0)  # heads averaged
            v, t = weights @ visual, weights @ text
            per_layer.append(float(v / (v + t)))
        shares.append(sum(per_layer) / len(per_layer))
    return shares, encoded["offset_mapping"]


@pytest.mark.parametrize("attention_row", ["before", "own"])
@pytest.mark.parametrize(("given", "layers"), [((0.0, 1.0), [0, 1]), ((0.5, 1.0), [1]), ([0], [0]), ([-1, 0], [0, 1])])
def test_dependency_equals_eager_attention(eager, attention_row, given, layers):
    policy, model = eager
    pairs = ColourPairs()
    longer = Example("x", "a blue card. Paper is thin. Cards are red, 3.5 times!", ())
    examples = [pairs[0], longer, pairs[1]]  # of unequal length: the batch is padded
    images = [pairs.image(pairs[i].id) for i in (0, 6, 1)]
    scores = score_sentences(
        PolicyModel(policy), examples, images, instruction="describe", layers=given, attention_row=attention_row
    )
    expected = []
    for example, image in zip(examples, images, strict=True):
        shares, offsets = shares_by_hand(policy, model, example, image, layers, attention_row)
        for number, (start, end) in enumerate(sentence_spans(example.caption)):
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and start < b]
            expected.append((example.id, number, start, end, [shares[i] for i in inside]))
    assert [(s.example_id, s.sentence, s.start, s.end) for s in scores] == [e[:4] for e in expected]
    for score, (*_, shares) in zip(scores, expected, strict=True):
        np.testing.assert_allclose(score.token_scores, shares, atol=2e-6)
        assert score.score == pytest.approx(sum(shares) / len(shares), abs=2e-6)
    spread = [m for s in scores for m in s.token_scores]
    assert max(spread) - min(spread) > 0.05  # else uniform attention would pass for anything


def test_sentences_partition_the_captions_tokens_and_know_the_truth(eager):
    policy, _ = eager
    pairs = ColourPairs()
    examples = [pairs[i] for i in range(4)]
    scores = score_sentences(
        PolicyModel(policy), examples, [pairs.image(e.id) for e in examples], instruction="describe"
    )
    for example in examples:
        own = [s for s in scores if s.example_id == example.id]
        tokens = policy.tokenizer(example.caption, add_special_tokens=False, return_offsets_mapping=True)
        assert [span for s in own for span in s.token_spans] == [tuple(o) for o in tokens["offset_mapping"]]
        colour = example.words[0]
        assert [s.needs_image for s in own] == [s.start <= colour.start < s.end for s in own]


def test_scoring_does_not_depend_on_its_batch(eager):
    policy, _ = eager
    pairs = ColourPairs()
    examples = [pairs[i] for i in range(3)]
    images = [pairs.image(e.id) for e in examples]
    together = score_sentences(PolicyModel(policy), examples, images, instruction="describe")
    alone = [
        s
        for example, image in zip(examples, images, strict=True)
        for s in score_sentences(PolicyModel(policy), [example], [image], instruction="describe")
    ]
    assert [s.score for s in together] == pytest.approx([s.score for s in alone], abs=1e-6)


@given(st.integers(1, 80), st.floats(0, 0.99), st.floats(0.01, 1))
def test_a_share_of_the_depth_is_never_empty_and_stays_inside(depth, first, width):
    last = min(1.0, first + width)
    layers = layer_indices((first, last), depth)
    assert layers and layers == list(range(layers[0], layers[-1] + 1))
    assert layers[0] >= 0 and layers[-1] < depth
    assert layers[0] <= first * depth < layers[0] + 1


@pytest.mark.parametrize(
    ("layers", "depth", "indices"),
    [
        ((0.5, 1.0), 5, [2, 3, 4]),
        ((0.5, 0.75), 28, list(range(14, 21))),
        ((0.9, 1), 4, [3]),
        ((0, 1.0), 1, [0]),
        ((0, 1), 4, [0, 1]),  # two integers are two layers
        ((20, 14, -1), 28, [14, 20, 27]),
    ],
)
def test_layers_by_hand(layers, depth, indices):
    assert layer_indices(layers, depth) == indices


@pytest.mark.parametrize("layers", [(), (4,), (-5,), (1, 1), (3, -1), (0.5, 0.5), (0.5, 1.5), (0.5,), (1, 2, 2.5)])
def test_layers_that_the_model_has_not_are_refused(layers):
    with pytest.raises(ValueError, match="layers are .*expected"):
        layer_indices(layers, 4)


def test_a_token_of_two_sentences_counts_once_and_in_the_first():
    offsets = [(0, 1), (1, 8), (8, 12), (12, 13)]  # the second token is " cat! A"
    row = CaptionRow(Example("e", "a cat! A dog."), Prompt([1], None), [1, 2, 3, 4], offsets)
    first, second = _sentences(row, [0.1, 0.2, 0.3, 0.5])
    assert (first.token_scores, second.token_scores) == ((0.1, 0.2), (0.3, 0.5))
    assert (first.score, second.score) == (pytest.approx(0.15), pytest.approx(0.4))


# ------------------------------------------------------------------------------------------------ thresholds

SCORES = st.lists(
    st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, allow_subnormal=False)), min_size=1, max_size=20
)


def between_variance(values, threshold):
    """Otsu's criterion for the classes below and at or above the threshold."""
    low, high = [v for v in values if v < threshold], [v for v in values if v >= threshold]
    if not low or not high:
        return 0.0
    share = len(low) / len(values)
    return share * (1 - share) * (math.fsum(high) / len(high) - math.fsum(low) / len(low)) ** 2


@given(SCORES)
def test_otsu_is_the_best_of_all_cuts(values):
    found = choose_threshold(values, "otsu").value
    best = max(between_variance(values, cut) for cut in set(values))
    assert between_variance(values, found) == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert min(values) <= found <= max(values)


def test_otsu_cuts_between_two_heaps():
    assert choose_threshold([0.9, 0.1, 0.11, 0.88, 0.12, 0.91]).value == pytest.approx((0.12 + 0.88) / 2)
    assert choose_threshold([0.9, 0.1, 0.1, 0.1, 0.1, 0.1]).value == pytest.approx(0.5)  # one is a class of its own


def test_otsu_says_where_there_is_one_class_alone():
    rng = np.random.default_rng(0)
    for share in (0.5, 0.1):
        size = int(4_000 * share)
        two = np.concatenate((rng.normal(0, 1, 4_000 - size), rng.normal(5, 1, size)))
        found = choose_threshold(two)
        assert found.warning is None
        low, high = two[two < found.value], two[two >= found.value]
        within = (low.var() * len(low) + high.var() * len(high)) / len(two)
        assert found.between_share == pytest.approx(1 - within / two.var())
    one = choose_threshold(rng.normal(0.3, 0.1, 4_000))
    assert "one bell-shaped class" in one.warning and one.between_share == pytest.approx(2 / math.pi, abs=0.02)
    assert "equal" in choose_threshold([0.5] * 4).warning


@pytest.mark.parametrize("threshold", ["otsu", "quantile:0.3", "mean_std:1", "caption_std:2"])
def test_equal_scores_all_pass(threshold):
    assert choose_threshold([0.5] * 7, threshold).of_caption([0.5] * 3) == 0.5  # so that `score >= tau` keeps them


@given(SCORES, st.floats(0.05, 0.95))
def test_quantile_leaves_that_share_at_or_above(values, quantile):
    threshold = choose_threshold(values, f"quantile:{quantile}").value
    n = len(values)
    assert sum(v >= threshold for v in values) >= math.floor((1 - quantile) * (n - 1))
    assert sum(v > threshold for v in values) <= math.ceil((1 - quantile) * (n - 1) + 1e-9)


def test_mean_and_deviation_by_hand():
    scores = [1.0, 2.0, 3.0, 6.0]
    assert choose_threshold(scores, "mean_std:2").of_caption([5.0]) == pytest.approx(3 + 2 * math.sqrt(3.5))
    own = choose_threshold(scores, "caption_std:-0.5")
    assert own.value is None
    assert own.of_caption([1.0, 3.0]) == pytest.approx(1.5) and own.of_caption([6.0]) == 6.0


@pytest.mark.parametrize("scores", [[], [0.1, math.nan], [0.1, math.inf]])
def test_scores_that_cannot_be_ranked_are_refused(scores):
    with pytest.raises(ValueError, match=f"{len(scores)} scores.*expected finite"):
        choose_threshold(scores)


@pytest.mark.parametrize("threshold", ["median", "otsu:1", "quantile", "quantile:1", "quantile:x", "mean_std:nan"])
def test_an_unknown_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match=f"threshold is '{threshold}': expected otsu"):
        choose_threshold([0.1], threshold)


# ------------------------------------------------------------------------------------------------ spans


def score_words(caption, masses, sentence=(0, None), score=0.5):
    """A SentenceScore whose tokens are the caption's words, each with the space before it as byte-level BPE has."""
    spans, position = [], 0
    for word in caption.split():
        start = caption.index(word, position)
        spans.append((max(0, start - 1), start + len(word)))
        position = start + len(word)
    start, end = sentence[0], len(caption) if sentence[1] is None else sentence[1]
    inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
    masses = tuple(masses[word] if isinstance(masses, dict) else masses[i] for i, word in enumerate(caption.split()))
    return SentenceScore(
        "e", 0, start, end, score, tuple(spans[i] for i in inside), tuple(masses[i] for i in inside), None
    )


def texts(caption, spans):
    return [caption[s.start : s.end] for s in spans]


WORDS = st.sampled_from(["the", "of", "The", "is", "red", "cat", "card", "left", "top", "three", "well-known", "Zoë's"])


@settings(max_examples=150)
@given(st.data(), st.lists(WORDS, min_size=1, max_size=10), st.integers(1, 5), st.integers(1, 4))
def test_spans_obey_their_laws(data, words, count, max_words):
    caption = " ".join(words) + "."
    masses = data.draw(st.lists(st.sampled_from([0.0, 0.5, 0.55, 0.9]), min_size=len(words), max_size=len(words)))
    score = score_words(caption, masses)
    every = choose_spans(caption, score, count=99, max_words=max_words)
    assert choose_spans(caption, score, count=count, max_words=max_words) == every[:count]
    assert [s.score for s in every] == sorted((s.score for s in every), reverse=True)
    mass_at = {start: m for (start, _), m in zip(word_spans(caption), masses, strict=True)}
    taken = set()
    for span in every:
        inside = [(a, b) for a, b in word_spans(caption) if a >= span.start and b <= span.end]
        assert (span.start, span.end) == (inside[0][0], inside[-1][1])  # whole words
        assert 1 <= len(inside) <= min(max_words, len(words) / 2)
        assert any(is_content(caption[a:b]) and (a, b) not in inside for a, b in word_spans(caption))
        assert not taken & {a for a, _ in inside}, "two spans overlap"
        taken |= {a for a, _ in inside}
        own = [mass_at[a] for a, _ in inside]
        if span.word_class == "other":
            assert not any(caption[a:b].casefold() in FUNCTION_WORDS for a, b in inside)
            assert span.score == pytest.approx(sum(own) / len(own))
            assert min(own) >= GROWTH * max(own) - 1e-12
        else:
            assert caption[span.start : span.end].casefold() in PHRASES[span.word_class]
            assert span.score == own[0]
    content = [caption[a:b] for a, b in word_spans(caption) if is_content(caption[a:b])]
    if len(content) > min(max_words, len(words) // 2) > 0:  # no span can hide all that the sentence says
        left = [caption[a:b].casefold() for a, b in word_spans(caption) if a not in taken]
        assert all(word in FUNCTION_WORDS for word in left) and not {"red", "left", "top", "three"} & set(left)


def test_listed_phrases_are_hidden_whole_and_the_longest_wins():
    caption = "the card at the Top Left is red, left of two cards below."
    spans = choose_spans(caption, score_words(caption, [0.5] * 13), count=99, max_words=2)
    classes = {caption[s.start : s.end]: s.word_class for s in spans if s.word_class != "other"}
    assert classes == {"Top Left": "side", "red": "colour", "left of": "relation", "two": "number", "below": "relation"}
    single = choose_spans(caption, score_words(caption, [0.5] * 13), count=99, max_words=1)
    assert {"Top", "Left", "left"} <= set(texts(caption, single))


def test_a_name_is_hidden_as_a_whole_where_its_masses_are_close():
    caption = "a polar bear lies on ice cream."
    score = score_words(
        caption, {"a": 0.9, "polar": 0.8, "bear": 0.78, "lies": 0.1, "on": 0.1, "ice": 0.5, "cream.": 0.1}
    )
    assert texts(caption, choose_spans(caption, score, count=3, max_words=2)) == ["polar bear", "ice", "lies"]
    assert texts(caption, choose_spans(caption, score, count=3, max_words=1)) == ["polar", "bear", "ice"]


@pytest.mark.parametrize(
    ("caption", "answers"),
    [
        ("red cat", ["red", "cat"]),  # half of the words at most, also of a name
        ("cat", []),
        ("it is red.", []),  # nothing else would say what is asked about
        ("12 34 56 78", []),  # no letters
        ("fox, dog, red fish", ["fish", "fox", "dog", "red"]),  # no span across a comma
        ("一只红色的猫坐在沙发上。", ["一只红色", "沙发上", "猫坐"]),
        ("猫。", []),
    ],
)
def test_what_is_asked_is_asked_about_something(caption, answers):
    spans = word_spans(caption)
    score = SentenceScore("e", 0, 0, len(caption), 0.5, tuple(spans), (0.5,) * len(spans))
    assert sorted(texts(caption, choose_spans(caption, score, max_words=2))) == sorted(answers)


def test_spans_stay_inside_their_sentence():
    caption = "a red card. blue paper."
    score = score_words(caption, [0.1, 0.05, 0.3, 0.95, 0.94], sentence=(0, 11))
    assert texts(caption, choose_spans(caption, score, count=5, max_words=3)) == ["card", "red"]


# ------------------------------------------------------------------------------------------------ masked samples


def two_sentences():
    caption = "the card is red. It shows two cats."
    example = Example(
        "e/1", caption, (Word(12, 15, "colour", True), Word(26, 29, "count", True), Word(4, 8, "object", False))
    )
    masses = {"the": 0.1, "card": 0.3, "is": 0.1, "red.": 0.7, "It": 0.1, "shows": 0.2, "two": 0.9, "cats.": 0.5}
    first = score_words(caption, masses, (0, 16), 0.4)
    second = score_words(caption, masses, (17, 35), 0.6)
    second = SentenceScore("e/1", 1, 17, 35, 0.6, second.token_spans, second.token_scores)
    return example, [first, second]


def check_restores(example, sample, mask="<mask>"):
    assert sample.masked_caption.count(mask) == 1
    assert sample.masked_caption.replace(mask, sample.answer) == example.caption
    assert example.caption[sample.start : sample.end] == sample.answer
    assert sample.masked_caption.index(mask) == sample.start
    assert sample.example_id == example.id


@pytest.mark.parametrize(
    ("threshold", "count", "answers"),
    [
        (0.0, 3, ["two", "red", "cats"]),  # by mass
        (0.4, 2, ["two", "red"]),  # exactly at the threshold passes
        (0.41, 3, ["two", "cats", "shows"]),
        (0.6, 1, ["two"]),
        (0.61, 3, []),
    ],
)
def test_masked_samples_come_from_dependent_sentences_alone(threshold, count, answers):
    example, scores = two_sentences()
    samples = build_masked_samples(example, scores, threshold, mask="<mask>", spans_per_caption=count, max_span_words=1)
    assert [s.answer for s in samples] == answers
    for sample in samples:
        check_restores(example, sample)
        score = scores[sample.sentence]
        assert score.start <= sample.start < sample.end <= score.end and sample.sentence_score == score.score
    assert len({s.id for s in samples}) == len(samples)


def test_masked_samples_carry_the_truth_of_their_words():
    example, scores = two_sentences()
    samples = build_masked_samples(example, scores, 0.0, mask="<mask>", spans_per_caption=9, max_span_words=1)
    truth = {s.answer: (s.kind, s.needs_image) for s in samples}
    assert truth["two"] == ("count", True) and truth["red"] == ("colour", True) and truth["card"] == ("object", False)
    assert truth["cats"] == ("", False)  # the caption's truth is known, and this word is not in it
    unknown = Example(example.id, example.caption)
    for sample in build_masked_samples(unknown, scores, 0.0, mask="_", spans_per_caption=9, max_span_words=1):
        assert (sample.kind, sample.needs_image) == ("", None)


def test_a_span_of_two_words_takes_the_truth_that_needs_the_image():
    caption = "polar bear sits here"
    example = Example("e", caption, (Word(0, 5, "object", True), Word(6, 10, "plain", False)))
    score = score_words(caption, [0.5, 0.5, 0.0, 0.0])
    (sample,) = build_masked_samples(example, [score], 0.0, mask="<mask>", spans_per_caption=1, max_span_words=2)
    assert (sample.answer, sample.kind, sample.needs_image) == ("polar bear", "object", True)


def test_balanced_classes_take_turns_over_captions():
    caption = "the red card is left of the blue one here."
    masses = {
        "the": 0.0,
        "red": 0.9,
        "card": 0.5,
        "is": 0.0,
        "left": 0.1,
        "of": 0.0,
        "blue": 0.8,
        "one": 0.0,
        "here.": 0.0,
    }
    score, example = score_words(caption, masses), Example("e", caption)
    options = {"mask": "<mask>", "spans_per_caption": 2, "max_span_words": 2}
    assert [s.answer for s in build_masked_samples(example, [score], 0.0, **options)] == ["red", "blue"]
    used = Counter()
    asked = [[s.answer for s in build_masked_samples(example, [score], 0.0, **options, used=used)] for _ in range(3)]
    assert asked == [["red", "card"], ["left of", "one"], ["red", "card"]]
    assert used == {"colour": 2, "other": 2, "relation": 1, "number": 1}


def test_random_masks_hide_different_content_words_and_depend_on_the_draw_alone():
    example = Example("e", 'The big (red) card, said "Anna", is not at the top; it is here!')
    content = {"big", "red", "card", "said", "Anna", "top"}
    every = random_masks(example, 99, mask="<mask>", rng=np.random.default_rng(0))
    assert {s.answer for s in every} == content and len(every) == len(content)
    for sample in every:
        check_restores(example, sample)
    phrases = Example("e", "at the top left the card lies left of two others.")
    hidden = {s.answer for k in range(9) for s in random_masks(phrases, 99, mask="_", rng=np.random.default_rng(k))}
    assert {"top left", "left of", "two", "card", "card lies"} <= hidden and not {"left", "top"} & hidden
    draws = [[s.id for s in random_masks(example, 2, mask="_", rng=np.random.default_rng(k))] for k in (1, 1, 2, 3, 4)]
    assert draws[0] == draws[1] and len({tuple(d) for d in draws}) > 1
    assert random_masks(Example("e", "it is the"), 1, mask="_", rng=np.random.default_rng(0)) == []


def test_truth_masks_ask_exactly_the_words_that_need_the_image():
    example, _ = two_sentences()
    samples = truth_masks(example, mask="<mask>")
    assert [(s.answer, s.kind) for s in samples] == [("red", "colour"), ("two", "count")]
    for sample in samples:
        check_restores(example, sample)
        assert sample.needs_image is True
