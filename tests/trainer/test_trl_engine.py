"""engine=trl: what it honours and refuses, whole runs on one and two processes, and groups that are sampled again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="TRL is not installed: pip install 'mmrpt[trl]'")

from trl import GRPOConfig  # noqa: E402

from mmrpt.corpus import read_jsonl, write_jsonl  # noqa: E402
from mmrpt.engines.trl_options import grpo_options  # noqa: E402
from mmrpt.integrations.trl import PerceptionGRPOTrainer, masked_dataset, processor_of  # noqa: E402
from mmrpt.integrations.trl_refill import replaced_rows  # noqa: E402
from mmrpt.policy import Policy  # noqa: E402
from mmrpt.settings import SettingsError, load_settings  # noqa: E402
from mmrpt.settings.scale import ANY_REWARD  # noqa: E402
from mmrpt.train import main  # noqa: E402
from tests.trainer.conftest import SMALL_RUN, ColourPairs, make_looking_policy, masked_colour  # noqa: E402
from tests.trainer.torchrun import torchrun  # noqa: E402

# The tiny model trains with captions mixed in by default, which TRL's engine does not.
TRL = ("engine=trl", "rl.caption_weight=0", "control.kinds=[]", "rollout.prompts=12")
RUN = (
    *SMALL_RUN,
    *TRL[:3],
    "rollout.prompts=2",
    "rollout.group_size=4",
    "rl.steps=2",
    "checkpoint_every=1",
    "rl.min_accuracy=0",
    "rl.max_accuracy=1",
    f"reward.custom={{{ANY_REWARD}: 1}}",
    "name=mine",
)


# ---- settings ----


def options(*overrides: str, processes: int = 1) -> dict:
    return grpo_options(load_settings(None, [*TRL, *overrides]), "folder", processes)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"loss_type": "dapo", "num_generations": 8, "epsilon": 0.2, "epsilon_high": 0.28, "delta": 3.0}),
        (["rl.aggregation=sequence_mean"], {"loss_type": "grpo"}),
        (["rl.advantage=dr_grpo"], {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        (["rl.loss=cispo", "rl.clip_low=1", "rl.dual_clip=null"], {"loss_type": "cispo", "epsilon_high": 1.28}),
        (["rl.kl_coef=0.1", "rollout.temperature=0.7"], {"beta": 0.1, "temperature": 0.7}),
        (["rl.optimiser.final_fraction=1"], {"lr_scheduler_type": "constant_with_warmup"}),
        (["reward.format=0.4"], {"reward_weights": [0.4, 1.0, 0.1, 0.2]}),
        (["model.compute=bfloat16"], {"bf16": True}),
        (["trl={use_vllm: true, vllm_mode: colocate}"], {"use_vllm": True, "vllm_mode": "colocate"}),
        (["rollout.prompts=24"], {"steps_per_generation": 2, "gradient_accumulation_steps": 1}),
        (["trl={per_device_train_batch_size: 8}"], {"gradient_accumulation_steps": 12}),
    ],
)
def test_settings_become_those_of_trl(overrides, expected):
    found = options(*overrides)
    assert {name: found[name] for name in expected} == expected
    assert found.keys() <= GRPOConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5, 8])
def test_a_step_has_the_same_rows_on_any_number_of_processes(processes):
    try:
        found = options(processes=processes)
    except SettingsError as error:
        assert 12 % processes, str(error)
        return
    rows = found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] * processes
    assert rows == 12 * 8 and found["per_device_train_batch_size"] % 8 == 0


def test_what_trl_cannot_do_is_refused_in_one_message():
    wrong = ["rl.caption_weight=0.3", "rl.entropy_coef=-0.06", "perception.kind=mass", "rl.loss=gspo"]
    with pytest.raises(SettingsError) as error:
        options(*wrong, "rollout.prompts=13", "control.kinds=[grpo]", "evaluation.every=5")
    for name in ("caption_weight", "entropy_coef", "perception.kind", "rl.loss", "prompts", "grpo", "evaluation.every"):
        assert name in str(error.value)
    assert "engine=native" in str(error.value)
    with pytest.raises(SettingsError, match="beta"):
        options("trl={beta: 0.1}")
    with pytest.raises(SettingsError, match=r"control\.kinds"):
        options("control.kinds=[captions]", processes=2)
    with pytest.raises(SettingsError, match="engine=trl"):
        load_settings(None, ["trl={beta: 0.1}"])


# ---- groups that are sampled again ----


def batch_of(rows: int, prompt: int, completion: int, first: int) -> dict:
    """A generation batch whose every entry tells which row it belongs to."""
    ids = torch.arange(first, first + rows)
    sizes = [4 * (1 + i % 3) for i in range(rows)]
    wide = ids[:, None]
    return {
        "prompt_ids": wide.expand(rows, prompt).clone(),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": wide.expand(rows, completion).clone(),
        "completion_mask": torch.ones(rows, completion, dtype=torch.long),
        "mm_token_type_ids": wide.expand(rows, prompt + completion).clone(),
        "old_per_token_logps": -wide.expand(rows, completion).float(),
        "importance_sampling_ratio": wide.float(),
        "advantages": ids.float(),
        "num_items_in_batch": torch.tensor(rows * completion),
        "pixel_values": torch.cat([torch.full((n, 2), float(i)) for i, n in zip(ids, sizes, strict=True)]),
        "image_grid_thw": torch.tensor([[1, 2, n // 2] for n in sizes]),
        "num_images": [1] * rows,
    }


@pytest.mark.parametrize(("prompt", "completion"), [(5, 3), (2, 6), (3, 3), (4, 1)])
def test_replaced_rows_are_whole_rows_of_the_other_batch(prompt, completion):
    old, new = batch_of(6, 3, 3, 10), batch_of(6, prompt, completion, 50)
    found = replaced_rows(old, [0, 1, 4], new, [2, 3, 5], pad_token_id=9)
    owners = [52, 53, 12, 13, 55, 15]
    width, long = max(3, prompt), max(3, completion)
    assert found["advantages"].tolist() == owners
    pieces = found["pixel_values"].split(found["image_grid_thw"].prod(-1).tolist())
    for row, owner in enumerate(owners):
        p, c = (prompt, completion) if owner >= 50 else (3, 3)
        assert found["prompt_ids"][row].tolist() == [9] * (width - p) + [owner] * p
        assert found["prompt_mask"][row].tolist() == [0] * (width - p) + [1] * p
        assert found["completion_ids"][row].tolist() == [owner] * c + [9] * (long - c)
        assert found["completion_mask"][row].tolist() == [1] * c + [0] * (long - c)
        assert found["mm_token_type_ids"][row].tolist() == [0] * (width - p) + [owner] * (p + c) + [0] * (long - c)
        assert found["old_per_token_logps"][row].tolist() == [-owner] * c + [0] * (long - c)
        assert found["importance_sampling_ratio"][row].tolist() == [owner]
        assert pieces[row].unique().tolist() == [owner]
    assert replaced_rows(old, [], new, [], 9) is old
    with pytest.raises(ValueError, match="as many"):
        replaced_rows(old, [0], new, [], 9)


class Rewarded(PerceptionGRPOTrainer):
    """Of a round, the groups whose number is in `teaches[round]` get unequal rewards."""

    teaches: tuple[set[int], ...] = ()

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.round = getattr(self, "round", -1) + 1
        seen = [row["id"] for row in inputs]
        self.seen = [*getattr(self, "seen", []), seen]
        values = [
            float(i % 2) if i // self.num_generations in self.teaches[self.round] else 1.0 for i in range(len(inputs))
        ]
        return torch.tensor(values)[:, None]


def rounds_of(teaches, tmp_path, max_rounds):
    policy, pairs = make_looking_policy(), ColourPairs()
    write_jsonl(tmp_path / "masked.jsonl", [masked_colour(pairs, i).to_json() for i in range(20)])
    dataset = masked_dataset(tmp_path / "masked.jsonl", pairs)
    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 12,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Rewarded(
            policy.model,
            [lambda completions, **_: [0.0] * len(completions)],
            args=GRPOConfig(**arguments),
            train_dataset=dataset,
            processing_class=processor_of(policy),
            max_rounds=max_rounds,
        )
    trainer.teaches = teaches
    trainer.model.train()
    rows = [dataset[i] for i in (0, 1, 2) for _ in range(4)]
    return trainer, trainer._generate_and_score_completions(rows)


def test_groups_without_signal_are_sampled_again_with_other_prompts(tmp_path):
    trainer, out = rounds_of(({1}, set(), {0, 2}), tmp_path, max_rounds=4)
    assert len(trainer.seen) == 3 and len({*trainer.seen[1], *trainer.seen[2]}) == 6
    good = (out["advantages"] != 0).view(3, -1).any(-1)
    assert good.tolist() == [True] * 3
    assert trainer._metrics["train"]["groups/rounds"] == [3] and trainer._metrics["train"]["groups/with_signal"] == [1]
    assert int(out["num_items_in_batch"]) == int(out["completion_mask"].sum())


def test_groups_that_stay_without_signal_are_out_of_the_normaliser(tmp_path):
    for rounds, teaches in ((1, ({1},)), (2, ({1}, set()))):
        trainer, out = rounds_of(teaches, tmp_path, max_rounds=rounds)
        assert len(trainer.seen) == rounds
        assert (out["advantages"] != 0).view(3, -1).any(-1).tolist() == [False, True, False]
        assert int(out["num_items_in_batch"]) == int(out["completion_mask"][4:8].sum())
    trainer, out = rounds_of(({1},), tmp_path, max_rounds=None)  # TRL's own
    assert int(out["num_items_in_batch"]) == int(out["completion_mask"].sum())


# ---- whole runs ----


def test_a_run_by_trl_has_everything_that_a_run_has(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = ["control.kinds=[captions]", "rollout.prompts=4"]  # a round serves two steps
        assert main([f"output={tmp_path}", *RUN, *more]) == 0, capsys.readouterr().err
    folder = tmp_path / "mine"
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "rl"]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert {
            "loss",
            "lr",
            "reward",
            "accuracy",
            "response_length",
            "perception_mean",
            "rounds",
        } <= row.keys() or row["step"]
    assert any(row["grad_norm"] > 0 for row in rows) and not (folder / "trl").exists()
    models = {row["model"] for row in json.loads((folder / "evaluation.json").read_text())["rows"]}
    assert models == {"warmup", "rl", "control"} and (folder / "report.md").stat().st_size > 1000
    before, after = (Policy.load(folder / "checkpoints" / name).model.state_dict() for name in ("warmup", "rl"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_run_that_was_cut_off_in_rl_ends_with_the_same_weights(tmp_path, monkeypatch):
    from mmrpt.engines import trl as engine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([f"output={tmp_path}", *RUN]) == 0
        asked = engine.Log.on_step_end

        def stops_after_one(self, args, state, control, **more):
            self.run.stop.requested = state.global_step == 1
            return asked(self, args, state, control, **more)

        monkeypatch.setattr(engine.Log, "on_step_end", stops_after_one)
        with pytest.raises(SystemExit) as stopped:
            main([f"output={tmp_path / 'cut'}", *RUN])
        assert stopped.value.code == 143 and not (tmp_path / "cut" / "mine" / "checkpoints" / "rl").exists()
        monkeypatch.undo()
        assert main([f"output={tmp_path / 'cut'}", "name=mine", "--resume"]) == 0
    whole, again = (
        Policy.load(p / "mine" / "checkpoints" / "rl").model.state_dict() for p in (tmp_path, tmp_path / "cut")
    )
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name
    steps = [row["step"] for row in read_jsonl(tmp_path / "cut" / "mine" / "metrics.jsonl") if row["phase"] == "rl"]
    assert steps == [0, 1]


ON_SEVERAL = """
import os, sys
from mmrpt.engines import trl
from mmrpt.train import main
from tests.trainer.trl_processes import fsdp_also_on_a_cpu
fsdp_also_on_a_cpu()
if os.environ.get("DIES") == os.environ["RANK"]:
    trl.Log.on_step_end = lambda self, args, state, control, **_: os._exit(9)
