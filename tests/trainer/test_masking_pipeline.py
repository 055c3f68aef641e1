"""Masking of a corpus: shards, batches, resumption, bad rows; the same bytes however it was cut up."""

from __future__ import annotations

import gc
import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmrpt.corpus import BadRow, RejectedRows, read_jsonl
from mmrpt.masking import shards as shards_module
from mmrpt.masking.build import truth_masks
from mmrpt.masking.forward import PolicyModel, Prompt
from mmrpt.masking.pipeline import read_ahead, score_corpus, token_batches
from mmrpt.masking.score import score_sentences
from mmrpt.masking.select import MASKED, REJECTED, SCORES, SUMMARY, rank_correlation, select_masks
from mmrpt.masking.sentences import sentence_spans
from mmrpt.masking.shards import Shards
from mmrpt.masking.words import word_spans
from mmrpt.perturbation import blank
from mmrpt.settings import WorldConfig
from mmrpt.types import Example
from mmrpt.world import World
from tests.trainer.conftest import ColourPairs, make_looking_policy


class Pairs(ColourPairs):
    """Rows of very different lengths, some of which cannot be used."""

    BAD = {
        3: ("the <mask> card is red.", "reserved_text"),
        5: ("the <answer> card</answer>.", "reserved_text"),
        6: ("", "empty_caption"),
        8: ("a picture that is no picture.", "image"),
        11: ("a row that its reader refuses.", "caption"),
        13: ("the end<|im_end|> of a turn.", "reserved_text"),
    }

    def __getitem__(self, index):
        example = super().__getitem__(index)
        if index == 11:
            raise BadRow("rows.jsonl:12", "caption", "no caption. Write one.")
        caption = self.BAD.get(index, (None,))[0]
        if index == 9:
            caption = "12 34. 56 78."
        if caption is not None:
            return Example(example.id, caption)
        if index % 5 == 0:
            return Example(example.id, f"{example.caption} two dogs sit on the big green table near a lamp." * 4)
        return example

    def image(self, example_id):
        if example_id.endswith("/008"):
            raise BadRow("rows.jsonl:9", "image", "image file is truncated")
        return super().image(example_id)


@pytest.fixture(scope="module")
def model():
    return PolicyModel(make_looking_policy())


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_ROWS", 7)


def mask(folder, model, settings, source=None, parts=1, rejected=None):
    source = source or Pairs()
    shards = Shards(folder / "scores", len(source))
    for part in range(parts):
        score_corpus(model, source, shards, settings, part, parts)
    return select_masks(model, source, shards, settings, folder, rejected)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.json*"))}


def test_the_same_bytes_for_one_process_and_for_three(tmp_path, model, small_settings, small_shards):
    settings = small_settings("masking.drop_repeated=false")
    mask(tmp_path / "one", model, settings)
    mask(tmp_path / "three", model, small_settings("masking.drop_repeated=false", "data.workers=0"), parts=3)
    one, three = files_of(tmp_path / "one"), files_of(tmp_path / "three")
    assert len([name for name in one if name.startswith("scores/")]) == 4  # 24 rows in sevens
    assert one == three and {SCORES, MASKED, REJECTED, SUMMARY} < set(one)


def test_each_part_scores_its_own_shards(tmp_path, model, small_settings, small_shards):
    source, settings = Pairs(), small_settings()
    shards = Shards(tmp_path / "scores", len(source))
    score_corpus(model, source, shards, settings, 1, 3)
    assert [path.name for path in sorted(shards.folder.iterdir())] == ["00001.jsonl"]
    assert shards.missing() == [0, 2, 3] and shards.missing(0, 3) == [0, 3]


