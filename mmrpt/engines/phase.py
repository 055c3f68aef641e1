"""One phase of gradient descent: where it starts, what it logs, when it saves and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from tqdm import tqdm

from mmrpt.checkpoint import KEPT, drop_older, load_newest, save_checkpoint
from mmrpt.engines.run import BEGINS_WITH, Run
from mmrpt.optimiser import Optimiser
from mmrpt.run_folder import RunError
from mmrpt.settings import OptimiserSettings

NO_SIGNAL = (
    "no group of rollouts had both right and wrong answers in {count} steps in a row, so nothing was learned: look at "
    "accuracy and format in metrics.jsonl. Where both are 0, warm up longer (warmup.steps), allow longer answers "
    "(rollout.max_new_tokens) or use a model that knows the answer's form; where accuracy is near 1, mask harder words."
)
NOT_FINITE = (
    "the gradient was not finite in {count} steps in a row, so nothing was learned: lower the learning rate "
    "({lr}), or look for rewards and weights that are not finite."
)
LR_OF = {"vision_pretraining": "demo.vision_lr", "warmup": "warmup.optimiser.lr"}  # of the others: RL's


class Phase:
    """The steps of a phase that are left to do, with its optimiser; everything is restored from the last checkpoint.

    It ends after `steps` steps or, where `seconds` are given, when its steps have taken as many (`timed`).
    `state` is what a checkpoint holds besides the weights: "step", "optimiser", the seconds "spent", the counters of
    steps that taught nothing, and what the phase itself adds (`steps(extra)`).
    """

    def __init__(
        self,
        run: Run,
        name: str,
        steps: int,
        optimiser: OptimiserSettings,
        *,
        seconds: float | None = None,
        vision_frozen_steps: int = 0,
    ) -> None:
        self.run, self.name, self.seconds = run, name, seconds
        self.total = steps if seconds is None else None
        self.state: dict[str, Any] = {"step": 0}
        checkpoints = run.folder.checkpoints
        self.done = (self.total if seconds is None else seconds) == 0 or (checkpoints / name).exists()
        if self.done:
            drop_older(checkpoints, name, keep=0)  # still there after a kill between the end and its clean-up
            return
        saved = load_newest(checkpoints, name, run.policy)
        if saved is None:
            run.load(BEGINS_WITH[name])
        else:
            self.state = saved
        run.policy.model.train()
        self.optimiser = Optimiser(run.policy.model, optimiser, vision_frozen_steps=vision_frozen_steps)
        if "optimiser" in self.state:
            self.optimiser.load_state_dict(self.state["optimiser"])
        self.idle, self.taught = self.state.get("idle", 0), self.state.get("taught", 0)
        self.spent = self.state.get("spent", 0.0)
        self.problem = ""
        run.folder.rewind(name, self.state["step"])

    def steps(
        self, extra: Callable[[], dict[str, Any]] = dict, saved: Callable[[int], None] = lambda steps: None
    ) -> Iterator[int]:
        """Each step that is left. Between them the phase saves every `checkpoint_every` steps, and where the process
        was asked to end; after the last it leaves checkpoints/<phase>. `extra()` is saved besides, and `saved(n)` is
        called when a checkpoint holds n steps."""
        if self.done:
            return
        done, every = self.state["step"], self.run.settings.checkpoint_every
        self.bar = tqdm(self._left(done), desc=self.name, unit="step", initial=done, total=self.total)
        with self.run.stop.at_a_step():
            for step in self.bar:
                yield step
                done = step + 1
                if self.run.stop.requested or done % every == 0:
                    self._save(done, extra())
                    saved(done)
                    self.run.stop.check(f"{self.name} step {done}")
        if not self.taught:
            raise RunError(f"{self.name}: not one of its {done} steps taught anything. {self._why()}")
        folder = self.run.folder.checkpoints / self.name
        save_checkpoint(folder, self.run.policy, {"step": done, "spent": self.spent})
        drop_older(self.run.folder.checkpoints, self.name, keep=0)

    def _left(self, done: int) -> Iterator[int]:
        for step in count(done):
            if step >= self.total if self.seconds is None else self.spent >= self.seconds:
                return
            yield step

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The training of a step, whose seconds count; checkpoints, logs and validation stay outside."""
        start = time.perf_counter()
        yield
        self.spent += time.perf_counter() - start

    def expected(self, step: int) -> float:
        """How many steps the phase will have, as the learning rate needs it. Of one that ends by seconds: as many as
        there would be at the pace of the steps before this one, so that its share of steps is its share of seconds."""
        if self.seconds is None:
            return self.total
        return step * self.seconds / self.spent if self.spent else 1

    def note(self, step: int, *, groups: int | None = None, skipped: bool = False) -> None:
        """Counts the step; raises RunError after `patience` steps in a row without a group or a finite gradient."""
        self.problem = NO_SIGNAL if groups == 0 else NOT_FINITE if skipped else ""
        self.idle = self.idle + 1 if self.problem else 0
        self.taught += not self.problem
        if self.idle >= self.run.settings.patience:
            raise RunError(f"{self.name}, step {step}: {self._why()}")

    def _why(self) -> str:
        return (self.problem or NO_SIGNAL).format(count=self.idle, lr=LR_OF.get(self.name, "rl.optimiser.lr"))

    def _save(self, step: int, extra: dict[str, Any]) -> None:
        counters = {"step": step, "spent": self.spent, "idle": self.idle, "taught": self.taught}
        state = counters | {"optimiser": self.optimiser.state_dict()}
        save_checkpoint(self.run.folder.checkpoints / f"{self.name}-{step}", self.run.policy, {**state, **extra})
        drop_older(self.run.folder.checkpoints, self.name, keep=KEPT)
