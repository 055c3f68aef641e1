"""Checkpoints: plain Hugging Face folders with one file more, whole or not there at all.

A phase writes `<phase>-<step>` while it runs and `<phase>` when it is done. Every draw of a phase is seeded by its
step, so weights, optimiser state, counters and waiting groups are all there is to restore.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from mmrpt.policy import Policy

STATE_FILE = "trainer_state.pt"


def save_checkpoint(folder: Path, policy: Policy, state: dict[str, Any]) -> None:
    """Writes the policy and `state` (tensors, numbers, lists, dicts) beside `folder`, then renames."""
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    policy.write_files(part)
    torch.save(state, part / STATE_FILE)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(part, folder)


def load_checkpoint(folder: Path, policy: Policy) -> dict[str, Any]:
    """Puts the folder's weights into `policy` in place and returns the state that was saved with them."""
    saved = Policy.load(folder, dtype=policy.model.dtype)
    policy.model.load_state_dict(saved.model.state_dict())
    return torch.load(folder / STATE_FILE, weights_only=True)


def latest_checkpoint(root: Path, phase: str) -> Path | None:
    """The newest unfinished checkpoint of a phase, or None."""
    pattern = re.compile(rf"{re.escape(phase)}-(\d+)")
    found = [(int(m[1]), p) for p in root.glob(f"{phase}-*") if (m := pattern.fullmatch(p.name))]
    return max(found)[1] if found else None


def drop_older(root: Path, phase: str, keep: Path | None) -> None:
    """Removes unfinished checkpoints of the phase other than `keep`, and leftovers of an interrupted save."""
    for path in root.glob(f"{phase}-*"):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