def test_a_run_that_was_cut_off_ends_the_same(tmp_path, model, small_settings, small_shards):
    settings = small_settings()
    mask(tmp_path / "whole", model, settings)

    class Cut(Pairs):
        def image(self, example_id):
            if example_id.endswith("/016"):
                raise KeyboardInterrupt
            return super().image(example_id)

    with pytest.raises(KeyboardInterrupt):
        mask(tmp_path / "cut", model, settings, Cut())
    assert sorted(path.name for path in (tmp_path / "cut" / "scores").iterdir()) == ["00000.jsonl", "00001.jsonl"]

    asked = []

    class Rest(Pairs):
        def image(self, example_id):
            asked.append(example_id)
            return super().image(example_id)

    mask(tmp_path / "cut", model, settings, Rest())
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert all(int(name[-3:]) >= 14 for name in asked)  # what was scored is not scored again


def test_every_bad_row_is_named_and_passed_over(tmp_path, model, small_settings):
    summary = mask(tmp_path, model, small_settings())
    rows = read_jsonl(tmp_path / REJECTED)
    assert [row["kind"] for row in rows] == [kind for _, kind in Pairs.BAD.values()]
    assert [row["where"] for row in rows] == ["row 3", "row 5", "row 6", "rows.jsonl:9", "rows.jsonl:12", "row 13"]
    assert "truncated" in rows[3]["message"] and rows[3]["id"] == "colour/008" and "<|im_end|>" in rows[5]["message"]
    assert summary["captions"] == 24 - 6 and sum(summary["rejected"].values()) == 6
    ids = {row["example_id"] for row in read_jsonl(tmp_path / SCORES)}
    assert len(ids) == 18 and not ids & {row["id"] for row in rows}


def test_a_row_that_masking_named_is_not_named_again_by_the_runs_other_readers(tmp_path, model, small_settings):
    rejected = RejectedRows(tmp_path / REJECTED, 1.0)  # opened at the start, as training does
    mask(tmp_path, model, small_settings(), rejected=rejected)
    before = (tmp_path / REJECTED).read_bytes()
    for row in read_jsonl(tmp_path / REJECTED):
        rejected.write(BadRow(row["where"], row["kind"], "met again in training"), row["id"])
    assert (tmp_path / REJECTED).read_bytes() == before


def test_too_many_bad_rows_end_the_run_with_the_last_one_named(tmp_path, model, small_settings, small_shards):
    class Broken(ColourPairs):
        def image(self, example_id):
            raise BadRow(f"row {int(example_id[-3:])}", "image", "no such file")

    with pytest.raises(ValueError, match=r"14 of 14 rows cannot be used.*data.max_rejected=0.05.*row 13: no such file"):
        mask(tmp_path, model, small_settings(), Broken())
    assert mask(tmp_path / "other", model, small_settings("data.max_rejected=1"))["samples"]


def test_scores_do_not_depend_on_the_batches(tmp_path, model, small_settings):
    source = Pairs()
    for name, tokens in (("wide", 100_000), ("narrow", 1)):
        mask(tmp_path / name, model, small_settings(f"masking.batch_tokens={tokens}", "masking.baseline=none"))
    wide, narrow = (read_jsonl(tmp_path / name / SCORES) for name in ("wide", "narrow"))
    keys = ("example_id", "sentence", "start", "end", "text", "token_spans")
    assert [[row[k] for k in keys] for row in wide] == [[row[k] for k in keys] for row in narrow]
    np.testing.assert_allclose([r["score"] for r in wide], [r["score"] for r in narrow], atol=1e-6)
    alone = score_sentences(model, [source[10]], [source.image(source[10].id)], instruction="describe")
    own = [row for row in wide if row["example_id"] == source[10].id]
    assert [row["score"] for row in own] == pytest.approx([s.score for s in alone], abs=1e-6)


def test_rows_without_letters_move_neither_baseline_nor_threshold(tmp_path, model, small_settings):
    settings = small_settings("masking.threshold=otsu")
    summary = mask(tmp_path / "with", model, settings)
    assert summary["without_letters"] == 2

    class Without(Pairs):
        def __getitem__(self, index):
            if index == 9:
                raise BadRow("row 9", "numbers", "no letters")
            return super().__getitem__(index)

    other = mask(tmp_path / "without", model, settings, Without())
    # Other rows share their forward passes: scores, sums of some 100 float32 masses of at most 1, may round otherwise.
    assert summary["threshold"] == pytest.approx(other["threshold"], rel=0, abs=100 * float(np.finfo(np.float32).eps))
    assert summary["samples"] == other["samples"]
    assert not any(row["example_id"] == "colour/009" for row in read_jsonl(tmp_path / "with" / MASKED))
    assert summary["sentences"] == other["sentences"] + 2


