"""The end-to-end benchmark: its arithmetic on made-up runs whose numbers can be checked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import end_to_end


def make_run(seed: int, reinforced: float, *, auc: float = 0.9, seconds: float = 300.0) -> dict:
    """Two sets of 100 and 300 captions; accuracy with the image as given on both, elsewhere constant."""
    fixed = {"warm": 0.5, "caption": 0.55, "reinforced": reinforced}
    rows = [
        {"model": model, "set": where, "condition": shown, "accuracy": rate if shown == "image" else 0.1, "count": n}
        for model, rate in fixed.items()
        for where, n in (("new_scenes", 100), ("new_style", 300))
        for shown in end_to_end.CONDITIONS
    ]
    return {"seed": seed, "auc": auc, "seconds": {"warmup": 60.0, "rl": seconds - 60.0}, "rows": rows}


def verdicts(runs: list[dict]) -> dict[str, bool]:
    return {promise.name: promise.met for promise in end_to_end.promises(runs)}


def test_promises_are_judged_by_the_mean_over_seeds() -> None:
    kept = verdicts([make_run(0, 0.58), make_run(1, 0.62)])
    assert all(kept.values()), "a mean gain of exactly ten points is ten points"
    missed = verdicts([make_run(0, 0.58), make_run(1, 0.61)])  # 9.5 points over the warm start, 4.5 over captions
    assert not missed["gain over the warm start"] and not missed["gain over equal caption training"]


def test_slow_and_blind_runs_miss() -> None:
    run = make_run(0, 0.7, auc=0.84, seconds=361.0)
    for row in run["rows"]:
        if row["model"] == "reinforced" and row["condition"] == "blanked":
            row["accuracy"] = 0.14
    missed = [name for name, met in verdicts([run]).items() if not met]
    assert missed == ["AUC of dependency scores", "rise with the image blanked", "seconds of the whole run"]


def test_larger_sets_weigh_more() -> None:
    run = make_run(0, 0.6)
    for row in run["rows"]:
        if row["set"] == "new_style" and row["model"] == "reinforced" and row["condition"] == "image":
            row["accuracy"] = 0.2
    assert math.isclose(end_to_end.accuracy(run, "reinforced", "image"), (0.6 * 100 + 0.2 * 300) / 400)
    assert end_to_end.accuracy(run, "reinforced", "image", "new_scenes") == 0.6
    assert math.isnan(end_to_end.accuracy(run, "other", "image"))


def test_mean_and_spread() -> None:
    assert end_to_end.mean_and_spread([3.0]) == (3.0, 0.0)
    mean, spread = end_to_end.mean_and_spread([1.0, 2.0, 3.0])
    assert (mean, spread) == (2.0, 1.0)


def test_seeds_run_or_go_on_and_end_in_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    commands: list[list[str]] = []

    def train(command: list[str], cwd: Path):
        commands.append(command)
        folder = tmp_path / "runs" / next(word for word in command if word.startswith("name=")).removeprefix("name=")
        folder.mkdir(parents=True, exist_ok=True)
        seed = int(folder.name.removeprefix("seed-"))
        run = make_run(seed, 0.6 + 0.05 * seed)
        measured = {"rows": run["rows"], "dependency_auc": run["auc"], "seconds": run["seconds"]}
        (folder / "evaluation.json").write_text(json.dumps(measured))
        return type("Done", (), {"returncode": 1 if seed == 2 else 0})

    monkeypatch.setattr(end_to_end.subprocess, "run", train)
    origin = {"device_name": "cpu", "threads": 2, "date": "2026-01-01T00:00:00", "commit": "c"}
    monkeypatch.setattr(end_to_end, "provenance", lambda device: origin)
    cut_off = tmp_path / "runs" / "seed-1"
    cut_off.mkdir(parents=True)
    (cut_off / "config.yaml").touch()
    arguments = ["--seeds", "0", "1", "2", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "rl.steps=9"]
    assert end_to_end.main(arguments) == 1
    assert commands[0][-2:] == ["seed=0", "rl.steps=9"] and commands[1][-1] == "--resume"
    printed = capsys.readouterr().out
    assert "| all sets | image | 50.0 ± 0.0 | 55.0 ± 0.0 | 62.5 ± 3.5 |" in printed
    assert "| gain over the warm start | >= 0.10 | 0.125 ± 0.035 | 0.100, 0.150 | kept |" in printed
    assert "1 of 3 runs did not end" in printed
    assert (tmp_path / "end_to_end-cpu.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "end_to_end-cpu.json").read_text())
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    assert end_to_end.main(["--table", str(tmp_path / "end_to_end-cpu.json")]) == 0
    assert "| all sets | image |" in capsys.readouterr().out
