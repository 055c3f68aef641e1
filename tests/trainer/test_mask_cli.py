"""`python -m mmrpt.mask`: from a file of pairs and a model folder to masked samples, by one process or several."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from mmrpt.corpus import open_corpus, read_jsonl, write_jsonl
from mmrpt.mask import main
from mmrpt.masking import shards
from mmrpt.masking.card import write_card
from mmrpt.settings import load_settings
from mmrpt.types import MaskedSample
from tests.trainer.conftest import SMALL_RUN, ColourPairs, make_looking_policy

RESULTS = ("masked.jsonl", "scores.jsonl", "rejected.jsonl", "masking.json", "card.md", "card.html")
OPTIONS = ("threads=1", "masking.threshold=mean_std:-9", "data.max_rejected=0.5")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(a file of 24 pairs, three of them bad; a model folder)."""
    folder = tmp_path_factory.mktemp("corpus")
    pairs, rows = ColourPairs(), []
    for i in range(len(pairs)):
        pairs.image(pairs[i].id).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": pairs[i].caption})
    rows[4]["caption"] = "a <mask> card."
    rows[9]["caption"] = "the answer is <answer>red</answer>."
    rows[15]["caption"] = "cards end<|im_end|> here."
    write_jsonl(folder / "rows.jsonl", rows)
    make_looking_policy().write_files(folder / "model")
    return folder / "rows.jsonl", folder / "model"


