"""Which tokens a visit of the vocabulary takes, and where its numbers go back to.

A caller that does not know how many tokens count must wait for the device to find out. One that does, or takes them
all, need not: then some of the places are filled with tokens that do not count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.common import checks

__all__ = ["COUNTED", "Places", "choose", "most_places", "put", "split"]

# In the place of a number of tokens: count them, which waits for the device.
COUNTED = -1


class Places(NamedTuple):
    """Tokens to visit, each at most once."""

    rows: torch.Tensor  # (n,) int64
    counts: torch.Tensor | None  # (n,) bool: those that count; the others are there to fill. None: all do

    def narrowed(self, counts: torch.Tensor) -> Places:
        """Those of the places that `counts` (n,) bool names; the others fill, where leaving them out would wait."""
        return Places(self.rows[counts], None) if self.counts is None else Places(self.rows, counts)


def most_places(compact: bool | int, tokens: int) -> int:
    """The public option as a number of places: COUNTED, all of the tokens, or the caller's; ValueError for nonsense."""
    if compact is True:
        return COUNTED
    if compact is False:
        return tokens
    checks.check(
        isinstance(compact, int) and compact >= 0,
        f"compact: got {compact!r}, expected True (count the tokens), False (take all) or how many count at most; "
        "leave it True",
    )
    return min(compact, tokens)


def choose(mask: torch.Tensor, most: int) -> Places:
    """The tokens of mask (N,) bool, in order; `most` as `most_places` gives it."""
    if most == COUNTED:
        return Places(mask.nonzero().squeeze(-1), None)
    return split(mask, torch.zeros_like(mask), most)[0]


def split(first: torch.Tensor, second: torch.Tensor, most: int) -> tuple[Places, Places]:
    """The tokens of two disjoint masks (N,). COUNTED: of one each, for one wait. Else `most` places with all of the
    first and as many of the second as fit, and places with what is left of it.

    Raises ValueError (on a GPU a device-side assertion) where the first has more than `most`.
    """
    if most >= first.shape[0]:  # all of them, in their own order: nothing to sort, and room enough
        rows = torch.arange(first.shape[0], device=first.device)
        return Places(rows, first | second), Places(rows[:0], first[:0])
    order = torch.where(first, 0, torch.where(second, 1, 2)).to(torch.int8).argsort(stable=True)
    if most == COUNTED:
        here, there = torch.stack([first.sum(), second.sum()]).tolist()
        return Places(order[:here], None), Places(order[here : here + there], None)
    _check_room(first, most)
    counts = (first | second)[order]
    return Places(order[:most], counts[:most]), Places(order[most:], counts[most:])


def _check_room(mask: torch.Tensor, most: int) -> None:
    problem = "compact: got fewer places than there are tokens that count; give an upper bound, or True to count them"
    count = mask.sum()
    if mask.device.type == "cpu":
        checks.check(int(count) <= most, f"{problem} (got {most}, {int(count)} tokens count)")
    else:
        torch._assert_async(count <= most, problem)


def put(into: torch.Tensor, places: Places, values: torch.Tensor) -> torch.Tensor:
    """`into` (N,) with values (n,) written at the places that count; waits for nothing. Gives `into` back."""
    if places.counts is not None:
        values = torch.where(places.counts, values, into[places.rows])
    into[places.rows] = values
    return into
