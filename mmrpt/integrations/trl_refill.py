"""Rows of TRL's generation batches: joined, and put in the place of groups that teach nothing.

A generation batch is what `GRPOTrainer._generate_and_score_completions` returns: tensors whose first dimension counts
the B completions of a rank, a group's beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

Rows = dict[str, Any]


def replaced_rows(batch: Rows, holes: Sequence[int], fresh: Rows, taken: Sequence[int], pad_token_id: int) -> Rows:
    """`batch` with its rows `holes` taken from the rows `taken` of `fresh`, as many of each; padded where needed."""
    if len(holes) != len(taken):
        raise ValueError(f"{len(holes)} rows to replace and {len(taken)} to put there: expected as many of each.")
    if not holes:
        return batch
    old, new = split_pixel_values_by_grid(batch), split_pixel_values_by_grid(fresh)
    if old.keys() != new.keys():
        different = sorted(old.keys() ^ new.keys())
        raise ValueError(f"two generation batches differ in {different}: expected the same fields in both.")
    count = len(batch["prompt_ids"])
    sizes = {side: max(part[f"{side}_ids"].shape[1] for part in (batch, fresh)) for side in ("prompt", "completion")}
    order = list(range(count))
    for hole, row in zip(holes, taken, strict=True):
        order[hole] = count + row
    joined = {name: _joined(name, old, new, order, sizes, pad_token_id) for name in old}
    return unsplit_pixel_values_by_grid(joined)


def _joined(name: str, old: Rows, new: Rows, order: list[int], sizes: dict[str, int], pad_token_id: int) -> Any:
    first, second = old[name], new[name]
    count = len(old["prompt_ids"])
    if isinstance(first, list) and len(first) == count:
        both = [*first, *second]
        return [both[i] for i in order]
    if not isinstance(first, Tensor) or first.dim() == 0:
        return first
    if first.dim() == 2 and not (name == "importance_sampling_ratio" and first.shape[1] == 1):  # of whole sequences
        value = pad_token_id if name in ("prompt_ids", "completion_ids") else 0
        first, second = (_widened(name, x, rows, sizes, value) for x, rows in ((first, old), (second, new)))
    if len(first) != count or first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"{name} has the shapes {tuple(first.shape)} and {tuple(second.shape)} in two rounds of {count} "
            "completions: this model family's images are no rows that groups could be exchanged by; sample one round "
            "(max_rounds=1, rl.max_rounds=1)."
        )
    return torch.cat((first, second))[torch.tensor(order, device=first.device)]


def _widened(name: str, x: Tensor, rows: Rows, sizes: dict[str, int], value: int) -> Tensor:
    """Prompts are padded on the left, completions on the right; rows of both on both sides."""
    prompt, completion = rows["prompt_ids"].shape[1], rows["completion_ids"].shape[1]
    left = sizes["prompt"] - prompt if name.startswith("prompt_") or x.shape[1] == prompt + completion else 0
    right = 0 if name.startswith("prompt_") else sizes["completion"] - completion
    return torch.nn.functional.pad(x, (left, right), value=value)