@pytest.fixture
def mask(corpus, tmp_path, monkeypatch):
    """Runs the command line on the corpus in `tmp_path`."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 7)
    pairs, model = corpus

    def run(*arguments):
        return main([f"data.pairs={pairs}", f"model.path={model}", f"output={tmp_path}", *OPTIONS, *arguments])

    return run


@pytest.mark.parametrize("drawn", [True, False])
def test_without_a_model_the_tiny_one_shows_that_all_works(corpus, tmp_path, capsys, drawn):
    pairs = [] if drawn else [f"data.pairs={corpus[0]}", "data.max_rejected=0.5"]
    small = [item for item in SMALL_RUN if not item.startswith("masking.captions")]
    assert main([*pairs, *small, f"output={tmp_path}", "name=it", "masking.captions=12"]) == 0
    assert "scores untrained" in capsys.readouterr().out
    summary = json.loads((tmp_path / "it" / "masking.json").read_text())
    assert summary["captions"] + sum(summary["rejected"].values()) == 12 and summary["samples"] > 0
    assert len(read_jsonl(tmp_path / "it" / "rejected.jsonl")) == (0 if drawn else 2)


def results(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


def test_one_command_leaves_masks_scores_rejected_rows_and_a_card(mask, tmp_path, capsys):
    assert mask("name=it") == 0
    folder = tmp_path / "it"
    written = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert written == sorted((*RESULTS, "config.yaml", "corpus.json"))
    rejected = read_jsonl(folder / "rejected.jsonl")
    assert [row["kind"] for row in rejected] == ["reserved_text"] * 3
    summary = json.loads((folder / "masking.json").read_text())
    assert summary["captions"] == 21 and summary["rejected"] == {"reserved_text": 3}
    samples = [MaskedSample(**row) for row in read_jsonl(folder / "masked.jsonl")]
    assert len(samples) == summary["samples"] > 20 and len({s.example_id for s in samples}) == 21
    assert f"{len(samples)} masked samples of 21 captions (3 rows rejected)" in capsys.readouterr().out


def test_processes_share_a_run_and_the_last_one_finishes_it(mask, tmp_path, capsys, monkeypatch):
    assert mask("name=card") == 0
    mask("--shard", "0/3", "name=card2")
    assert "2 of 4 shards are not" in capsys.readouterr().out and not (tmp_path / "card2" / "masked.jsonl").exists()
    monkeypatch.setenv("RANK", "2")  # as torchrun tells
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert mask("name=card2") == 0
    monkeypatch.setenv("RANK", "1")
    assert mask("name=card2") == 0
    one, three = results(tmp_path / "card"), results(tmp_path / "card2")
    for name in ("card.md", "card.html"):
        three[name] = three[name].replace(b"Masked captions: card2", b"Masked captions: card")
    assert one == three
    assert mask("name=card2") == 0  # a process that comes too late finds all done


def test_a_run_without_shard_finishes_what_processes_left(mask, tmp_path):
    assert mask("--shard", "1/3", "name=left") == 0
    assert mask("--resume", "name=left") == 0
    assert mask("name=whole") == 0
    for name in RESULTS[:4]:
        assert (tmp_path / "left" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "3/3", "name=a"], "--shard is '3/3': expected i/n with 0 <= i < n"),
        (["--shard", "one", "name=a"], "--shard is 'one': expected i/n"),
        (["--shard", "0/2"], "add name="),
        (["masking.threshold=median"], "median"),
        (["model.path=/no/such/folder"], "there is no such folder"),
        (["model.path=./model"], "there is no such folder"),
        (["data.pairs=/no/such/file"], "no such file"),
        (["masking.layers=[7]"], "layers are [7]: expected"),
        (["masking.max_blind=0.0"], "none of"),
    ],
)
def test_what_cannot_work_is_one_message(mask, tmp_path, capsys, arguments, message):
    assert mask(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") or "\nerror: " in error
    assert message in error and "Traceback" not in error


def test_a_command_that_failed_at_once_leaves_its_name_free(mask, tmp_path):
    assert mask("name=it", "model.path=/no/such/folder") == 2
    assert not (tmp_path / "it").exists()
    assert mask("name=it") == 0


def test_processes_must_be_given_the_same_settings(mask, capsys):
    assert mask("--shard", "0/3", "name=it") == 0
    assert mask("--shard", "1/3", "name=it", "masking.layers=[0]") == 2
    assert "masking.layers" in capsys.readouterr().err


def test_the_card_is_one_page_with_counts_histogram_and_pictures(mask, tmp_path):
    assert mask("name=it", "masking.threshold=otsu") == 0
    folder = tmp_path / "it"
    summary = json.loads((folder / "masking.json").read_text())
    page, text = (folder / "card.html").read_text(), (folder / "card.md").read_text()
    assert page.count("data:image/jpeg;base64,") == page.count('<div class="example">') == 12
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "<script" not in page
    bars = re.findall(r"<title>(\d+) from", page)
    assert sum(map(int, bars)) == summary["sentences"] and page.count("<line") == 1
    for written in (page, text):
        assert f"{summary['samples']:,}" in written and "rows rejected: reserved_text" in written
        assert f"{summary['threshold']:.4f}" in written
    assert "&lt;mask>" in text and "<mark>" in page


def test_a_card_escapes_what_captions_hold(tmp_path):
    class Pairs(ColourPairs):
        def image(self, example_id):
            return super().image("colour/001")

    caption, settings = "a <b>| & <script>x</script> card", load_settings(None, [f"output={tmp_path}", "name=it"])
    folder = settings.run_dir
    folder.mkdir()
    sample = MaskedSample("e#0", "e", caption.replace("card", "<mask>"), "card", 28, 32, 0, 0.5, 0.5)
    write_jsonl(folder / "masked.jsonl", [sample.to_json()])
    counts = dict.fromkeys(("captions", "sentences", "without_letters", "dependent", "samples"), 1)
    summary = {
        **counts,
        "threshold": None,
        "warning": "look",
        "between_class_share": 0.5,
        "mass_rank_correlation": None,
    }
    summary |= {
        "rejected": {},
        "dropped": {"repeated": 0, "blind": 0},
        "histogram": {"edges": [0.5, 0.6], "counts": [1]},
    }
    (folder / "masking.json").write_text(json.dumps(summary))
    page = write_card(folder, Pairs(), settings).read_text()
    assert (
        "&lt;b&gt;| &amp; &lt;script&gt;" in page and "<script>" not in page and '<p class="warning">look</p>' in page
    )
    row = next(line for line in (folder / "card.md").read_text().splitlines() if "script" in line)
    assert row.count("|") - row.count("\\|") == 4


def test_parquet_is_read_by_datasets_with_pictures_and_the_forms_of_trl_and_verl(mask, corpus, tmp_path):
    datasets = pytest.importorskip("datasets")
    assert mask("--parquet", "name=it") == 0
    found = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "it" / "masked.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    samples = read_jsonl(tmp_path / "it" / "masked.jsonl")
    assert found["id"] == [s["id"] for s in samples] and found["answer"] == [s["answer"] for s in samples]
    row, sample = found[5], samples[5]
    question = row["prompt"][0]["content"]
    assert sample["masked_caption"] in question and [turn["role"] for turn in row["prompt"]] == ["user"]
    assert row["verl_prompt"][0]["content"] == f"<image>{question}"
    assert row["reward_model"] == {"style": "rule", "ground_truth": sample["answer"]}
    source = open_corpus(corpus[0])
    for row, sample in zip(found, samples, strict=True):
        (image,) = row["images"]
        truth = np.asarray(source.image(sample["example_id"]), dtype=int)
        assert image.format == "JPEG" and np.abs(np.asarray(image) - truth).mean() < 4
    assert mask("name=later") == 0 and not (tmp_path / "later" / "masked.parquet").exists()
    assert mask("--resume", "--parquet", "name=later") == 0 and (tmp_path / "later" / "masked.parquet").exists()
