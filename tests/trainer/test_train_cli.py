"""The command line: which folder a run gets, what --resume accepts, and what is refused at the start."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml

from mmrpt.corpus import read_jsonl
from mmrpt.engines.run import open_run
from mmrpt.run_folder import RunFolder
from mmrpt.settings import SettingsError, load_settings
from mmrpt.sources import open_sources
from mmrpt.train import main
from tests.trainer.conftest import SMALL_RUN, ColourPairs, make_policy


@pytest.fixture
def started(monkeypatch):
    """The settings of every run that would have started."""
    runs = []

    def open_run(settings):
        runs.append(settings)
        stop = SimpleNamespace(install=lambda: None)
        return SimpleNamespace(settings=settings, stop=stop, folder=RunFolder(settings.run_dir))

    monkeypatch.setattr("mmrpt.engines.run.open_run", open_run)
    monkeypatch.setattr("mmrpt.engines.native.train", lambda run: "report.md")
    return runs


def run(tmp_path, *arguments):
    return main([f"output={tmp_path}", *arguments])


# ------------------------------------------------------------------------------------------------ names and folders


def test_unnamed_runs_take_the_next_free_number(tmp_path, started):
    assert [run(tmp_path) for _ in range(3)] == [0, 0, 0]
    assert [s.name for s in started] == ["demo", "demo-2", "demo-3"]
    (tmp_path / "demo-40").mkdir()
    (tmp_path / "demo-best").mkdir()
    run(tmp_path)
    assert started[-1].name == "demo-41"


def test_the_settings_are_saved_with_the_run(tmp_path, started):
    assert run(tmp_path, "name=mine", "rl.steps=7", "rl.dual_clip=null") == 0
    assert load_settings(tmp_path / "mine" / "config.yaml") == started[0]
    assert started[0].rl.steps == 7 and started[0].run_dir == tmp_path / "mine"


def test_a_named_run_is_never_written_over(tmp_path, started, capsys):
    run(tmp_path, "name=mine")
    before = (tmp_path / "mine" / "config.yaml").read_bytes()
    assert run(tmp_path, "name=mine", "rl.steps=3") == 2
    error = capsys.readouterr().err
    assert "mine exists already" in error and "--resume" in error and "name=" in error
    assert (tmp_path / "mine" / "config.yaml").read_bytes() == before and len(started) == 1


def test_a_settings_file_without_a_name_does_not_name_the_run(tmp_path, started):
    (tmp_path / "my.yaml").write_text("rl: {steps: 3}\n")
    assert [run(tmp_path, "--config", str(tmp_path / "my.yaml")) for _ in range(2)] == [0, 0]
    assert [s.name for s in started] == ["demo", "demo-2"] and started[1].rl.steps == 3
    (tmp_path / "named.yaml").write_text("name: it\n")
    assert [run(tmp_path, "--config", str(tmp_path / "named.yaml")) for _ in range(2)] == [0, 2]


# ------------------------------------------------------------------------------------------------ resume


def test_resume_takes_the_newest_or_the_named_run_with_its_own_settings(tmp_path, started):
    run(tmp_path, "rl.steps=5")
    run(tmp_path, "rl.steps=6")
    run(tmp_path, "name=other", "rl.steps=7")
    for arguments, name, steps in (((), "demo-2", 6), (("name=demo",), "demo", 5), (("name=other",), "other", 7)):
        assert run(tmp_path, "--resume", *arguments) == 0
        assert (started[-1].name, started[-1].rl.steps) == (name, steps)


def test_a_run_that_was_moved_is_resumed_where_it_is(tmp_path, started):
    run(tmp_path / "a", "name=it", "rl.steps=5")
    (tmp_path / "a").rename(tmp_path / "b")
    assert run(tmp_path / "b", "--resume", "name=it") == 0
    assert started[-1].run_dir == tmp_path / "b" / "it"


@pytest.mark.parametrize(
    "changed",
    [
        ["rl.steps=9"],
        ["rl.steps=100"],  # the default, yet not what the run has: nothing given may be ignored
        ["seed=1", "rl.steps=5"],
        ["demo.world.card_weights=[1, 0, 0, 0]"],
    ],
)
def test_resume_refuses_other_settings(tmp_path, started, capsys, changed):
    default = load_settings().rl.steps
    changed = [c.replace("rl.steps=100", f"rl.steps={default}") for c in changed]
    run(tmp_path, "name=it", "rl.steps=5")
    assert run(tmp_path, "--resume", "name=it", *changed) == 2
    error = capsys.readouterr().err
    assert "the settings differ" in error and changed[0].partition("=")[0] in error and len(started) == 1
    assert run(tmp_path, "--resume", "name=it", "rl.steps=5") == 0  # saying it again is no change


def test_resume_compares_a_settings_file(tmp_path, started, capsys):
    (tmp_path / "a.yaml").write_text("name: it\nrl: {steps: 5}\n")
    (tmp_path / "b.yaml").write_text("name: it\nrl: {steps: 6}\n")
    run(tmp_path, "--config", str(tmp_path / "a.yaml"))
    assert run(tmp_path, "--resume", "--config", str(tmp_path / "a.yaml")) == 0
    assert run(tmp_path, "--resume", "--config", str(tmp_path / "b.yaml")) == 2
    assert "rl.steps" in capsys.readouterr().err


def test_resume_compares_what_a_group_names_and_nothing_beside_it(tmp_path, started, capsys):
    run(tmp_path, "name=it", "rl.steps=5", "rl.optimiser.warmup_steps=9")
    assert run(tmp_path, "--resume", "name=it", "rl={steps: 5, optimiser: {beta2: 0.98}}") == 0
    assert started[-1].rl.optimiser.warmup_steps == 9
    assert run(tmp_path, "--resume", "name=it", "rl={steps: 5, optimiser: {beta2: 0.8}}") == 2
    error = capsys.readouterr().err
    assert "rl.optimiser.beta2" in error and "warmup_steps" not in error


def test_a_run_with_settings_of_another_version_is_not_resumed(tmp_path, started, capsys):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "config.yaml").write_text("name: it\nworld: {seed: 1}\nsight: {steps: 3}\nmasking: {pairs: 9}\n")
    assert run(tmp_path, "--resume", "name=it") == 2
    error = capsys.readouterr().err
    assert "are not of this version" in error and "start a new one under another name" in error
    assert all(told in error for told in ("world is now demo.world", "demo.vision_steps", "masking.captions"))
    assert not started and [path.name for path in (tmp_path / "it").iterdir()] == ["config.yaml"]


def test_resume_without_a_run_says_so(tmp_path, started, capsys):
    assert run(tmp_path, "--resume") == 2
    assert "there is no run to resume" in capsys.readouterr().err and not started
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ --show


def test_show_prints_settings_that_load_back(tmp_path, started, capsys):
    assert run(tmp_path, "--show", "rl.steps=11", "prompts.describe='what is there: yes?'") == 0
    text = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(text)
    wanted = load_settings(None, [f"output={tmp_path}", "rl.steps=11", "prompts.describe='what is there: yes?'"])
    assert load_settings(tmp_path / "shown.yaml") == wanted
    assert yaml.safe_load(text)["rl"]["steps"] == 11
    assert not started and [p.name for p in tmp_path.iterdir()] == ["shown.yaml"]


# ------------------------------------------------------------------------------------------------ refused at the start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollout.group_size=1"], "group of one"),
        (["perception.keep_ratio=1.5"], "perception.keep_ratio is 1.5"),
        (["rl.lr=1"], "unknown setting 'rl.lr'"),
        (["rl.dual_clip=1"], "rl.dual_clip is 1: expected greater than 1"),
        (["masking.batch_tokens=0"], "masking.batch_tokens is 0"),
        (["evaluation.samples=1"], "evaluation.samples is 1"),
        (["name=.."], "names a folder inside output"),
        (["--config", "nowhere.yaml"], "cannot read the settings file nowhere.yaml"),
    ],
)
def test_bad_settings_end_with_code_two_and_leave_nothing(tmp_path, started, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not started and list(tmp_path.iterdir()) == []


def write_pairs(folder, count=8):
    """Coloured cards as files, and their list."""
    folder.mkdir()
    pairs, rows = ColourPairs(count), []
    for index in range(count):
        example = pairs[index]
        pairs.image(example.id).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": example.caption})
    write_rows(folder, rows)
    return rows


def write_rows(folder, rows):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


BAD_ROWS = {
    "image_missing": {"image": "gone.png", "caption": "a red card."},
    "image_format": {"image": "notes.png", "caption": "a red card."},
    "caption_empty": {"image": "0.png", "caption": "  "},
    "caption_missing": {"image": "0.png"},
}


def add_bad_rows(folder, rows):
    (folder / "notes.png").write_bytes(b"no picture")
    write_rows(folder, [*rows[:3], *BAD_ROWS.values(), *rows[3:]])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("broken.jsonl", "broken.jsonl:1: broken JSON"),
        ("other.jsonl", "there is no such file or folder"),
        ("", "Expected one of"),
        ("0.png", "this is no format of pairs"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused_at_the_start(tmp_path, capsys, file, message):
    write_pairs(tmp_path / "pairs")
    (tmp_path / "pairs" / "broken.jsonl").write_text('{"image": "0.png"')
    path = tmp_path / "pairs" / file
    assert run(tmp_path / "runs", *SMALL_RUN, f"data.pairs={path}", "data.held_out=2") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.pairs: ") and message in error
    assert not (tmp_path / "runs" / "demo").exists(), "the mended command would find a run of that name"


def test_the_limits_of_pairs_are_settings(tmp_path):
    rows = write_pairs(tmp_path / "pairs")
    add_bad_rows(tmp_path / "pairs", [*rows, {"image": "../above.png", "caption": "a card above."}])
    ColourPairs(1).image("colour/000").save(tmp_path / "above.png")

    def captions(*limits):
        pairs = f"data.pairs={tmp_path / 'pairs' / 'pairs.jsonl'}"
        run_dir = tmp_path / str(len(list(tmp_path.iterdir())))
        run_dir.mkdir()
        sources = open_sources(load_settings(None, [f"output={run_dir}", pairs, "data.held_out=2", *limits]))
        found = {s[i].caption for s in (sources.train, *sources.held_out.values()) for i in range(len(s))}
        assert len(sources.rows) == len(sources.train) and sources.rejected.counts
        return found, sorted(row["kind"] for row in read_jsonl(run_dir / "demo" / "rejected.jsonl"))

    good = {row["caption"] for row in rows}
    assert captions() == (good, sorted([*BAD_ROWS, "outside_root"]))
    assert captions(f"data.root={tmp_path}") == (good | {"a card above."}, sorted(BAD_ROWS))
    longest = max(map(len, good))
    assert captions(f"data.max_caption_chars={longest - 1}")[0] == {c for c in good if len(c) < longest}
    with pytest.raises(SettingsError, match="(?s)data.pairs: .*image_too_large.*data.max_megapixels"):
        captions("data.max_megapixels=0.0001")


@pytest.mark.parametrize("held_out", [0, 1, 8, 9])
def test_a_share_that_leaves_nothing_is_refused(tmp_path, capsys, held_out):
    write_pairs(tmp_path / "pairs")
    pairs = f"data.pairs={tmp_path / 'pairs' / 'pairs.jsonl'}"
    assert run(tmp_path / "runs", *SMALL_RUN, pairs, f"data.held_out={held_out}", "name=it") == 2
    assert f"data.held_out is {held_out} of 8 rows" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "it").exists()


def test_a_model_that_cannot_be_opened_is_refused_at_the_start(tmp_path, capsys):
    assert run(tmp_path / "runs", *SMALL_RUN, f"model.path={tmp_path}") == 2
    assert "no config.json" in capsys.readouterr().err
    make_policy().write_files(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    refused = {"bert": "holds a 'bert', which transformers", "llava": "weights of a LlavaForConditionalGeneration"}
    for model_type, message in refused.items():
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        assert run(tmp_path / "runs", *SMALL_RUN, f"model.path={tmp_path / 'model'}") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / "demo").exists()


def test_giving_a_folder_back_takes_nothing_else_along(tmp_path):
    (tmp_path / "runs" / "it").mkdir(parents=True)  # empty: a run may begin in it
    broken = [*SMALL_RUN, f"data.pairs={tmp_path / 'nowhere'}", "name=it"]
    assert run(tmp_path / "runs", *broken) == 2 and not (tmp_path / "runs" / "it").exists()

    def write_beside(settings):
        (settings.run_dir / "notes.txt").write_text("mine")
        raise ValueError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmrpt.engines.run.open_run", write_beside)
        assert run(tmp_path / "runs", "name=it") == 2
    assert [p.name for p in (tmp_path / "runs" / "it").iterdir()] == ["notes.txt"]


def test_a_refused_resume_leaves_the_run_as_it_is(tmp_path, capsys):
    """Its pairs have moved since; the run must survive until they are back."""
    write_pairs(tmp_path / "pairs")
    pairs = f"data.pairs={tmp_path / 'pairs' / 'pairs.jsonl'}"
    settings = load_settings(None, [f"output={tmp_path}", "name=it", *SMALL_RUN, pairs, "data.held_out=2"])
    open_run(settings)
    (tmp_path / "it" / "config.yaml").write_text(yaml.safe_dump({"name": "it", "data": {"pairs": "gone.jsonl"}}))
    assert run(tmp_path, "--resume", "name=it") == 2
    assert "there is no such file" in capsys.readouterr().err
    assert (tmp_path / "it" / "config.yaml").exists() and (tmp_path / "it" / "environment.json").exists()


# ------------------------------------------------------------------------------------------------ the whole thing


def test_real_pairs_run_from_start_to_report(tmp_path, capsys, rewards_with_signal):
    """Through every phase and the report's plots; nothing of the drawn world is needed."""
    add_bad_rows(tmp_path / "pairs", write_pairs(tmp_path / "pairs", 12))
    pairs = f"data.pairs={tmp_path / 'pairs' / 'pairs.jsonl'}"
    short = ["demo.vision_steps=1", "rl.steps=1", "rl.max_rounds=1", "warmup.steps=2", "evaluation.samples=2"]
    assert run(tmp_path / "runs", *SMALL_RUN, *short, pairs, "data.held_out=4", "name=real") == 0
    folder = tmp_path / "runs" / "real"
    assert f"report: {folder / 'report.md'}" in capsys.readouterr().out
    assert "held_out" in (folder / "evaluation.json").read_text() and (folder / "report.md").stat().st_size > 500
    masked = [json.loads(line) for line in (folder / "masked.jsonl").read_text().splitlines()]
    assert masked and all(row["needs_image"] is None for row in masked)
    settings = load_settings(folder / "config.yaml")
    held_out = open_sources(settings).held_out["held_out"]
    held = {held_out[i].id for i in range(len(held_out))}
    masked_ids = [row["example_id"] for row in masked]
    assert len(held) >= 3 and not held & set(masked_ids)  # a row whose image is bad may be among the four
    assert len(masked_ids) == len({row["id"] for row in masked})  # no caption stands in for a bad row
    assert sorted(row["kind"] for row in read_jsonl(folder / "rejected.jsonl")) == sorted(BAD_ROWS)
    write_pairs(tmp_path / "others", 11)
    (tmp_path / "others" / "pairs.jsonl").rename(tmp_path / "pairs" / "pairs.jsonl")
    assert run(tmp_path / "runs", "--resume", "name=real") == 2
    assert "has other rows than the run began with" in capsys.readouterr().err
