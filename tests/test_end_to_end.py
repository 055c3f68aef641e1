"""The end-to-end benchmark: which runs it starts, which it goes on with, and what it hands to the report of seeds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import end_to_end
from benchmarks.end_to_end import QUICK
from mmrpt.settings import load_settings


def evaluation(right: int) -> dict:
    """One held-out set of ten captions; `right` of them with the image after reinforcement, five before."""
    rates = {"warmup": 5, "control": 5, "rl": right}
    rows = [
        {"model": model, "set": "new_scenes", "condition": shown, "accuracy": hits / 10, "count": 10, "by_kind": {}}
        for model, number in rates.items()
        for shown, hits in (("image", number), ("blanked", 1), ("swapped", 1))
    ]
    return {"rows": rows, "dependency_auc": 0.9}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Commands that would have trained; seed 2 fails, the others leave what a run leaves."""
    commands: list[list[str]] = []

    def train(command: list[str], cwd: Path):
        commands.append(command)
        name = next(word for word in command if word.startswith("name=")).removeprefix("name=")
        folder, seed = tmp_path / "runs" / name, int(name.removeprefix("seed-"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"name": name, "seed": seed}))
        (folder / "evaluation.json").write_text(json.dumps(evaluation(6 + 2 * seed)))
        return SimpleNamespace(returncode=1 if seed == 2 else 0)

    monkeypatch.setattr(end_to_end, "subprocess", SimpleNamespace(run=train))
    return commands


def test_seeds_end_in_one_report(trained: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert end_to_end.main(["--seeds", "0", "1", *folders, "rl.steps=9"]) == 0
    assert [command[-3:] for command in trained] == [[f"seed={i}", "device=cpu", "rl.steps=9"] for i in (0, 1)]
    record = json.loads((tmp_path / "results/end_to_end-cpu.json").read_text())
    gain = record["numbers"]["change/rl - warmup/all sets/image"]
    assert gain["mean"] == pytest.approx(0.2) and gain["low"] == pytest.approx(0.1)
    assert (tmp_path / "results/end_to_end-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "results/end_to_end-cpu.md").read_text() in capsys.readouterr().out


def test_a_run_that_was_cut_off_is_gone_on_with(trained: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "runs/seed-1").mkdir(parents=True)
    (tmp_path / "runs/seed-1/config.yaml").write_text("seed: 1")
    end_to_end.main(["--seeds", "1", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "rl.steps=9"])
    assert trained[0][-1] == "--resume" and "rl.steps=9" not in trained[0]


def test_a_failing_seed_is_told_and_the_others_reported(
    trained: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert end_to_end.main(["--seeds", "1", "2", *folders]) == 1
    assert "1 of 2 runs did not end" in capsys.readouterr().out
    assert [run["seed"] for run in json.loads((tmp_path / "end_to_end-cpu.json").read_text())["runs"]] == [1]


def test_quick_settings_are_settings_and_other_words_are_refused(capsys: pytest.CaptureFixture) -> None:
    settings = load_settings(None, QUICK)
    assert settings.rl.steps == 2 and settings.evaluation.samples == 8
    with pytest.raises(SystemExit):
        end_to_end.parse_args(["--budget", "9"])
    assert "expected settings of mmrpt.train" in capsys.readouterr().err
