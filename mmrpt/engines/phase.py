"""One phase of gradient descent: where it starts, what it logs, when it saves and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    "({phase}.optimiser.lr), or look for rewards and weights that are not finite."
)


class Phase:
    """The steps of a phase that are left to do, with its optimiser; everything is restored from the last checkpoint.

    `state` is what a checkpoint holds besides the weights: "step", "optimiser", the counters of steps that taught
    nothing, and what the phase itself adds (`steps(extra)`).
    """

    def __init__(
        self, run: Run, name: str, steps: int, optimiser: OptimiserSettings, *, vision_frozen_steps: int = 0
    ) -> None:
        self.run, self.name, self.total = run, name, steps
        self.state: dict[str, Any] = {"step": 0}
        checkpoints = run.folder.checkpoints
        self.done = steps == 0 or (checkpoints / name).exists()
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
        start, every = self.state["step"], self.run.settings.checkpoint_every
        self.bar = tqdm(range(start, self.total), desc=self.name, unit="step", initial=start, total=self.total)
        with self.run.stop.at_a_step():
            for step in self.bar:
                yield step
                if self.run.stop.requested or (step + 1) % every == 0:
                    self._save(step + 1, extra())
                    saved(step + 1)
                    self.run.stop.check(f"{self.name} step {step + 1}")
        if not self.taught:
            raise RunError(f"{self.name}: not one of its {self.total} steps taught anything. {self._why()}")
        folder = self.run.folder.checkpoints / self.name
        save_checkpoint(folder, self.run.policy, {"step": self.total})
        drop_older(self.run.folder.checkpoints, self.name, keep=0)

    def note(self, step: int, *, groups: int | None = None, skipped: bool = False) -> None:
        """Counts the step; raises RunError after `patience` steps in a row without a group or a finite gradient."""
        self.problem = NO_SIGNAL if groups == 0 else NOT_FINITE if skipped else ""
        self.idle = self.idle + 1 if self.problem else 0
        self.taught += not self.problem
        if self.idle >= self.run.settings.patience:
            raise RunError(f"{self.name}, step {step}: {self._why()}")

    def _why(self) -> str:
        return (self.problem or NO_SIGNAL).format(count=self.idle, phase=self.name)

    def _save(self, step: int, extra: dict[str, Any]) -> None:
        state = {"step": step, "optimiser": self.optimiser.state_dict(), "idle": self.idle, "taught": self.taught}
        save_checkpoint(self.run.folder.checkpoints / f"{self.name}-{step}", self.run.policy, {**state, **extra})
        drop_older(self.run.folder.checkpoints, self.name, keep=KEPT)
