"""Checkpoints: plain Hugging Face folders with one file more, whole or not there at all.

A phase writes `<phase>-<step>` while it runs and `<phase>` when it is done. Every draw of a phase is seeded by its
step, so weights, optimiser state, counters and waiting groups are all there is to restore.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from mmrpt.corpus.files import sync
from mmrpt.lora import CONFIG, adapter_weights, read_adapters
from mmrpt.policy import Policy
from mmrpt.run_folder import RunError

STATE_FILE = "trainer_state.pt"
KEPT = 2  # unfinished checkpoints of a phase: where the newest cannot be read, the older one serves


def save_checkpoint(folder: Path, policy: Policy, state: dict[str, Any]) -> None:
    """Writes the policy and `state` (tensors, numbers, lists, dicts) beside `folder`, to disk, then renames.

    Raises RunError where it cannot be written (a full disk); what was there before stays as it is.
    """
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        policy.write_files(part)
        torch.save(state, part / STATE_FILE)
        for path in (*part.iterdir(), part):
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
        sync(folder.parent)
    except Exception as error:  # safetensors, torch and the file system each raise their own
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(
            f"the checkpoint {folder} could not be written ({error}). Earlier ones are untouched: make room on the "
            "disk and go on with --resume."
        ) from error


def load_checkpoint(folder: Path, policy: Policy) -> dict[str, Any]:
    """Puts the folder's weights into `policy` in place and returns the state that was saved with them, on the CPU.

    Raises RunError, naming the folder, where it cannot be read.
    """
    wanted, found = bool(adapter_weights(policy.model)), (folder / CONFIG).is_file()
    if wanted != found and folder.is_dir():
        kinds = {True: "adapters alone (model.lora.rank above 0)", False: "all weights (model.lora.rank=0)"}
        raise RunError(
            f"the checkpoint {folder} holds {kinds[found]} and this run trains {kinds[wanted]}: go on with the "
            "settings that began it, or start a new run under another name."
        )
    try:
        if found:
            read_adapters(policy.model, folder)
        else:
            saved = Policy.load(folder, dtype=policy.model.dtype)
            policy.model.load_state_dict(saved.model.state_dict())
        return load_state(folder)
    except Exception as error:  # of safetensors, pickle, zip and JSON
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"the checkpoint {folder} cannot be read ({type(error).__name__}: {reason}). Restore it from a copy, or "
            "delete it to go on from what is before it."
        ) from error


def load_state(folder: Path) -> dict[str, Any]:
    """The state that was saved with the folder's weights, on the CPU."""
    return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)


def load_newest(root: Path, phase: str, policy: Policy) -> dict[str, Any] | None:
    """Loads the newest unfinished checkpoint of a phase that can be read; None where there is none.

    One that cannot be read is told on stderr, and the older one serves. Raises RunError where none can be read.
    """
    failure = None
    for folder in unfinished_checkpoints(root, phase):
        try:
            return load_checkpoint(folder, policy)
        except RunError as error:
            failure = error
            print(f"warning: {error} Trying the one before it.", file=sys.stderr)
    if failure is not None:
        raise failure
    return None


def unfinished_checkpoints(root: Path, phase: str) -> list[Path]:
    """The unfinished checkpoints of a phase, the newest first."""
    pattern = re.compile(rf"{re.escape(phase)}-(\d+)")
    found = [(int(m[1]), p) for p in root.iterdir() if (m := pattern.fullmatch(p.name))] if root.is_dir() else []
    return [path for _, path in sorted(found, reverse=True)]


def drop_older(root: Path, phase: str, keep: int) -> None:
    """Removes the unfinished checkpoints of a phase but the `keep` newest, and leftovers of interrupted saves."""
    unwanted = unfinished_checkpoints(root, phase)[keep:]
    for path in (*unwanted, *(p for p in root.iterdir() if p.name.startswith(phase) and p.suffix == ".tmp")):
        shutil.rmtree(path, ignore_errors=True)
