"""Packed sequences: cumulative lengths as lists of (start, stop) pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.common.checks import check


class Segment(NamedTuple):
    """Rows and keys of one packed sequence."""

    rows: slice
    keys: slice


def _starts(name: str, cu_seqlens: torch.Tensor, total: int, of: str) -> list[int]:
    starts = cu_seqlens.tolist()
    check(
        len(starts) >= 1 and starts[0] == 0 and starts[-1] == total and starts == sorted(starts),
        f"{name}: got {starts if len(starts) <= 8 else str(starts[:8])[:-1] + ', ...]'}, expected cumulative lengths "
        f"that rise from 0 to {total}, the rows of {of}; build it with torch.cat([zeros(1), lengths.cumsum(0)]).int()",
    )
    return starts


def read_segments(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, total_q: int, total_k: int) -> list[Segment]:
    """The sequences of a packed batch. Reads the values: waits for the device they are on.

    Args:
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int: 0, then where each sequence ends.
        total_q, total_k: rows of q and of k.

    Raises:
        ValueError: they do not rise from 0 to the totals.
    """
    starts_q = _starts("cu_seqlens_q", cu_seqlens_q, total_q, "q")
    starts_k = _starts("cu_seqlens_k", cu_seqlens_k, total_k, "k")
    return [
        Segment(slice(q0, q1), slice(k0, k1))
        for q0, q1, k0, k1 in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True)
    ]
