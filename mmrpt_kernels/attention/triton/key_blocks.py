"""Which key blocks carry weight: group by group, a block's weights are all 0 (NONE), all 1 (ALL) or anything (SOME).

Image tokens come in long runs, so nearly all blocks are NONE or ALL. NONE adds nothing to the mass; with ALL the mass
of a row grows by just the row sum that softmax needs anyway; only SOME pays per key. One kernel says so on the device
and lists the blocks that are not NONE: nothing waits for the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.triton.tiles import ALL, LENGTHS, NONE, SOME

__all__ = ["KeyBlocks", "classify"]


class KeyBlocks(NamedTuple):
    """What the weights hold, by blocks of `block` keys that start at key 0 of the tensor (packed: of all sequences)."""

    kinds: torch.Tensor  # (B, N, G) int8: NONE, ALL or SOME
    visit: torch.Tensor  # (B, G, N) int32: the blocks that are not free, rising; as many as `before` ends with
    before: torch.Tensor  # (B, G, N + 1) int32: how many of them stand before block n
    block: int  # keys of a block


@triton.jit(do_not_specialize=LENGTHS)
def _classify_kernel(
    weights,
    padding,
    kinds,
    visit,
    before,
    num_keys,
    num_blocks,
    groups,
    stride_wb,
    stride_ws,
    stride_wg,
    stride_pb,
    stride_ps,
    HAS_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per sample and group walks all blocks, CHUNK at a time."""
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, pair % groups
    weights += batch * stride_wb + group * stride_wg
    padding += batch * stride_pb
    kinds += batch * num_blocks * groups + group
    visit += pair * num_blocks
    before += pair * (num_blocks + 1)
    found = 0
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)  # (CHUNK,)
        key = (block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]).to(tl.int64)  # (CHUNK, BLOCK)
        allowed = key < num_keys
        if HAS_PADDING:
            allowed &= tl.load(padding + key * stride_ps, mask=allowed, other=0) != 0  # (CHUNK, BLOCK)
        weight = tl.load(weights + key * stride_ws, mask=allowed, other=0).to(tl.float32)  # (CHUNK, BLOCK)
        # A NaN is neither 0 nor 1.
        some = tl.max((weight != 0).to(tl.int32), axis=1)
        other = tl.max((allowed & (weight != 1)).to(tl.int32), axis=1)
        kind = tl.where(some == 0, NONE, tl.where(other == 0, ALL, SOME))
        place = found + tl.cumsum(some, axis=0) - some
        inside = block < num_blocks
        tl.store(kinds + block * groups, kind.to(tl.int8), mask=inside)
        tl.store(before + block, place, mask=inside)
        tl.store(visit + place, block, mask=inside & (some != 0))
        found += tl.sum(some, axis=0)
    tl.store(before + num_blocks, found)


def classify(key_weights: torch.Tensor, key_padding_mask: torch.Tensor | None, block: int) -> KeyBlocks:
    """Kinds of all blocks of `block` keys, without waiting for the device.

    Keys that padding forbids, and those beyond the last key, count for nothing: whoever uses ALL must leave them out
    of the row sum, as softmax does.

    Args:
        key_weights: (B, S, G) bool or float; packed: (1, sum S, G).
        key_padding_mask: (B, S) bool or None.
        block: keys of a block, a power of two.
    """
    batch, num_keys, groups = key_weights.shape
    num_blocks = triton.cdiv(num_keys, block)
    device = key_weights.device
    made = KeyBlocks(
        torch.empty((batch, num_blocks, groups), dtype=torch.int8, device=device),
        torch.empty((batch, groups, num_blocks), dtype=torch.int32, device=device),
        torch.empty((batch, groups, num_blocks + 1), dtype=torch.int32, device=device),
        block,
    )
    if batch * groups == 0:
        return made
    # A bool is a byte; Triton loads bytes. The padding pointer is never followed where there is no mask.
    weights = key_weights.view(torch.uint8) if key_weights.dtype == torch.bool else key_weights
    padding = weights if key_padding_mask is None else key_padding_mask.view(torch.uint8)
    _classify_kernel[(batch * groups,)](
        weights,
        padding,
        *made[:3],
        num_keys,
        num_blocks,
        groups,
        *weights.stride(),
        *(padding.stride()[:2] if key_padding_mask is not None else (0, 0)),
        HAS_PADDING=key_padding_mask is not None,
        BLOCK=block,
        CHUNK=max(1, 4096 // block),
        num_warps=4,
    )
    return made
