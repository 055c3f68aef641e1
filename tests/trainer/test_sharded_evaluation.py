"""`python -m mmrpt.evaluate` on several processes: the bytes of one, whoever answers what and wherever it ended."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import pytest
import torch

from mmrpt import sharded_evaluation
from mmrpt.corpus import read_jsonl
from mmrpt.evaluate import main
from mmrpt.held_out import answer_batch, evaluate_policy, question_batches
from mmrpt.policy import Policy
from mmrpt.processes import one_at_a_time
from mmrpt.sharded_evaluation import MissingParts, Parts
from tests.trainer.conftest import SMALL_RUN, ColourPairs, make_looking_policy, masked_colour
from tests.trainer.test_train_cli import add_bad_rows, write_pairs
from tests.trainer.torchrun import torchrun

RESULTS = ("evaluation.md", "evaluation.json", "answers.jsonl", "rejected.jsonl", "corpus.json")
ASKED = ("data.held_out=25", "--samples", "10", "--sampled", "2")  # batches of 3: 12 a model, the last of each small


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The arguments that name two models and pairs, of which some cannot be used."""
    folder = tmp_path_factory.mktemp("given")
    add_bad_rows(folder / "pairs", write_pairs(folder / "pairs", 24))
    for seed, name in enumerate(("one", "two")):
        make_looking_policy(seed).write_files(folder / name)
    return (str(folder / "one"), str(folder / "two"), f"data.pairs={folder / 'pairs' / 'pairs.jsonl'}", *ASKED)


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert main([*SMALL_RUN, *given, "--out", str(folder)]) == 0
    return results(folder)


def results(folder):
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left - {"config.yaml", "asked.json"} == {*RESULTS}
    return {name: (folder / name).read_bytes() for name in RESULTS}


@pytest.fixture
def evaluate(given, tmp_path):
    """Runs the command line, with its results in `tmp_path`/out."""
    return lambda *arguments: main([*SMALL_RUN, *given, "--out", str(tmp_path / "out"), *arguments])


@pytest.fixture
def answered(monkeypatch):
    """The batches that were answered, as they come."""
    batches = []

    def counted(policy, sets, batch, settings, sampled):
        batches.append(batch)
        return answer_batch(policy, sets, batch, settings, sampled)

    monkeypatch.setattr(sharded_evaluation, "answer_batch", counted)
    return batches


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_any_number_of_processes_leaves_the_bytes_of_one(evaluate, alone, tmp_path, answered, capsys, parts):
    for part in reversed(range(parts)):
        assert not (tmp_path / "out" / "evaluation.json").exists()
        assert evaluate("--shard", f"{part}/{parts}") == 0
    assert results(tmp_path / "out") == alone
    assert len(answered) == 2 * 12 and len({id(batch) for batch in answered}) == 2 * 12
    assert alone["evaluation.md"].decode() in capsys.readouterr().out
    drawn = [row["sampled"] for row in read_jsonl(tmp_path / "out" / "answers.jsonl")]
    assert len(drawn) == 2 * 30 and sum(one != other for one, other in drawn) > 30  # not greedy ones twice
    assert evaluate("--shard", "0/2") == 0 and len(answered) == 2 * 12  # one that comes too late finds all done
    assert results(tmp_path / "out") == alone


def test_torchrun_shares_the_questions_of_one_command(given, alone, tmp_path):
    child = torchrun(2, "-m", "mmrpt.evaluate", *SMALL_RUN, *given, "--out", str(tmp_path / "out"))
    assert child.returncode == 0, child.stdout[-6000:]
    assert "evaluate 0/2" in child.stdout and "evaluate 1/2" in child.stdout
    assert child.stdout.count(alone["evaluation.md"].decode()) == 1
    assert results(tmp_path / "out") == alone


