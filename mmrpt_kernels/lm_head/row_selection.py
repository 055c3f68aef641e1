"""Which rows a chunk loop visits.

compact=True visits exactly the selected rows; to count them the host waits for the device once. compact=False visits
all rows, without a wait, and `valid` marks the selected ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowSelection:
    """Rows to visit, each at most once."""

    rows: torch.Tensor  # (n,) int64
    valid: torch.Tensor | None  # (n,) bool, False: padding, which has results 0 and gives no gradient; None: all valid
    start: int = 0  # where they stand in the selection that they are a part of

    def __len__(self) -> int:
        return self.rows.shape[0]

    def slice(self, start: int, stop: int) -> RowSelection:
        """The rows from `start` up to `stop`."""
        valid = None if self.valid is None else self.valid[start:stop]
        return RowSelection(self.rows[start:stop], valid, self.start + start)

    def split(self, size: int) -> Iterator[RowSelection]:
        """Runs of `size` rows, and what remains."""
        return (self.slice(start, start + size) for start in range(0, self.rows.shape[0], size))

    def narrowed(self, valid: torch.Tensor) -> RowSelection:
        """Those rows that `valid` (n,) names: without the others where that may wait, else with them as padding."""
        return RowSelection(self.rows[valid], None) if self.valid is None else RowSelection(self.rows, valid)

    def masked(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """values (n,), 0 at padding; None stays None."""
        return values if values is None or self.valid is None else torch.where(self.valid, values, 0)

    def scatter(self, values: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """Write values (n,) to `into` (N,) at the valid rows; gives `into` back."""
        if self.valid is not None:
            values = torch.where(self.valid, values, into[self.rows])
        into[self.rows] = values
        return into


def select_rows(mask: torch.Tensor, compact: bool) -> RowSelection:
    """The rows of mask (N,) bool, in order."""
    if compact:
        return RowSelection(mask.nonzero().squeeze(-1), None)
    return RowSelection(torch.arange(mask.shape[0], device=mask.device), mask)


def select_two(first: torch.Tensor, second: torch.Tensor, compact: bool) -> tuple[RowSelection, RowSelection]:
    """The rows of two disjoint masks (N,), for one wait. Not compact: all rows in the first selection, none left for
    the second."""
    if not compact:
        return select_rows(first | second, compact), select_rows(second, compact).slice(0, 0)
    order = torch.where(first, 0, torch.where(second, 1, 2)).to(torch.int8).argsort(stable=True)
    here, there = torch.stack([first.sum(), second.sum()]).tolist()
    return RowSelection(order[:here], None), RowSelection(order[here : here + there], None)
