"""The query rows that a pass over selected rows visits, one after the other, each with the keys that it may see.

Causality, windows and packed sequences leave each row one interval of keys. With the intervals written down, a kernel
needs to know of none of them, and a tile of rows may span sequences. Both ends of the interval rise along the list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.config import Settings
from mmrpt_kernels.attention.triton.launch import Problem, launch, strides
from mmrpt_kernels.attention.triton.tiles import LENGTHS

CHUNK = 2048


class QueryList(NamedTuple):
    """The wanted rows that may see a key at all; packed: one list over all sequences, keys counted over all of them."""

    rows: torch.Tensor  # (B, T) int32: positions, rising; the first `counts` entries hold
    first: torch.Tensor  # (B, T) int32: the row's keys are [first, last)
    last: torch.Tensor  # (B, T) int32
    counts: torch.Tensor  # (B,) int32


@triton.jit
def _sequence_of(starts, num_sequences, row):
    """The packed sequence that each row is in: the last one that starts at or before it and is not empty."""
    low = tl.zeros_like(row)
    high = tl.zeros_like(row) + num_sequences
    size = num_sequences
    while size > 0:
        middle = (low + high) // 2
        beyond = tl.load(starts + middle, mask=middle < num_sequences, other=0).to(tl.int32) > row
        searching = low < high
        high = tl.where(searching & beyond, middle, high)
        low = tl.where(searching & (beyond == 0), middle + 1, low)
        size = size // 2
    return low - 1


@triton.jit(do_not_specialize=LENGTHS)
def _list_queries(
    wanted, cu_q, cu_k, rows, first, last, counts, num_rows, num_keys, num_sequences, stride_lb, stride_lt, left, right,
    WANTED: tl.constexpr, PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program lists the rows of one sample, CHUNK at a time."""
    batch = tl.program_id(0).to(tl.int64)
    rows += batch * num_rows
    first += batch * num_rows
    last += batch * num_rows
    found = 0
    for start in range(0, num_rows, CHUNK):
        row = start + tl.arange(0, CHUNK)  # (CHUNK,)
        take = row < num_rows
        if WANTED:
            w_ptrs = wanted + batch * stride_lb + row.to(tl.int64) * stride_lt
            take &= tl.load(w_ptrs, mask=take, other=0) != 0
        # Keys of the row's sequence: [low, high), and the row's own position among them (bottom-right aligned).
        if PACKED:
            sequence = _sequence_of(cu_q, num_sequences, row)
            take &= sequence >= 0
            low = tl.load(cu_k + sequence, mask=take, other=0).to(tl.int32)
            high = tl.load(cu_k + sequence + 1, mask=take, other=0).to(tl.int32)
            position = row - tl.load(cu_q + sequence + 1, mask=take, other=0).to(tl.int32) + high
        else:
            low = tl.zeros_like(row)
            high = low + num_keys
            position = row - num_rows + num_keys
        if LEFT:
            low = tl.maximum(low, position - left)
        if RIGHT:
            high = tl.minimum(high, position + right + 1)
        take &= low < high
        place = found + tl.cumsum(take.to(tl.int32), axis=0) - 1
        tl.store(rows + place, row, mask=take)
        tl.store(first + place, low, mask=take)
        tl.store(last + place, high, mask=take)
        found += tl.sum(take.to(tl.int32), axis=0)
    tl.store(counts + batch, found)


def list_queries(problem: Problem, wanted: torch.Tensor | None) -> QueryList:
    """The list, made on the device without waiting for it. wanted: (B, T) bool, or None for all rows."""
    (batch, num_rows), device = problem.q.shape[:2], problem.q.device
    listed = (torch.empty((batch, num_rows), dtype=torch.int32, device=device) for _ in range(3))
    made = QueryList(*listed, torch.empty((batch,), dtype=torch.int32, device=device))
    own = {
        **made._asdict(),
        "wanted": None if wanted is None else wanted.view(torch.uint8),
        "num_sequences": problem.cu_q.numel() - 1 if problem.packed else 0,
        **strides("l", "bt", wanted),
        "WANTED": wanted is not None,
        "CHUNK": CHUNK,
    }
    launch(_list_queries, (batch,), problem.arguments() | own, Settings(0, 0, 8, 1))
    return made