def test_the_threshold_of_each_caption_selects_sentences_of_each(tmp_path, model, small_settings):
    options = ("masking.threshold=caption_std:0", "masking.baseline=none", "masking.drop_repeated=false")
    summary = mask(tmp_path, model, small_settings(*options))
    assert summary["threshold"] is None and summary["method"] == "caption_std:0"
    scores: dict[str, list[dict]] = {}
    for row in read_jsonl(tmp_path / SCORES):
        scores.setdefault(row["example_id"], []).append(row)
    passed = {
        (name, row["sentence"])
        for name, rows in scores.items()
        for row in rows
        if row["score"] >= np.mean([r["score"] for r in rows])
    }
    hidden = {(row["example_id"], row["sentence"]) for row in read_jsonl(tmp_path / MASKED)}
    assert hidden and hidden <= passed and summary["dependent"] >= len(hidden)


def test_kl_is_the_divergence_between_seeing_and_not_seeing(tmp_path, model, small_settings):
    shares = {(r["example_id"], r["sentence"]): r["score"] for r in scored(tmp_path, model, small_settings, "mass")}
    rows = scored(tmp_path, model, small_settings, "kl")
    source, policy = Pairs(), model.policy
    example = source[1]
    ids = policy.encode_text(example.caption)
    views = []
    for image in (source.image(example.id), blank(source.image(example.id))):
        prompt = model.prompt("describe", image)
        with torch.no_grad():
            hidden, _ = model.forward([prompt], [ids])
        states = hidden[0, len(prompt.ids) - 1 : len(prompt.ids) - 1 + len(ids)].double()
        views.append((states @ policy.head_weight.detach().double().T).log_softmax(-1))
    kl = (views[0].exp() * (views[0] - views[1])).sum(-1)
    own = [row for row in rows if row["example_id"] == example.id]
    _, offsets = model.encode(example.caption)
    for row, (start, end) in zip(own, sentence_spans(example.caption), strict=True):
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and start < b]
        assert row["token_scores"] == pytest.approx(kl[inside].tolist(), rel=1e-3)
        assert row["score"] == pytest.approx(float(kl[inside].mean()), rel=1e-3)
    assert all(row["mass"] == shares[row["example_id"], row["sentence"]] for row in rows)
    lettered = [row for row in rows if row["example_id"] != "colour/009"]
    ranks = [np.argsort(np.argsort([row[name] for row in lettered])) for name in ("score", "mass")]
    summary = json.loads((tmp_path / "kl" / SUMMARY).read_text())
    assert summary["mass_rank_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=0.05)


ALL_SPANS = (
    "masking.baseline=none",
    "masking.threshold=mean_std:-9",
    "masking.balance_word_classes=false",
    "masking.drop_repeated=false",
    "masking.max_span_words=1",  # what a span grows over depends on which of its words begins it
)


def scored(tmp_path, model, small_settings, signal, *options, rows=SCORES, source=None):
    """scores.jsonl, or another file of rows, of one signal without a baseline."""
    mask(
        tmp_path / signal, model, small_settings(f"masking.signal={signal}", "masking.baseline=none", *options), source
    )
    return read_jsonl(tmp_path / signal / rows)


def test_the_texts_mass_chooses_last_what_mass_chooses_first(tmp_path, model, small_settings):
    chosen = {}
    for signal in ("mass", "text_mass"):
        rows = scored(tmp_path, model, small_settings, signal, *ALL_SPANS, "masking.spans_per_caption=99", rows=MASKED)
        for row in rows:
            chosen.setdefault(row["example_id"], {}).setdefault(signal, []).append(row)
    assert len(chosen) == 17 and max(len(of["mass"]) for of in chosen.values()) > 20
    for of in chosen.values():
        shares = {row["id"]: row["span_score"] for row in of["mass"]}
        assert len(shares) > 1 and shares.keys() == {row["id"] for row in of["text_mass"]}
        order = [shares[row["id"]] for row in of["text_mass"]]
        assert order == sorted(order)
        assert [row["span_score"] for row in of["text_mass"]] == [1 - share for share in order]


def test_sentences_that_depend_on_the_text_are_those_that_do_not_depend_on_the_image(tmp_path, model, small_settings):
    passed = []
    for signal in ("mass", "text_mass"):
        rows = scored(tmp_path, model, small_settings, signal, "masking.threshold=otsu", "masking.drop_repeated=false")
        tau = json.loads((tmp_path / signal / SUMMARY).read_text())["threshold"]
        passed.append({(row["example_id"], row["sentence"]) for row in rows if row["score"] >= tau})
    assert passed[0] and passed[1] and not passed[0] & passed[1] and len(passed[0] | passed[1]) == len(rows)


@pytest.mark.parametrize("balance", [True, False])
def test_truth_hides_every_word_that_needs_the_image_and_no_other(tmp_path, model, small_settings, balance):
    source = World(WorldConfig()).source("train", 20)
    options = (
        "masking.spans_per_caption=99",
        "masking.drop_repeated=false",
        "masking.baseline=position",
        "masking.threshold=otsu",
    )
    options += (f"masking.balance_word_classes={balance}",)
    hidden = scored(tmp_path, model, small_settings, "truth", *options, rows=MASKED, source=source)
    wanted = {sample.id for i in range(20) for sample in truth_masks(source[i], mask="<mask>")}
    assert len(wanted) > 40 and {row["id"] for row in hidden} == wanted
    rows = read_jsonl(tmp_path / "truth" / SCORES)
    assert all(row["score"] == float(row["needs_image"]) for row in rows)
    assert json.loads((tmp_path / "truth" / SUMMARY).read_text())["samples_needing_image"] == 1.0
    by_mass = scored(tmp_path, model, small_settings, "mass", *options, rows=MASKED, source=source)
    assert any(not row["needs_image"] for row in by_mass)  # which the assertions above would refuse


def test_answers_of_a_blinded_model_are_dropped_and_counted(tmp_path, model, small_settings):
    every = mask(tmp_path / "all", model, small_settings("masking.max_blind=1.0"))
    assert every["dropped"]["blind"] == 0
    with pytest.raises(ValueError, match="none of .* sentences .* gives a masked sample"):
        mask(tmp_path / "none", model, small_settings("masking.max_blind=0.0"))
    kept = [(row["id"], row) for row in read_jsonl(tmp_path / "all" / MASKED)]
    some = mask(tmp_path / "some", model, small_settings("masking.max_blind=0.002"))
    left = {row["id"] for row in read_jsonl(tmp_path / "some" / MASKED)}
    assert 0 < len(left) < len(kept) and left < {name for name, _ in kept}
    assert some["dropped"]["blind"] == len(kept) - len(left)


def test_a_damaged_shard_is_named(tmp_path, model, small_settings, small_shards):
    source, settings = Pairs(), small_settings()
    shards = Shards(tmp_path / "scores", len(source))
    score_corpus(model, source, shards, settings)
    lines = shards.path(2).read_text().splitlines(keepends=True)
    shards.path(2).write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"00002.jsonl holds 6 rows, expected 7"):
        select_masks(model, source, shards, settings, tmp_path)
    assert not (tmp_path / SUMMARY).exists()