def test_missing_parts_are_named_and_another_number_of_processes_answers_them(
    evaluate, alone, tmp_path, answered, capsys
):
    assert evaluate("--shard", "1/3") == 0
    told = capsys.readouterr().out
    assert "part 1/3 is answered." in told and "8 of 12 batches are missing, those of part 0/3, 2/3." in told
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    assert evaluate("--shard", "1/3") == 0 and len(answered) == 2 * 4
    assert evaluate("--shard", "0/1") == 0 and len(answered) == 2 * 12
    assert results(tmp_path / "out") == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["two", "--shard", "1/2"], "and this process was given"),
        (["one", "two", "--shard", "1/2", "prompts.mask=<gone>"], "prompts.mask"),
        (["one", "two", "--shard", "1/2", "--sampled", "3"], "evaluation.sampled"),
        (["one", "two"], "exists already: choose another folder"),
        (["one", "two", "--shard", "2/2"], "--shard is '2/2': expected i/n with 0 <= i < n"),
    ],
)
def test_processes_must_be_given_the_same(given, tmp_path, capsys, arguments, message):
    one, two, pairs, *_ = given
    chosen = [*SMALL_RUN, pairs, "data.held_out=4", "evaluation.samples=2", "--out", str(tmp_path / "out")]
    assert main([*chosen, one, two, "--shard", "0/2"]) == 0
    models = [{"one": one, "two": two}.get(text, text) for text in arguments]
    assert main([*chosen, *models]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and message in error and "Traceback" not in error


@pytest.mark.parametrize("way", ["--shard", "torchrun"])
def test_processes_need_a_common_folder(given, tmp_path, capsys, monkeypatch, way):
    if way == "torchrun":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    shard = ["--shard", "0/2"] if way == "--shard" else []
    assert main([*SMALL_RUN, *given, f"output={tmp_path / 'runs'}", *shard]) == 2
    assert "several processes need the folder of their common results: add --out FOLDER" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("name: mine\n")  # the folder of a run
    assert main([*SMALL_RUN, *given, "--out", str(tmp_path / "mine"), *shard]) == 2
    assert "exists already: choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "config.yaml"]


# ------------------------------------------------------------------------------------------------ parts


@pytest.fixture
def questions():
    pairs = ColourPairs(8)
    return {"held_out": (pairs, [masked_colour(pairs, i) for i in range(8)])}


def test_parts_join_to_what_one_process_gives(looking_policy, questions, small_settings, tmp_path, monkeypatch):
    monkeypatch.setattr("mmrpt.held_out.is_exact", lambda text, answer: zlib.crc32(f"{text}|{answer}".encode()) % 2)
    settings = small_settings()
    whole = evaluate_policy(looking_policy, "m", questions, settings, sampled=2)
    assert any(0 < row["sampled_accuracy"] < 1 for row in whole[0])
    shares = [Parts(tmp_path / "parts", part, 4) for part in range(4)]
    ticks = []
    for share in shares:
        with pytest.raises(MissingParts, match=r"Of m, .* of 9 batches are missing, those of part (./4, )*3/4\."):
            share.joined(sharded_evaluation.key_of(looking_policy, questions, settings, 2), "m", questions, settings)
        key = share.answer(looking_policy, questions, settings, lambda: ticks.append(1), sampled=2)
    assert len(ticks) == 9
    for share in shares:
        assert json.dumps(share.joined(key, "m", questions, settings, sampled=2)) == json.dumps(whole)


def test_a_part_goes_on_where_it_was_cut_off(
    looking_policy, questions, small_settings, tmp_path, answered, monkeypatch
):
    settings, share = small_settings(), Parts(tmp_path / "parts")
    counted, left = sharded_evaluation.answer_batch, iter(range(4))

    def cut_off(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return counted(*arguments)

    monkeypatch.setattr(sharded_evaluation, "answer_batch", cut_off)
    with pytest.raises(KeyboardInterrupt):
        share.answer(looking_policy, questions, settings)
    (path,) = share.own.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])  # the fourth batch was being written
    monkeypatch.setattr(sharded_evaluation, "answer_batch", counted)
    key = share.answer(looking_policy, questions, settings)
    batches = question_batches(questions, settings)
    assert answered == [*batches[:4], *batches[3:]] and path.name == f"{key}.jsonl"
    assert share.joined(key, "m", questions, settings) == evaluate_policy(looking_policy, "m", questions, settings)


def test_answers_to_anything_else_are_not_taken(looking_policy, questions, small_settings, tmp_path):
    settings, share = small_settings(), Parts(tmp_path / "parts")

    def key(policy=looking_policy, sets=questions, settings=settings, sampled=0):
        return sharded_evaluation.key_of(policy, sets, settings, sampled)

    pairs, samples = questions["held_out"]
    other = replace(samples[3], masked_caption=samples[3].masked_caption.replace("<mask>", "<gone>"))
    found = [
        key(),
        key(sampled=2),
        key(settings=small_settings("rollout.max_new_tokens=5")),
        key(settings=small_settings("evaluation.batch_size=4")),
        key(sets={"held_out": (pairs, [*samples[:3], other, *samples[4:]])}),
        key(sets={"other": questions["held_out"]}),
    ]
    assert share.answer(looking_policy, questions, settings) == found[0]
    looking_policy.write_files(tmp_path / "copy")
    assert key(Policy.load(tmp_path / "copy")) == found[0]  # wherever it was found
    places = [replace(settings, name=name, model=replace(settings.model, path=name)) for name in ("here", "there")]
    assert key(settings=places[0]) == key(settings=places[1])
    with torch.no_grad():  # by the least that a weight can move
        weight = looking_policy.head_weight
        weight[7, 3] = torch.nextafter(weight[7, 3], torch.tensor(9.0))
    assert len({*found, key()}) == len(found) + 1
    with pytest.raises(MissingParts, match="9 of 9 batches are missing"):
        share.joined(key(), "m", questions, settings)


def test_a_part_is_answered_by_one_process_at_a_time(looking_policy, questions, small_settings, tmp_path, answered):
    share = Parts(tmp_path / "parts", 1, 2)
    share.own.mkdir(parents=True)
    with one_at_a_time(share.own / ".lock"), pytest.raises(ValueError, match="another process answers part 1/2 in"):
        share.answer(looking_policy, questions, small_settings())
    assert not answered
    share.answer(looking_policy, questions, small_settings())
    assert len(answered) == 4


def test_batches_with_the_same_questions_draw_other_answers(looking_policy, questions, small_settings):
    pairs, samples = questions["held_out"]
    sets, settings = {"held_out": (pairs, samples[:2] * 2)}, small_settings("evaluation.batch_size=2")
    first, second = question_batches(sets, settings)[:2]
    greedy, drawn = [], []
    for batch in (first, second):
        texts = answer_batch(looking_policy, sets, batch, settings, 2)
        greedy.append([one for one, *_ in texts])
        drawn.append([several for _, *several in texts])
    assert greedy[0] == greedy[1] and drawn[0] != drawn[1]
