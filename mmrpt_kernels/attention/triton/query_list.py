"""The query rows that a pass over selected rows visits, packed tightly, each with the keys that it may see.

Causality, windows and packed sequences leave each row one interval of keys. With the intervals written down, a kernel
needs to know of none of them, and a tile of rows may span sequences. Both ends of the interval rise along the list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.triton.tiles import LENGTHS

__all__ = ["QueryList", "list_queries"]

CHUNK = 2048


class QueryList(NamedTuple):
    """The wanted rows that may see a key at all; packed: one list over all sequences, keys counted over all of them."""

    rows: torch.Tensor  # (B, T) int32: positions, rising; the first count entries hold
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
def _list_kernel(
    wanted,
    cu_seqlens_q,
    cu_seqlens_k,
    rows,
    first,
    last,
    counts,
    num_rows,
    num_keys,
    num_sequences,
    stride_wb,
    stride_wt,
    window_left,
    window_right,
    HAS_WANTED: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per sample walks its rows, CHUNK at a time."""
    batch = tl.program_id(0).to(tl.int64)
    rows += batch * num_rows
    first += batch * num_rows
    last += batch * num_rows
    found = 0
    for start in range(0, num_rows, CHUNK):
        row = start + tl.arange(0, CHUNK)  # (CHUNK,)
        take = row < num_rows
        if HAS_WANTED:
            offset = batch * stride_wb + row.to(tl.int64) * stride_wt
            take &= tl.load(wanted + offset, mask=take, other=0) != 0
        # Keys of the row's sequence: [low, high), and the row's own position among them (bottom-right aligned).
        if PACKED:
            sequence = _sequence_of(cu_seqlens_q, num_sequences, row)
            take &= sequence >= 0
            low = tl.load(cu_seqlens_k + sequence, mask=take, other=0).to(tl.int32)
            high = tl.load(cu_seqlens_k + sequence + 1, mask=take, other=0).to(tl.int32)
            position = row - tl.load(cu_seqlens_q + sequence + 1, mask=take, other=0).to(tl.int32) + high
            # Lengths that do not add up (nobody can check them without waiting for the device) must not lead outside.
            low = tl.maximum(low, 0)
            high = tl.minimum(high, num_keys)
        else:
            low = tl.zeros_like(row)
            high = low + num_keys
            position = row - num_rows + num_keys
        if window_left >= 0:
            low = tl.maximum(low, position - window_left)
        if window_right >= 0:
            high = tl.minimum(high, position + window_right + 1)
        take &= low < high
        place = found + tl.cumsum(take.to(tl.int32), axis=0) - 1
        tl.store(rows + place, row, mask=take)
        tl.store(first + place, low, mask=take)
        tl.store(last + place, high, mask=take)
        found += tl.sum(take.to(tl.int32), axis=0)
    tl.store(counts + batch, found)


def list_queries(
    batch: int,
    num_rows: int,
    num_keys: int,
    wanted: torch.Tensor | None,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None,
    options: AttentionOptions,
    device: torch.device,
) -> QueryList:
    """The list, made on the device without waiting for it.

    Args:
        batch, num_rows, num_keys: B, T, S; packed: 1, sum T, sum S.
        wanted: (B, T) bool or None for all rows.
        cu_seqlens: of the rows and of the keys, (sequences + 1,) int each, where packed.
    """
    listed = (torch.empty((batch, num_rows), dtype=torch.int32, device=device) for _ in range(3))
    made = QueryList(*listed, torch.empty((batch,), dtype=torch.int32, device=device))
    if batch == 0:
        return made
    cu_q, cu_k = (made.counts, made.counts) if cu_seqlens is None else cu_seqlens
    mask = made.rows if wanted is None else wanted.view(torch.uint8)
    _list_kernel[(batch,)](
        mask,
        cu_q.contiguous(),
        cu_k.contiguous(),
        *made,
        num_rows,
        num_keys,
        cu_q.numel() - 1,
        *mask.stride(),
        options.window_left,
        options.window_right,
        HAS_WANTED=wanted is not None,
        PACKED=cu_seqlens is not None,
        CHUNK=CHUNK,
        num_warps=8,
    )
    return made
