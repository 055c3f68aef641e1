"""The whole method with RL by TRL's GRPOTrainer, on one process or on all that torchrun started.

Every process scores its share of the captions, trains, and answers its share of the questions; the first alone warms up
and reports, and writes what is in the run's folder. A phase whose result is there is read back, and RL goes on from
TRL's last checkpoint.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig

from mmrpt.checkpoint import save_checkpoint
from mmrpt.engines import native
from mmrpt.engines.run import Run, start_policy
from mmrpt.engines.trl_options import grpo_options
from mmrpt.held_out import held_out_questions
from mmrpt.integrations.trl import PerceptionGRPOTrainer, fused_head, masked_dataset, processor_of
from mmrpt.masking.select import MASKED
from mmrpt.rewards import RewardFunction, combine_rewards, completion_text
from mmrpt.sharded_evaluation import Parts

# What TRL logs, by the names that metrics.jsonl has.
LOGGED = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "reward": "reward",
    "rewards/exact/mean": "accuracy",
    "rewards/format/mean": "format",
    "completions/mean_length": "response_length",
    "entropy": "entropy_mean",
    "perception/score": "perception_mean",
    "perception/kept": "kept_token_rate",
    "groups/rounds": "rounds",
    "step_time": "seconds_step",
}


def train(run: Run) -> Path | None:
    """Runs every phase that is not done yet; the path of the report, on the first process."""
    processes = PartialState()
    first_alone(processes, lambda: native.warm_start(run))
    with timed(run, processes, "scoring"):
        samples = native.mask(run, processes.process_index, processes.num_processes, processes.wait_for_everyone)
    with timed(run, processes, "rl"):
        reinforce(run, processes)
    first_alone(processes, lambda: native.train_controls(run, samples))
    with timed(run, processes, "evaluation"):
        evaluate(run, processes)
    return native.report(run) if processes.is_main_process else None


def first_alone(processes: PartialState, work: Callable[[], Any]) -> None:
    """The first process does the work, and the others go on when it is done."""
    if processes.is_main_process:
        work()
    processes.wait_for_everyone()


def timed(run: Run, processes: PartialState, phase: str) -> AbstractContextManager[None]:
    """The first process adds the phase's wall time to seconds.json."""
    return run.folder.timed(phase) if processes.is_main_process else nullcontext()


def evaluate(run: Run, processes: PartialState) -> None:
    """Every process answers its share of the questions to each model; the first joins and writes them."""
    settings, sampled = run.settings, run.settings.evaluation.sampled
    if (run.folder / "evaluation.json").exists():
        return
    sets = held_out_questions(run.sources.held_out, settings)
    parts = Parts(run.folder / "parts", processes.process_index, processes.num_processes)
    keys = {}
    for phase in native.models(run):
        run.load(phase)
        keys[phase] = parts.answer(run.policy, sets, settings, sampled=sampled)
    processes.wait_for_everyone()

    def join() -> None:
        answered = [parts.joined(key, phase, sets, settings, sampled=sampled) for phase, key in keys.items()]
        native.write_evaluation(run, answered)
        parts.remove()

    first_alone(processes, join)


class Trainer(PerceptionGRPOTrainer):
    """Groups count as the settings say: by their share of right answers, besides unequal rewards."""

    def __init__(self, *args: Any, limits: tuple[float, float], right: Reward, **kwargs: Any) -> None:
        self.limits, self.right = limits, right
        super().__init__(*args, **kwargs)

    def groups_with_signal(self, out: Mapping[str, Any]) -> list[bool]:
        unequal = super().groups_with_signal(out)
        right = torch.tensor(self.right.last).view(-1, self.num_generations).mean(-1).tolist()
        low, high = self.limits
        return [has and low <= share <= high for has, share in zip(unequal, right, strict=True)]


class Reward:
    """A term of the reward as the native engine computes it: of the text alone, checked, sync or async. `last` is what
    it said of the last round."""

    def __init__(self, name: str, custom: Mapping[str, RewardFunction]) -> None:
        self.term, self.custom = name, custom
        self.__name__ = name  # which TRL logs
        self.last: list[float | None] = []

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        _, terms = combine_rewards({self.term: 1.0}, texts, self.custom, **columns)
        self.last = terms[self.term]
        return self.last


class Log(TrainerCallback):
    """Rows of metrics.jsonl, and an end where the process was asked for one."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.run.folder.rewind("rl", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            row = {name: logs[key] for key, name in LOGGED.items() if key in logs}
            if "groups/with_signal" in logs:  # not at a step that goes on with the last round
                row["groups"] = round(logs["groups/with_signal"] * self.run.settings.rl.groups_per_step)
            row["skipped"] = not math.isfinite(logs["grad_norm"])
            self.run.folder.metrics("rl", state.global_step - 1, **row)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        asked = torch.tensor(float(self.run.stop.requested), device=args.device)
        if dist.is_initialized():  # all processes must stop at the same step
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked:
            self.run.stop.requested = control.should_save = control.should_training_stop = True
        return control


def reinforce(run: Run, processes: PartialState) -> None:
    """RL of the warm start on the masked samples; leaves checkpoints/rl."""
    done = run.folder.checkpoints / "rl"
    if run.settings.rl.steps == 0 or done.exists():
        return
    run.load("warmup")
    run.policy.model.train()
    started, folder = time.perf_counter(), run.folder / "trl"
    trainer = make_trainer(run, processes.num_processes)
    with run.stop.at_a_step(), fused_head():
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    run.stop.check(f"rl step {trainer.state.global_step}")
    device = run.policy.device
    save(run, trainer, {"step": trainer.state.global_step, "spent": time.perf_counter() - started}, done)
    del trainer  # and with it the moments and, where they are sharded, the weights
    gc.collect()
    run.policy.model.to(device)
    first_alone(processes, lambda: shutil.rmtree(folder, ignore_errors=True))  # TRL's checkpoints, with the moments


def make_trainer(run: Run, processes: int) -> Trainer:
    settings = run.settings
    rewards = {name: Reward(name, run.rewards) for name in settings.reward.weights()}
    on_cpu = {"use_cpu": True} if run.policy.device.type == "cpu" else {}
    return Trainer(
        run.policy.model,
        list(rewards.values()),
        args=GRPOConfig(**grpo_options(settings, str(run.folder / "trl"), processes), **on_cpu),
        train_dataset=masked_dataset(run.folder / MASKED, run.sources.train, settings.prompts),
        processing_class=getattr(run.policy, "processor", None) or processor_of(run.policy),
        callbacks=[Log(run)],
        perception=settings.perception,
        max_rounds=settings.rl.max_rounds,
        limits=(settings.rl.min_accuracy, settings.rl.max_accuracy),
        right=rewards["exact"],
    )


def save(run: Run, trainer: Trainer, state: dict[str, Any], folder: Path) -> None:
    """checkpoints/rl, of weights gathered from all processes where they are sharded; the optimiser is TRL's alone."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # every process takes part
        policy = start_policy(run.settings, run.sources, torch.device("cpu"))
        run.policy = policy  # the sharded model is of no use to what follows
        if trainer.accelerator.is_main_process:
            policy.model.load_state_dict(weights)
    if trainer.accelerator.is_main_process:
        save_checkpoint(folder, run.policy, state)
