"""Validation during RL: accuracy on pairs that are neither trained nor evaluated on, and the best checkpoint by it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrpt.checkpoint import load_state, save_checkpoint
from mmrpt.corpus import read_jsonl
from mmrpt.held_out import evaluate_policy, held_out_samples
from mmrpt.policy import Policy
from mmrpt.run_folder import RunError, RunFolder
from mmrpt.settings import Settings
from mmrpt.stopwatch import Stopwatch
from mmrpt.types import MaskedSample, PairSource

VALIDATION = "validation.jsonl"
BEST = "rl-best"  # of checkpoints/


class Validation:
    """Asks the policy every `evaluation.every` steps of RL and after the last, and keeps the weights of the best time.

    New best weights are `rl-best.new` until a checkpoint of the run holds their step, and then take the place of
    rl-best. So a run that was cut off never goes on beside the best weights of steps that it has yet to take again.
    """

    def __init__(self, policy: Policy, pairs: PairSource | None, folder: RunFolder, settings: Settings) -> None:
        """`pairs` None: never validates. Raises RunError where no question can be made of them."""
        self.policy, self.folder, self.settings = policy, folder, settings
        self.sets: dict[str, tuple[PairSource, list[MaskedSample]]] = {}
        self.rows: list[dict[str, Any]] = []
        if pairs is None:
            return
        samples = held_out_samples(pairs, settings.data.validation, mask=settings.prompts.mask, seed=settings.seed)
        if not samples:
            raise RunError("no word of the pairs for validation can be asked: bring captions that say something.")
        self.sets["validation"] = pairs, samples
        if (folder / VALIDATION).exists():
            self.rows += read_jsonl(folder / VALIDATION)

    def after(self, step: int, watch: Stopwatch) -> None:
        """Validates the weights of `step` where it is their turn, and writes a row of validation.jsonl."""
        done, total = step + 1, self.settings.rl.steps
        if not self.sets or (done % self.settings.evaluation.every and done < total):
            return
        with watch.part("validation"):
            found, _ = evaluate_policy(self.policy, "rl", self.sets, self.settings)
            row = {"step": step, "count": found[0]["count"]} | {cell["condition"]: cell["accuracy"] for cell in found}
            best = best_of([*self.rows, row])
            if best is row:
                save_checkpoint(self._new, self.policy, {"step": done})
        self.rows.append(row | {"best_step": best["step"]})
        self.folder.write(VALIDATION, self.rows[-1])
        self.folder.trackers.log("validation", step, self.rows[-1])

    def settle(self, saved: int) -> None:
        """Where the run's checkpoints hold `saved` steps: new best weights are kept, or dropped with their steps."""
        new = self._new
        if not new.exists():
            return
        place = BEST if load_state(new)["step"] <= saved else f"{new.name}.tmp"
        shutil.rmtree(self.folder.checkpoints / place, ignore_errors=True)
        os.replace(new, self.folder.checkpoints / place)
        if place != BEST:
            shutil.rmtree(self.folder.checkpoints / place)

    def summary(self) -> str:
        """What a person is told at the end of RL."""
        best = best_of(self.rows)
        return (
            f"validation: best after {best['step'] + 1} of {self.settings.rl.steps} steps, {100 * best['image']:.1f} % "
            f"with the image: {self.folder.checkpoints / BEST}. The held-out sets are asked of the last weights."
        )

    @property
    def _new(self) -> Path:
        return self.folder.checkpoints / f"{BEST}.new"


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the highest accuracy with the image, of several the first."""
    return max(rows, key=lambda row: row["image"])
