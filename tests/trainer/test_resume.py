"""Killed at any moment and resumed, a run ends in the same weights and files, bit for bit.

A kill is an exception that nothing catches, after which the dead process writes nothing: `finally` blocks that would
clean up fail too, and the write it died in is torn. One test sends a real SIGKILL to a real process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmrpt.corpus import read_jsonl
from mmrpt.engines import native
from mmrpt.engines.run import open_run
from mmrpt.report.step_log import log_step
from mmrpt.rewards.combine import REWARDS
from mmrpt.settings import load_settings
from mmrpt.sources import Sources
from mmrpt.train import main
from tests.trainer.conftest import SMALL_RUN, ColourPairs, make_policy

PHASES = ("vision_pretraining", "warmup", "rl", "control")
EXACT_FILES = ("scores.jsonl", "masked.jsonl", "masking.json", "answers.jsonl", "perception.jsonl", "samples.jsonl")


class Killed(BaseException):
    """Not an Exception: nothing in the trainer may catch it."""


def patch_outside_world(patch: pytest.MonkeyPatch) -> None:
    """Pairs of coloured cards, rewards for three prompts of a round whatever is said, and no plots.

    A step consumes two groups, so the six steps sample in the first, second, fourth and fifth of them, and two groups,
    then one, wait in the buffer at the checkpoints: on any CPU, however it rounds.
    """

    def column(completions, **_):
        return [float(row in (0, 6, 10)) for row in range(len(completions))]  # one of the two rollouts of 0, 3 and 5

    def open_sources(settings):
        train = ColourPairs(24)
        validation = ColourPairs(8, "validation") if settings.evaluation.every else None
        return Sources(train, train, {"new_scenes": ColourPairs(9, "new")}, None, validation=validation)

    for name in REWARDS:
        patch.setitem(REWARDS, name, column)
    patch.setattr("mmrpt.engines.run.open_sources", open_sources)
    patch.setattr("mmrpt.report.page.write_report", lambda folder: folder / "report.md")


@pytest.fixture(scope="module", autouse=True)
def outside_world():
    with pytest.MonkeyPatch.context() as patch:
        patch_outside_world(patch)
        yield


def settings_in(folder: Path, *overrides: str):
    return load_settings(None, [f"output={folder}", "name=run", *SMALL_RUN, *overrides])


def finish(settings) -> None:
    """What is left to do of a run."""
    native.train(open_run(settings))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    settings = settings_in(tmp_path_factory.mktemp("straight"))
    assert settings.warmup.optimiser.kind == "muon"  # whose state is then saved and restored below
    finish(settings)
    return settings.run_dir


def without_seconds(rows):
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def check_same_run(
    found: Path, wanted: Path, phases: tuple[str, ...] = PHASES, file: str = "model.safetensors"
) -> None:
    assert sorted(p.name for p in (found / "checkpoints").iterdir()) == sorted(phases)
    for phase in phases:
        a, b = (load_file(folder / "checkpoints" / phase / file) for folder in (found, wanted))
        assert a.keys() == b.keys()
        different = [name for name in b if not torch.equal(a[name], b[name])]
        assert not different, f"{phase}: {len(different)} of {len(b)} tensors differ, {different[:3]}"
    for name in EXACT_FILES:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    metrics = [without_seconds(read_jsonl(folder / "metrics.jsonl")) for folder in (found, wanted)]
    assert metrics[0] == metrics[1]
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in (found, wanted)]
    assert without_seconds(results[:1]) == without_seconds(results[1:])
    names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.suffix != ".tmp"} for f in (found, wanted)]
    assert names[0] - {"config.yaml", ".lock"} == names[1]  # which the command line writes


def test_recomputed_activations_train_the_same_model(straight, tmp_path):
    run = open_run(settings_in(tmp_path, "model.gradient_checkpointing=true"))
    assert any(getattr(module, "gradient_checkpointing", False) for module in run.policy.model.modules())
    native.train(run)
    check_same_run(run.folder.path, straight)


# ------------------------------------------------------------------------------------------------ killing


class Mortal:
    """Wraps functions so that the process "dies" in one of them; what it would write after that fails too."""

    WRITES = (
        "os.replace",
        "shutil.rmtree",
        "torch.save",
        "pathlib.Path.write_text",
        "pathlib.Path.unlink",
        "pathlib.Path.mkdir",
        "mmrpt.corpus.files.JsonlWriter.write",
        "mmrpt.policy.QwenVLPolicy.write_files",
    )

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.dead, self.writes, self.die_in_write = patch, False, 0, 0
        for path in self.WRITES:
            self._wrap(path, self._write)

    def at(self, path: str, call: int, *, after: bool = False) -> None:
        """Dies in the given call (from 1) of a function, before or after its work."""
        count = 0

        def counted(function, *args, **kwargs):
            nonlocal count
            count += 1
            if count < call:
                return function(*args, **kwargs)
            if after:
                function(*args, **kwargs)
            self.die()

        self._wrap(path, counted)

    def die(self) -> None:
        self.dead = True
        raise Killed

    def _write(self, function, *args, **kwargs):
        if self.dead:
            raise Killed
        self.writes += 1
        if self.writes == self.die_in_write:
            self._tear(function, args)
            self.die()
        return function(*args, **kwargs)

    @staticmethod
    def _tear(function, args) -> None:
        """Half of what the call would have written."""
        if function.__name__ == "save":
            Path(args[1]).write_bytes(b"PK\x03\x04 half")
        elif function.__name__ == "write_text":
            args[0].write_bytes(args[1].encode()[: len(args[1]) // 2])
        elif function.__name__ == "write":
            line = json.dumps(args[1], ensure_ascii=False).encode()
            args[0]._file.write(line[: len(line) // 2])
            args[0]._file.flush()
        elif function.__name__ == "write_files":
            (args[1] / "model.safetensors").write_bytes(b"half")
        elif function.__name__ == "rmtree":
            for file in list(Path(args[0]).glob("*.json")):
                os.remove(file)

    def _wrap(self, path: str, around) -> None:
        owner, name = path.rsplit(".", 1)
        try:
            owner = importlib.import_module(owner)
        except ModuleNotFoundError:  # a class in a module
            module, cls = owner.rsplit(".", 1)
            owner = getattr(importlib.import_module(module), cls)
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            return around(function, *args, **kwargs)

        wrapped.__name__ = function.__name__
        self.patch.setattr(owner, name, wrapped)


def kill(settings, path: str, call: int, *, after: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mortal = Mortal(patch)
        mortal.at(path, call, after=after)
        with pytest.raises(Killed):
            finish(settings)


# (function, call of it in this life of the run, whether it did its work) of each death, one life after another.
DEATHS = {
    "the warm-up": {
        "while the vision tower trains": ("mmrpt.world.warm_start.vision_loss", 3, False),
        "between the vision tower and the warm-up": ("mmrpt.engines.native.supervised_backward", 1, False),
        "before the first checkpoint": ("mmrpt.engines.native.supervised_backward", 2, False),
        "between a backward pass and its step": ("mmrpt.optimiser.Optimiser.step", 4, False),
        "between a step and its metrics": ("mmrpt.optimiser.Optimiser.step", 2, True),
        "between checkpoints": ("mmrpt.engines.native.supervised_backward", 2, False),
        "right after a checkpoint": ("mmrpt.engines.phase.drop_older", 2, False),
        "between the last checkpoint and the end": ("mmrpt.engines.phase.save_checkpoint", 1, False),
    },
    "masking and reinforcement": {
        "while captions are scored": ("mmrpt.masking.pipeline.score_rows", 2, False),
        "between scores and masks": ("mmrpt.masking.select.choose_threshold", 1, False),
        "in a step of reinforcement": ("mmrpt.engines.rl_step.policy_loss", 4, False),
        "between a step of reinforcement and its log": ("mmrpt.engines.native.log_step", 2, False),
        "in a step on groups that waited": ("mmrpt.engines.native.train_on_groups", 1, False),
        "at the end of reinforcement": ("mmrpt.engines.native.log_step", 4, True),
    },
    "the control and the evaluation": {
        "in the control": ("mmrpt.engines.native.supervised_backward", 5 + 4, False),
        "between two models' evaluation": ("mmrpt.engines.native.evaluate_policy", 2, False),
        "in an evaluation": ("mmrpt.held_out.answer_samples", 5, False),
        "among the pictures": ("mmrpt.engines.native.write_images", 1, False),
    },
}


@pytest.mark.parametrize("phases", DEATHS)
def test_a_killed_run_ends_as_if_nothing_had_been(straight, tmp_path, phases):
    settings = settings_in(tmp_path)
    for path, call, after in DEATHS[phases].values():
        kill(settings, path, call, after=after)
    finish(settings)
    check_same_run(settings.run_dir, straight)


def test_killed_while_rollouts_are_sampled(straight, tmp_path):
    """In the fourth round, with a group that waits at the checkpoint; the round ends one epoch and begins the next."""
    settings = settings_in(tmp_path)
    kill(settings, "mmrpt.engines.rl_step.collect_round", 4)
    checkpoint = max((settings.run_dir / "checkpoints").glob("rl-*"))
    state = torch.load(checkpoint / "trainer_state.pt", weights_only=True)
    assert (checkpoint.name, state["round"], len(state["buffer"])) == ("rl-4", 3, 1)
    items = range(3 * settings.rollout.prompts, 4 * settings.rollout.prompts)
    size = len(read_jsonl(straight / "masked.jsonl"))
    assert size == 12 and items[0] // size < items[-1] // size
    finish(settings)
    check_same_run(settings.run_dir, straight)


def test_killed_again_and_again(straight, tmp_path, seed):
    """Dies in the middle of a write, every few writes, each torn, until it is through."""
    settings, rng = settings_in(tmp_path), np.random.default_rng(seed)
    deaths = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            mortal = Mortal(patch)
            mortal.die_in_write = int(rng.integers(15, 60))
            try:
                finish(settings)
                break
            except Killed:
                deaths += 1
                assert deaths < 40, f"seed {seed}: no progress"
    assert deaths >= 2, f"seed {seed}: only {deaths} deaths, {mortal.writes} writes in the last life"
    check_same_run(settings.run_dir, straight)


def test_a_finished_run_is_left_as_it_is(straight):
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}
    finish(settings_in(straight.parent))
    changed = {p.name for p, at in before.items() if p.stat().st_mtime_ns != at}
    assert changed <= {"environment.json", "seconds.json", "evaluation.json"}, changed  # wall times alone
    assert {p for p in straight.rglob("*") if p.is_file()} == set(before)


def test_another_seed_is_another_run(straight, tmp_path):
    settings = settings_in(tmp_path, "seed=1", "control.kinds=[]", "evaluation.samples=2")  # and no control
    finish(settings)
    for phase in ("warmup", "rl"):
        a, b = (load_file(f / "checkpoints" / phase / "model.safetensors") for f in (settings.run_dir, straight))
        assert not any(torch.equal(a[name], b[name]) for name in b if a[name].ndim > 1), phase
    assert not (settings.run_dir / "checkpoints" / "control").exists()


def test_checkpoints_do_not_change_the_run(straight, tmp_path):
    """How often a run saves leaves no trace in its weights."""
    settings = settings_in(tmp_path, "checkpoint_every=1000")
    finish(settings)
    check_same_run(settings.run_dir, straight)


def test_adapters_are_resumed_to_the_same_bits(tmp_path):
    """The reference of rl.kl_coef and the control begin with the start model, whose adapters are drawn again."""
    pytest.importorskip("peft", reason="needs peft: pip install 'mmrpt[lora]'")
    make_policy().write_files(tmp_path / "model")
    lora = (f"model.path={tmp_path / 'model'}", "model.lora.rank=2", "rl.optimiser.lr=1e-2", "rl.kl_coef=0.1")
    runs = [settings_in(tmp_path / name, *lora, "warmup.steps=0") for name in ("straight", "killed")]
    finish(runs[0])
    kill(runs[1], "mmrpt.engines.native.log_step", 4)  # a step after the checkpoint of the second
    kill(runs[1], "mmrpt.engines.native.supervised_backward", 4)  # in the control
    finish(runs[1])
    folders = [settings.run_dir for settings in runs]
    check_same_run(folders[1], folders[0], ("rl", "control"), "adapter_model.safetensors")
    weights = [load_file(folders[0] / "checkpoints" / name / "adapter_model.safetensors") for name in ("rl", "control")]
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# ------------------------------------------------------------------------------------------------ a real process


def child(arguments: list[str]) -> None:
    """What the killed process runs: it does not live past the third step of reinforcement."""
    calls = count(1)

    def last_words(*args, **options) -> None:
        log_step(*args, **options)
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch_outside_world(patch)
        patch.setattr("mmrpt.engines.native.log_step", last_words)
        sys.exit(main(arguments))


def test_a_process_that_gets_sigkill_is_resumed_by_the_command_line(straight, tmp_path):
    arguments = [f"output={tmp_path}", "name=run", *SMALL_RUN]
    code = f"from tests.trainer.test_resume import child; child({arguments!r})"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"vision_pretraining", "warmup", "rl-2"}
    assert main(["--resume", f"output={tmp_path}", "name=run"]) == 0
    check_same_run(tmp_path / "run", straight)
