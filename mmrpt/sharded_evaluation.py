"""An evaluation by several processes without communication: each answers whole batches of questions and writes them to
files that all see; whoever finds every batch there has what `evaluate_policy` would have given in one process."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmrpt.corpus import JsonlWriter, iter_jsonl
from mmrpt.held_out import Sets, answer_batch, judged_answers, question_batches
from mmrpt.policy import Policy
from mmrpt.processes import one_at_a_time
from mmrpt.settings import Settings, SettingsError, flatten

# What says where a run lies and where its model was found, and changes no answer.
PLACES = ("output", "name", "model.path", "model.revision")
WEIGHTS_AT_ONCE = 1 << 24


class MissingParts(ValueError):
    """Batches of other processes are not answered yet."""


@dataclass(frozen=True)
class Parts:
    """What process `part` of `parts` answers: the batches whose number is `part` modulo `parts`.

    Each process appends to files of its own below `folder`; batches that any process has answered are not answered
    again, so that an evaluation can be gone on with, also by another number of processes. Files are named by a key of
    weights, questions and settings: answers to anything else are not looked at.

        parts = Parts(folder, rank, world_size)
        key = parts.answer(policy, sets, settings)  # in each process; no process waits for another
        rows, answers = parts.joined(key, "rl", sets, settings)  # where all have ended; else MissingParts
    """

    folder: Path
    part: int = 0
    parts: int = 1

    @property
    def own(self) -> Path:
        """The folder of this process."""
        return self.folder / f"{self.part}-of-{self.parts}"

    def answer(
        self,
        policy: Policy,
        sets: Sets,
        settings: Settings,
        progress: Callable[[], Any] = lambda: None,
        *,
        sampled: int = 0,
    ) -> str:
        """Answers this process's batches, as `evaluate_policy` does, and returns the key of all parts' answers."""
        key, batches = key_of(policy, sets, settings, sampled), question_batches(sets, settings)
        answered = self._answered(key)
        self.own.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(one_at_a_time(self.own / ".lock", wait=False))
            except BlockingIOError as error:
                raise SettingsError(
                    f"another process answers part {self.part}/{self.parts} in {self.folder}: give each its own part."
                ) from error
            writer = stack.enter_context(JsonlWriter(self.own / f"{key}.jsonl"))
            for number in range(self.part, len(batches), self.parts):
                if number not in answered:
                    texts = answer_batch(policy, sets, batches[number], settings, sampled)
                    writer.write({"batch": number, "texts": texts})
                progress()
        return key

    def joined(
        self, key: str, name: str, sets: Sets, settings: Settings, *, sampled: int = 0
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What `evaluate_policy` returns of the model `name`. Raises MissingParts, which names them."""
        answered, count = self._answered(key), len(question_batches(sets, settings))
        if missing := [number for number in range(count) if number not in answered]:
            parts = ", ".join(f"{part}/{self.parts}" for part in sorted({number % self.parts for number in missing}))
            raise MissingParts(f"Of {name}, {len(missing)} of {count} batches are missing, those of part {parts}.")
        return judged_answers(name, sets, settings, [answered[number] for number in range(count)], sampled)

    def remove(self) -> None:
        """Removes the files of all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answered(self, key: str) -> dict[int, list[list[str]]]:
        """By number of the batch, what processes have answered so far."""
        paths = sorted(self.folder.glob(f"*-of-*/{key}.jsonl"))
        return {row["batch"]: row["texts"] for path in paths for row in iter_jsonl(path)}


def key_of(policy: Policy, sets: Sets, settings: Settings, sampled: int) -> str:
    """16 hex digits of what answers depend on: the weights, the questions, the settings."""
    said = flatten(asdict(settings))
    questions = [[name, [sample.to_json() for sample in samples]] for name, (_, samples) in sets.items()]
    weights = [_sum_of_bits(weight) for weight in policy.model.parameters()]
    text = json.dumps([{k: said[k] for k in said if k not in PLACES}, questions, weights, sampled], default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _sum_of_bits(weight: torch.Tensor) -> int:
    """The sum of a weight's values read as integers: exact, so that it is the same on every device."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    flat = weight.detach().reshape(-1).view(integers)
    return sum(int(piece.sum()) for piece in flat.split(WEIGHTS_AT_ONCE))
