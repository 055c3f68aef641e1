"""Trackers: what they are given, by the real packages' signatures, and what happens where one is missing or fails."""

from __future__ import annotations

import json
import math
import sys
import warnings
from types import SimpleNamespace

import pytest

from mmrpt.corpus import read_jsonl
from mmrpt.engines import native
from mmrpt.engines.run import open_run
from mmrpt.run_folder import RunFolder
from mmrpt.settings import SettingsError, load_settings
from mmrpt.trackers import Trackers
from mmrpt.train import main
from tests.trainer.conftest import SMALL_RUN
from tests.trainer.test_resume import outside_world  # noqa: F401  a fixture


class WandbRun:
    """As wandb.Run."""

    def __init__(self, config):
        self.config, self.rows, self.axes, self.ended = config, [], {}, 0

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None):
        self.axes[name] = step_metric

    def log(self, data, step=None, commit=None):
        self.rows.append((step, data))

    def finish(self, exit_code=None):
        self.ended += 1


class TrackioRun:
    """As trackio.Run."""

    def __init__(self, config):
        self.config, self.rows, self.ended = config, [], 0

    def log(self, metrics, step=None):
        self.rows.append((step, metrics))

    def finish(self):
        self.ended += 1


class SummaryWriter:
    """As torch.utils.tensorboard.SummaryWriter."""

    def __init__(self, log_dir=None, comment="", purge_step=None, max_queue=10, flush_secs=120, filename_suffix=""):
        self.log_dir, self.rows, self.texts, self.ended = log_dir, [], {}, 0
        writers.append(self)

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None, new_style=False, double_precision=False):
        self.rows.append((global_step, {tag: scalar_value}))

    def add_text(self, tag, text_string, global_step=None, walltime=None):
        self.texts[tag] = text_string

    def close(self):
        self.ended += 1


writers: list = []


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for the packages, with every run that was begun in them."""
    begun = {"wandb": [], "trackio": [], "tensorboard": writers}
    writers.clear()

    def init(name, kind):
        # The parameters that are used here, of many: another name is an error as in the package.
        def init(project=None, name=None, group=None, config=None):
            assert (project, name, group) == ("mmrpt", "run", "run")
            begun[package].append(kind(config))
            return begun[package][-1]

        package = name
        return init

    for name, kind in (("wandb", WandbRun), ("trackio", TrackioRun)):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init(name, kind)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    return begun


def settings_in(folder, *overrides):
    return load_settings(None, [f"output={folder}", "name=run", *SMALL_RUN, *overrides])


def test_every_row_of_a_run_goes_to_each_tracker(tmp_path, packages):
    assert main([f"output={tmp_path}", "name=run", *SMALL_RUN, "track=[tensorboard, trackio, wandb]"]) == 0
    ((wandb,), (trackio,), (board,)) = packages.values()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    names = [{f"{row['phase']}/{name}" for name in row.keys() - {"phase", "step"}} for row in rows]
    steps = [row["step"] for row in rows]
    assert {row["phase"] for row in rows} == {"vision_pretraining", "warmup", "rl", "control"}
    assert [set(data) for _, data in trackio.rows] == names and [step for step, _ in trackio.rows] == steps
    assert [set(data) - {f"{row['phase']}/step"} for row, (_, data) in zip(rows, wandb.rows, strict=True)] == names
    assert [data[f"{row['phase']}/step"] for row, (_, data) in zip(rows, wandb.rows, strict=True)] == steps
    assert all(step is None for step, _ in wandb.rows)  # wandb drops rows whose step is behind the last
    assert wandb.axes == {f"{phase}/*": f"{phase}/step" for phase in {row["phase"] for row in rows}}
    sent = {(step, *item) for step, data in board.rows for item in data.items()}
    assert sent == {(row["step"], f"{row['phase']}/{n}", v) for row in rows for n, v in row.items() if n not in AXES}
    for run in (wandb, trackio):
        assert run.config["rl.steps"] == 6 and run.config["name"] == "run" and run.ended == 1
        json.dumps(run.config)
    assert "groups_per_step: 2" in board.texts["settings"] and board.ended == 1
    assert board.log_dir == str(tmp_path / "run" / "tensorboard")


AXES = ("phase", "step")


def test_nothing_is_imported_that_is_not_named(tmp_path, monkeypatch):
    for name in ("wandb", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert open_run(settings_in(tmp_path)).folder.trackers.running == {}


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_package_that_is_not_there_is_told_before_anything_is_trained(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    assert main([f"output={tmp_path}", "name=run", *SMALL_RUN, f"track=[{name}]"]) == 2
    assert f"track names {name}, which cannot be imported" in (said := capsys.readouterr().err)
    assert f"pip install {name}, or leave it out" in said and not (tmp_path / "run").exists()


def test_one_that_does_not_start_is_told_and_ends_the_others(tmp_path, packages, monkeypatch, capsys):
    def refuse(**_):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["trackio"], "init", refuse)
    assert main([f"output={tmp_path}", "name=run", *SMALL_RUN, "track=[tensorboard, trackio, wandb]"]) == 2
    assert "track names trackio, which does not start (RuntimeError: no API key)" in capsys.readouterr().err
    assert packages["wandb"][0].ended == 1 and packages["tensorboard"] == [] and not (tmp_path / "run").exists()


def test_one_that_fails_later_is_told_once_and_the_run_goes_on(tmp_path, packages, monkeypatch):
    trackers = Trackers(["wandb", "trackio"])
    trackers.start(settings_in(tmp_path), tmp_path)
    folder = RunFolder(tmp_path)
    folder.trackers = trackers

    def fail(*_, **__):
        raise ConnectionError("gone")

    folder.metrics("rl", 0, loss=1.0, skipped=False, note=None, worst=math.inf)
    monkeypatch.setattr(packages["wandb"][0], "log", fail)
    with pytest.warns(UserWarning, match=r"wandb failed \(ConnectionError: gone\)"):
        folder.metrics("rl", 1, loss=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder.metrics("rl", 2, loss=1.0)
        trackers.close()
    (trackio,) = packages["trackio"]
    assert [step for step, _ in trackio.rows] == [0, 1, 2] and trackio.ended == 1
    first = {name: value for name, value in trackio.rows[0][1].items() if name != "rl/seconds"}
    assert first == {"rl/loss": 1.0, "rl/skipped": 0.0, "rl/worst": math.inf}
    folder.close()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_trackers_end_with_a_run_that_fails(tmp_path, packages, monkeypatch):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main([f"output={tmp_path}", "name=run", *SMALL_RUN, "track=[wandb]"])
    assert packages["wandb"][0].ended == 1


def test_an_unknown_tracker_is_refused():
    with pytest.raises(SettingsError, match="track is 'mlflow'"):
        load_settings(None, ["track=[mlflow]"])