def test_what_is_finished_is_not_done_again(tmp_path, model, small_settings):
    summary = mask(tmp_path, model, small_settings())
    before = files_of(tmp_path)
    assert select_masks(None, None, None, small_settings(), tmp_path) == json.loads(json.dumps(summary))
    assert files_of(tmp_path) == before


class WordModel:
    """A model in name alone: a token a word, and attention that depends on the word."""

    depth, markers, head_weight, head_bias = 2, (), None, None

    def prompt(self, instruction, image):
        return Prompt([0, 0], None)

    def encode(self, text):
        spans = word_spans(text)
        return [len(text[a:b]) for a, b in spans], spans

    def forward(self, prompts, responses, layers=None):
        width = max(len(p.ids) + len(r) for p, r in zip(prompts, responses, strict=True))
        masses = torch.zeros(len(layers), len(prompts), width, 2)
        for i, ids in enumerate(responses):
            masses[:, i, 1 : 1 + len(ids), 0] = torch.tensor(ids) / 10
            masses[:, i, 1 : 1 + len(ids), 1] = 1.0
        return torch.zeros(len(prompts), width, 1), masses


def test_a_row_whose_scores_are_not_finite_is_named_and_spoils_no_other(tmp_path, small_settings):
    class Broken(WordModel):
        def forward(self, prompts, responses, layers=None):
            hidden, masses = super().forward(prompts, responses, layers)
            for i, ids in enumerate(responses):
                if len(ids) == 4:
                    masses[:, i] = float("nan")
            return hidden, masses

    class Rows(ColourPairs):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return Example(example.id, "not a number here." if index == 8 else example.caption)

    summary = mask(tmp_path, Broken(), small_settings(), Rows())
    (row,) = read_jsonl(tmp_path / REJECTED)
    assert (row["where"], row["kind"], row["id"]) == ("row 8", "not_finite", "colour/008")
    assert summary["captions"] == 23 and np.isfinite(summary["threshold"])


