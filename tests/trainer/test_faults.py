"""What goes wrong outside of the method: each fault ends in a message that names it, and loses no good checkpoint."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from mmrpt import objective
from mmrpt.engines import native
from mmrpt.engines.run import open_run
from mmrpt.rewards.combine import REWARDS
from mmrpt.run_folder import RunError, RunFolder
from mmrpt.train import main
from tests.trainer.test_resume import check_same_run, finish, outside_world, settings_in, straight  # noqa: F401  fixtures


def damage(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def fail_in_step(monkeypatch, name: str, call: int, fault) -> None:
    """Runs `fault()` in the given call (from 1) of a function of the loop."""
    function, calls = getattr(native, name), iter(range(1, 1000))

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            fault()
        return function(*args, **kwargs)

    monkeypatch.setattr(native, name, wrapped)


# ------------------------------------------------------------------------------------------------ one process a folder


def test_a_folder_in_use_is_refused_and_named(tmp_path, capsys):
    first = RunFolder(tmp_path / "run")
    first.lock()
    with pytest.raises(RunError, match=f"in use by another process \\(id {os.getpid()}\\)"):
        RunFolder(tmp_path / "run").lock()
    settings = settings_in(tmp_path)
    first.unlock()
    RunFolder(settings.run_dir).lock()  # free again
    assert main(["--resume", f"output={tmp_path}", "name=run"]) == 2
    assert "there is no run to resume" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ asked to end


def test_sigterm_saves_at_the_end_of_the_step(straight, tmp_path, monkeypatch, capsys):  # noqa: F811
    settings = settings_in(tmp_path, "checkpoint_every=1000")
    run = open_run(settings)
    before = signal.getsignal(signal.SIGTERM)
    run.stop.install()
    try:
        with monkeypatch.context() as patch:
            fail_in_step(patch, "log_step", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit) as ended:
                native.train(run)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM and "go on with --resume" in capsys.readouterr().out
    assert [p.name for p in (settings.run_dir / "checkpoints").glob("rl*")] == ["rl-3"]
    finish(settings)
    check_same_run(settings.run_dir, straight)


# ------------------------------------------------------------------------------------------------ nothing is learned


@pytest.mark.parametrize("patience", [3, 100])
def test_steps_without_signal_end_the_run(tmp_path, monkeypatch, patience):
    for name in REWARDS:
        monkeypatch.setitem(REWARDS, name, lambda completions, **_: [0.0] * len(completions))
    settings = settings_in(tmp_path, f"patience={patience}", "control.kinds=[]")
    message = r"rl, step 2: no group .* 3 steps in a row" if patience == 3 else "rl: not one of its 6 steps"
    with pytest.raises(RunError, match=message):
        finish(settings)
    rows = [json.loads(line) for line in (settings.run_dir / "metrics.jsonl").read_text().splitlines()]
    idle = [row for row in rows if row["phase"] == "rl"]
    assert len(idle) == (3 if patience == 3 else 6) and all(row["groups"] == 0 for row in idle)
    assert all(row["caption_loss"] > 0 for row in idle), "captions are trained on all the same"
    assert not (settings.run_dir / "checkpoints" / "rl").exists()


def test_gradients_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    loss = objective.supervised_loss
    monkeypatch.setattr(objective, "supervised_loss", lambda *args: loss(*args) * torch.nan)
    with pytest.raises(RunError, match=r"warmup, step 1: the gradient was not finite in 2 steps .*warmup.optimiser.lr"):
        finish(settings_in(tmp_path, "patience=2"))


# ------------------------------------------------------------------------------------------------ checkpoints


def stopped_in_rl(tmp_path, monkeypatch):
    """A run that died in the fifth step of reinforcement, with two checkpoints of it."""
    settings = settings_in(tmp_path)

    def die():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        fail_in_step(patch, "log_step", 5, die)
        with pytest.raises(KeyboardInterrupt):
            finish(settings)
    checkpoints = settings.run_dir / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("rl*")) == ["rl-2", "rl-4"]
    return settings, checkpoints


def test_an_unreadable_newest_checkpoint_falls_back_to_the_older(straight, tmp_path, monkeypatch, capsys):  # noqa: F811
    settings, checkpoints = stopped_in_rl(tmp_path, monkeypatch)
    damage(checkpoints / "rl-4")
    finish(settings)
    error = capsys.readouterr().err
    assert f"{checkpoints / 'rl-4'} cannot be read" in error and "Trying the one before it" in error
    check_same_run(settings.run_dir, straight)


def test_no_readable_checkpoint_is_an_error_that_names_it(tmp_path, monkeypatch):
    settings, checkpoints = stopped_in_rl(tmp_path, monkeypatch)
    for name in ("rl-2", "rl-4"):
        damage(checkpoints / name)
    with pytest.raises(RunError, match="rl-2 cannot be read"):
        finish(settings)


def test_a_full_disk_leaves_the_last_good_checkpoint(straight, tmp_path, monkeypatch):  # noqa: F811
    settings = settings_in(tmp_path)
    save = torch.save

    def full(state, path):
        if "rl-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        with pytest.raises(RunError, match="rl-4 could not be written .*No space left on device.*--resume"):
            finish(settings)
    assert sorted(p.name for p in (settings.run_dir / "checkpoints").glob("rl*")) == ["rl-2"]
    finish(settings)
    check_same_run(settings.run_dir, straight)


def test_phases_without_steps_copy_no_model(tmp_path):
    settings = settings_in(tmp_path, "demo.vision_steps=0", "warmup.steps=0", "control.kinds=[]")
    finish(settings)
    assert [p.name for p in (settings.run_dir / "checkpoints").iterdir()] == ["rl"]


# ------------------------------------------------------------------------------------------------ the environment


def test_another_environment_at_resume_is_added(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    for commit in ("aaa", "aaa", "bbb", "bbb"):
        monkeypatch.setattr(
            "mmrpt.run_folder.environment",
            lambda device, commit=commit: {"device": device, "date": "today", "commit": commit},
        )
        folder.record_environment("cpu")
    found = json.loads((tmp_path / "environment.json").read_text())
    later = {"device": "cpu", "date": "today", "commit": "bbb"}
    assert found == {"device": "cpu", "date": "today", "commit": "aaa", "resumed": [later]}