sys.exit(main(sys.argv[1:]))
"""


def run_on(processes: int, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return torchrun(processes, "--no-python", sys.executable, "-c", ON_SEVERAL, *arguments, **variables)


new_transformers = int(transformers.__version__.split(".")[0]) >= 5


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize(
    "mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.skipif(not new_transformers, reason="transformers 4"))]
)
def test_two_processes_make_one_run(mode, tmp_path):
    if mode == "fsdp" and not new_transformers:
        pytest.skip("transformers 4 asks accelerate for FSDP in a way that needs a GPU")
    child = run_on(2, f"output={tmp_path}", *RUN, *(["trl={fsdp: true}"] if mode == "fsdp" else []))
    folder = tmp_path / "mine"
    assert child.returncode == 0 and (folder / "report.md").is_file(), child.stdout[-6000:]
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "rl"]
    assert [row["step"] for row in rows] == [0, 1] and all(row["grad_norm"] > 0 for row in rows)
    before, after = (Policy.load(folder / "checkpoints" / name).model.state_dict() for name in ("warmup", "rl"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([f"output={tmp_path / 'one'}", *RUN, "rl.steps=0"]) == 0
    answers = [read_jsonl(path / "answers.jsonl") for path in (folder, tmp_path / "one" / "mine")]
    first, again = ([row for row in rows if row["model"] == "warmup"] for rows in answers)
    assert first and first == again and not (folder / "parts").exists()
    assert (folder / "masked.jsonl").read_bytes() == (tmp_path / "one" / "mine" / "masked.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_a_process_that_dies_ends_the_job_and_the_run_goes_on(tmp_path):
    """On three processes, of which each step's six completions are two each."""
    run = [*RUN[:-1], "rollout.group_size=2", "rollout.prompts=3", "rl.groups_per_step=3", "name=mine"]
    killed = run_on(3, f"output={tmp_path}", *run, DIES="1")
    assert killed.returncode != 0 and (tmp_path / "mine" / "masked.jsonl").is_file()
    assert not (tmp_path / "mine" / "checkpoints" / "rl").exists()
    again = run_on(3, f"output={tmp_path}", *run)
    assert again.returncode == 0 and (tmp_path / "mine" / "report.md").is_file(), again.stdout[-6000:]


def test_several_processes_of_the_native_engine_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([f"output={tmp_path}", *SMALL_RUN, "name=other"]) == 2
    assert "engine=trl" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main([f"output={tmp_path}", *RUN[:-1]]) == 2
    assert "name=" in capsys.readouterr().err


def test_what_trl_cannot_do_is_told_before_there_is_a_folder(tmp_path, capsys):
    assert main([f"output={tmp_path}", "engine=trl", "name=mine"]) == 2
    assert "rl.caption_weight" in capsys.readouterr().err and not (tmp_path / "mine").exists()


def test_a_machine_without_trl_is_told_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([f"output={tmp_path}", *RUN]) == 2
    assert "mmrpt[trl]" in capsys.readouterr().err and not (tmp_path / "mine").exists()


def test_settings_of_trl_travel_through_a_file(tmp_path):
    from mmrpt.settings import save_settings

    settings = load_settings(None, [*TRL, "trl={fsdp: true, vllm_mode: server}"])
    save_settings(settings, tmp_path / "config.yaml")
    assert dataclasses.asdict(load_settings(tmp_path / "config.yaml")) == dataclasses.asdict(settings)