def test_memory_does_not_grow_with_the_corpus(tmp_path, small_settings, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_ROWS", 25)
    monkeypatch.setattr("mmrpt.masking.pipeline.AHEAD_ROWS", 8)
    caption = "{} cats sit on a big red sofa. a dog that is {} days old sleeps near the window. it rains outside."
    image = Image.new("RGB", (2, 2))

    class Many(ColourPairs):
        def __getitem__(self, index):
            return Example(f"many/{index}", caption.format(index, index % 7))

        def image(self, example_id):
            return image

    def peak(rows):
        tracemalloc.start()
        summary = mask(tmp_path / str(rows), WordModel(), small_settings("masking.batch_tokens=2000"), Many(rows))
        assert summary["captions"] == rows and summary["samples"] == 2 * rows
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    gc.disable()  # a full collection empties the interpreter's free lists, and filling them would count as growth
    try:
        mask(tmp_path / "first", WordModel(), small_settings(), Many(300))
        few, many = peak(100), peak(400)
    finally:
        gc.enable()
    # Three sentences a row: a float each, and what the threshold sorts and sums. Their scores would take 2,000 bytes.
    assert many - few < 3 * 300 * 150


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        widest = max(lengths[i] for i in batch)
        assert widest * len(batch) <= budget or len(batch) == 1
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths == sorted(widths)


def test_reading_ahead_keeps_the_order_and_a_bounded_number_in_flight():
    started = []
    with ThreadPoolExecutor(4) as pool:
        found = read_ahead(pool, lambda i: started.append(i) or i * i, range(1_000))
        assert [next(found) for _ in range(10)] == [i * i for i in range(10)]
        assert len(started) <= 10 + 64
        assert list(found) == [i * i for i in range(10, 1_000)]


def test_rank_correlation_by_hand():
    a = np.array([1.0, 2.0, 2.0, 3.0])
    assert rank_correlation(a, 2 * a) == pytest.approx(1.0) and rank_correlation(a, -a) == pytest.approx(-1.0)
    assert rank_correlation(a, np.array([3.0, 1.0, 2.0, 4.0])) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [3, 1, 2, 4])[0, 1]
    )
    assert rank_correlation(a, np.ones(4)) is None and rank_correlation(a[:1], a[:1]) is None
