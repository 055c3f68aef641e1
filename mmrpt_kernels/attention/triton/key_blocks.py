"""Which key blocks carry weight: group by group, a block's weights are all 0 (NONE), all 1 (ALL) or anything (SOME).

Image tokens come in long runs, so nearly all blocks are NONE or ALL. NONE adds nothing to the mass; with ALL the mass
of a row grows by just the row sum that softmax needs anyway; only SOME pays per key. One kernel says so on the device
and lists the blocks, as FlexAttention lists full and partial ones: nothing waits for the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.triton.tiles import ALL, LENGTHS, NONE, SOME


class KeyBlocks(NamedTuple):
    """Blocks of keys, from key 0 of the tensor on (packed: of all sequences)."""

    kinds: torch.Tensor  # (B, N, G) int8: NONE, ALL or SOME
    lists: torch.Tensor  # (B, 1 or G, 2, N) int32: block numbers, rising: [0] without keys to weigh, [1] SOME
    before: torch.Tensor  # (B, 1 or G, 2, N + 1) int32: how many entries of a list stand before block n


@triton.jit(do_not_specialize=LENGTHS)
def _classify(
    weights, padding, kinds, lists, before, num_keys, num_blocks, groups,
    stride_wb, stride_ws, stride_wg, stride_pb, stride_ps,
    PADDED: tl.constexpr, TOGETHER: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program classifies all blocks, CHUNK at a time: of one sample's GROUPS groups (TOGETHER), or of one group."""
    program = tl.program_id(0).to(tl.int64)
    if TOGETHER:
        batch, group = program, program * 0
    else:
        batch, group = program // groups, program % groups
    kinds += batch * num_blocks * groups
    lists += program * 2 * num_blocks
    before += program * 2 * (num_blocks + 1)
    num_uniform, num_some = 0, 0
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)  # (CHUNK,)
        inside = block < num_blocks
        key = (block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]).to(tl.int64)  # (CHUNK, BLOCK)
        allowed = key < num_keys
        if PADDED:
            allowed &= tl.load(padding + batch * stride_pb + key * stride_ps, mask=allowed, other=0) != 0
        some = tl.zeros((CHUNK,), tl.int32)
        listed = inside.to(tl.int32) if TOGETHER else some
        for g in tl.static_range(GROUPS):
            exists = group + g < groups
            w_ptrs = weights + batch * stride_wb + key * stride_ws + (group + g) * stride_wg
            weight = tl.load(w_ptrs, mask=allowed & exists, other=0).to(tl.float32)  # (CHUNK, BLOCK)
            # A NaN is neither 0 nor 1.
            weighted = tl.max((weight != 0).to(tl.int32), axis=1)
            other = tl.max((allowed & (weight != 1)).to(tl.int32), axis=1)
            kind = tl.where(weighted == 0, NONE, tl.where(other == 0, ALL, SOME))
            tl.store(kinds + block * groups + group + g, kind.to(tl.int8), mask=inside & exists)
            some |= (exists & (kind == SOME)).to(tl.int32)
            listed |= weighted
        uniform = listed & (1 - some)
        place_uniform = num_uniform + tl.cumsum(uniform, axis=0) - uniform
        place_some = num_some + tl.cumsum(some, axis=0) - some
        tl.store(lists + place_uniform, block, mask=inside & (uniform != 0))
        tl.store(lists + num_blocks + place_some, block, mask=inside & (some != 0))
        tl.store(before + block, place_uniform, mask=inside)
        tl.store(before + num_blocks + 1 + block, place_some, mask=inside)
        num_uniform += tl.sum(uniform, axis=0)
        num_some += tl.sum(some, axis=0)
    tl.store(before + num_blocks, num_uniform)
    tl.store(before + 2 * num_blocks + 1, num_some)


def classify(weights: torch.Tensor, padding: torch.Tensor | None, block: int, *, together: bool = False) -> KeyBlocks:
    """Kinds and lists of all blocks of `block` keys, without waiting for the device.

    Keys that padding forbids, and those beyond the last key, do not count: whoever uses ALL must leave them out of the
    row sum, as softmax does.

    Args:
        weights: (B, S, G) uint8 or float; packed: (1, sum S, G).
        padding: (B, S) uint8 or None.
        block: keys of a block, a power of two.
        together: one pair of lists for a sample, of the blocks that are NONE or ALL for every group, and of the others;
            else a pair for each group, of its ALL and of its SOME blocks.
    """
    batch, num_keys, groups = weights.shape
    num_blocks, pairs = triton.cdiv(num_keys, block), 1 if together else groups
    made = KeyBlocks(
        torch.empty((batch, num_blocks, groups), dtype=torch.int8, device=weights.device),
        torch.empty((batch, pairs, 2, num_blocks), dtype=torch.int32, device=weights.device),
        torch.empty((batch, pairs, 2, num_blocks + 1), dtype=torch.int32, device=weights.device),
    )
    _classify[(batch * pairs,)](
        weights,
        padding,
        *made,
        num_keys,
        num_blocks,
        groups,
        *weights.stride(),
        *((0, 0) if padding is None else padding.stride()),
        PADDED=padding is not None,
        TOGETHER=together,
        GROUPS=triton.next_power_of_2(groups) if together else 1,
        BLOCK=block,
        CHUNK=max(1, 4096 // block),
        num_warps=8,
    )
    return made
