"""Fused forward pass: out, mass and lse of every row in one visit of its keys.

A program computes a block of rows of one head over the key blocks with an online softmax. The mass of a group is a
second row sum beside the softmax's own. Blocks without weight add nothing, blocks of weight 1 add the row sum that
is there already, and only blocks of both multiply per element. Both sums take the same steps in the same order, so
rounding, which never reverses an order, keeps the mass of boolean weights in [0, 1], and the two are equal bit for bit
where a row sees weighted keys alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.config import FORWARD, MAX_GROUPS
from mmrpt_kernels.attention.triton.key_blocks import classify
from mmrpt_kernels.attention.triton.launch import Problem, launch, tiling
from mmrpt_kernels.attention.triton.mass_forward import mass_forward
from mmrpt_kernels.attention.triton.query_list import list_queries
from mmrpt_kernels.attention.triton.tiles import (
    ALL,
    LENGTHS,
    LN_2,
    LOG2_E,
    SOME,
    allowed_pairs,
    capped_scores,
    key_blocks_of_rows,
    load_tile,
    place_of_program,
    sequence_bounds,
)


@triton.jit
def _mass_of_block(
    mass, probability, row_sum, rescale, block_kinds, w_ptrs, stride_wg, keep, groups,
    EDGE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """mass (BLOCK_M, GROUPS) after a key block of probabilities (BLOCK_M, BLOCK_N), unnormalised.

    keep (BLOCK_N,): keys that exist. GROUPS: groups, up to a power of two. Without EDGE no block is of kind SOME: the
    kind itself, 0 or 1, is the weight of the block.
    """
    column = tl.arange(0, GROUPS)[None, :]
    for g in tl.static_range(GROUPS):
        kind = tl.load(block_kinds + g, mask=g < groups, other=0)
        if EDGE:
            part = tl.where(kind == ALL, row_sum, 0.0)
            if kind == SOME:
                w = tl.load(w_ptrs + g * stride_wg, mask=keep, other=0).to(tl.float32)  # (BLOCK_N,)
                part = tl.sum(probability * w[None, :], 1)
        else:
            part = row_sum * kind.to(tl.float32)
        mass = tl.where(column == g, tl.fma(mass, rescale[:, None], part[:, None]), mass)
    return mass


@triton.jit
def _attend_blocks(
    accumulator, running_max, running_sum, mass, q_tile, row, k_base, v_base, w_base, pad_base, mask_base, kinds_base,
    lists, stride_ks, stride_vs, stride_ws, stride_wg, stride_ps, stride_mt, stride_ms,
    first, num_left, listed, num_listed, right_first, num_blocks,
    shift, row_hi, key_lo, key_hi, groups, left, right, scale, softcap,
    EDGE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """The online softmax over num_listed blocks of a list, from entry `listed` on.

    EDGE: besides, the num_left blocks from `first` on and, to make up num_blocks in all, those from right_first on; the
    band may forbid pairs, the sequence may end within a block, and a block may hold weights of any kind.
    """
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_V)
    place = tl.arange(0, BLOCK_N)
    k_offsets = place[:, None] * stride_ks + dim[None, :]
    v_offsets = place[:, None] * stride_vs + dim_v[None, :]
    for index in range(0, num_blocks):
        if EDGE:
            entry = index - num_left
            inside = (entry >= 0) & (entry < num_listed)
            block = tl.where(entry < 0, first + index, right_first + entry - num_listed)
            block = tl.where(inside, tl.load(lists + listed + entry, mask=inside, other=0), block)
        else:
            block = tl.load(lists + listed + index)
        key = block * BLOCK_N + place
        start = block.to(tl.int64) * BLOCK_N
        keep = (key >= key_lo) & (key < key_hi)  # (BLOCK_N,)
        if PADDED:
            keep = keep & (tl.load(pad_base + key * stride_ps, mask=keep, other=0) != 0)
        partial: tl.constexpr = EDGE or PADDED
        k_ptrs = (k_base + start * stride_ks) + k_offsets
        v_ptrs = (v_base + start * stride_vs) + v_offsets
        k_tile = load_tile(k_ptrs, keep[:, None], dim[None, :], partial, DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        v_tile = load_tile(v_ptrs, keep[:, None], dim_v[None, :], partial, DIM_V, BLOCK_V)  # (BLOCK_N, BLOCK_V)
        scores = tl.dot(q_tile, tl.trans(k_tile))  # (BLOCK_M, BLOCK_N)
        if FOLD:
            factor = scale * LOG2_E
        else:
            scores, _ = capped_scores(scores, scale, softcap, CAPPED)
            factor = 1.0
        if EDGE:
            allowed = allowed_pairs(
                row[:, None], key[None, :], shift, row_hi, key_lo, key_hi, left, right, mask_base, stride_mt, stride_ms,
                LEFT, RIGHT, MASKED,
            )  # fmt: skip
            scores = tl.where(allowed, scores, float("-inf"))
        if PADDED:
            scores = tl.where(keep[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1) * factor)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row without keys so far
        probability = tl.exp2(scores * factor - safe_max[:, None])
        rescale = tl.exp2(running_max - safe_max)
        row_sum = tl.sum(probability, 1)
        running_sum = tl.fma(running_sum, rescale, row_sum)
        w_ptrs = (w_base + start * stride_ws) + place * stride_ws
        mass = _mass_of_block(
            mass, probability, row_sum, rescale, kinds_base + block * groups, w_ptrs, stride_wg, keep, groups,
            EDGE, GROUPS,
        )  # fmt: skip
        accumulator = tl.dot(probability.to(v_tile.dtype), v_tile, accumulator * rescale[:, None])
        running_max = new_max
    return accumulator, running_max, running_sum, mass


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    q, k, v, weights, padding, mask, kinds, lists, before, out, mass_out, lse_out,
    cu_q, cu_k, tile_sequence, tile_first,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_wb, stride_ws, stride_wg, stride_pb, stride_ps, stride_mb, stride_mt, stride_ms, mass_stride,
    num_rows, num_keys, num_tiles, num_heads, heads, repeat, section, groups, left, right, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, BOOLEAN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, CAPPED: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head.

    out (B, T, Hq, Dv), mass_out (B, Hq, T, mass_stride), lse_out (B, Hq, T).
    """
    tile, head_all = place_of_program(tl.program_id(0), num_tiles, num_heads, section)
    tile = num_tiles - 1 - tile  # under causality the last rows have the most keys
    batch = (head_all // heads).to(tl.int64)
    head = head_all % heads
    head_kv = (head // repeat).to(tl.int64)
    row_first, row_hi, key_lo, key_hi = tile * BLOCK_M, num_rows, 0, num_keys
    if PACKED:
        sequence = tl.load(tile_sequence + tile)
        if sequence < 0:
            return
        row_first = tl.load(tile_first + tile)
        _, row_hi, key_lo, key_hi = sequence_bounds(cu_q, cu_k, sequence)
    shift = key_hi - row_hi
    row_last = min(row_first + BLOCK_M, row_hi) - 1
    row = row_first + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_V)

    first_block, inner_first, inner_stop, stop_block = key_blocks_of_rows(
        row_first, row_last, shift, key_lo, key_hi, left, right, LEFT, RIGHT, BLOCK_N
    )
    if MASKED:
        inner_stop = inner_first

    q_ptrs = q + batch * stride_qb + head.to(tl.int64) * stride_qh + row_first.to(tl.int64) * stride_qt
    q_ptrs += tl.arange(0, BLOCK_M)[:, None] * stride_qt + dim[None, :]
    q_tile = tl.load(q_ptrs, mask=(row < row_hi)[:, None] & (dim < DIM)[None, :], other=0.0)  # (BLOCK_M, BLOCK_D)
    k_base = k + batch * stride_kb + head_kv * stride_kh
    v_base = v + batch * stride_vb + head_kv * stride_vh
    w_base = weights + batch * stride_wb
    pad_base = padding + batch * stride_pb if PADDED else padding
    mask_base = mask + batch * stride_mb if MASKED else mask
    num_blocks = tl.cdiv(num_keys, BLOCK_N)
    kinds_base = kinds + batch * num_blocks * groups
    lists += batch * 2 * num_blocks
    before += batch * 2 * (num_blocks + 1)
    before_some = before + num_blocks + 1
    # Blocks that hold nothing to decide: the band allows every pair, and every weight of a group is the same.
    uniform = tl.load(before + inner_first)
    num_uniform = tl.load(before + inner_stop) - uniform
    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    mass = tl.zeros((BLOCK_M, GROUPS), tl.float32)
    accumulator, running_max, running_sum, mass = _attend_blocks(
        accumulator, running_max, running_sum, mass, q_tile, row, k_base, v_base, w_base, pad_base, mask_base,
        kinds_base, lists, stride_ks, stride_vs, stride_ws, stride_wg, stride_ps, stride_mt, stride_ms,
        0, 0, uniform, num_uniform, 0, num_uniform,
        shift, row_hi, key_lo, key_hi, groups, left, right, scale, softcap,
        False, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, GROUPS, LEFT, RIGHT, PADDED, MASKED, CAPPED, FOLD,
    )  # fmt: skip
    some = tl.load(before_some + inner_first)
    num_some = tl.load(before_some + inner_stop) - some
    num_left = inner_first - first_block
    accumulator, running_max, running_sum, mass = _attend_blocks(
        accumulator, running_max, running_sum, mass, q_tile, row, k_base, v_base, w_base, pad_base, mask_base,
        kinds_base, lists + num_blocks, stride_ks, stride_vs, stride_ws, stride_wg, stride_ps, stride_mt, stride_ms,
        first_block, num_left, some, num_some, inner_stop, num_left + num_some + stop_block - inner_stop,
        shift, row_hi, key_lo, key_hi, groups, left, right, scale, softcap,
        True, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, GROUPS, LEFT, RIGHT, PADDED, MASKED, CAPPED, FOLD,
    )  # fmt: skip

    dead = running_sum == 0.0
    divisor = tl.where(dead, 1.0, running_sum)
    share = mass / divisor[:, None]
    if BOOLEAN:
        # The two sums are compared, not the rounded quotient. NaN compares false and stays.
        share = tl.where(((mass >= divisor[:, None]) & (mass > 0.0)) | (share > 1.0), 1.0, share)
    place = (batch * heads + head) * num_rows + row.to(tl.int64)
    out_ptrs = out + ((batch * num_rows + row.to(tl.int64)) * heads + head)[:, None] * DIM_V + dim_v[None, :]
    result = (accumulator / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(out_ptrs, result, mask=(row < row_hi)[:, None] & (dim_v < DIM_V)[None, :])
    lse = tl.where(dead, float("-inf"), (running_max + tl.log2(divisor)) * LN_2)
    tl.store(lse_out + place, lse, mask=row < row_hi)
    group = tl.arange(0, GROUPS)[None, :]
    mass_ptrs = mass_out + place[:, None] * mass_stride + group
    tl.store(mass_ptrs, share, mask=(row < row_hi)[:, None] & (group < groups))


def forward(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, Dv) as q; mass (B, Hq, T, G), lse (B, Hq, T) in float32."""
    q, k, v = problem.q, problem.k, problem.v
    batch, num_rows, heads, _ = q.shape
    groups = problem.weights.shape[2]
    # Rows of a packed tensor that no sequence owns are rows that attend to nothing, and no program visits them, in the
    # backward pass neither. The pass over further groups leaves rows without keys alone.
    idle = problem.packed or k.shape[1] == 0
    out = (q.new_zeros if idle else q.new_empty)((batch, num_rows, heads, v.shape[3]))
    mass = (q.new_zeros if idle or groups > MAX_GROUPS else q.new_empty)(
        (batch, heads, num_rows, groups), dtype=torch.float32
    )
    lse = q.new_full((batch, heads, num_rows), -torch.inf, dtype=torch.float32)
    if out.numel() + lse.numel() == 0 or k.numel() == 0:
        return out, mass, lse
    # Out and lse once: further groups are a pass over their own keys. It knows no mask of all pairs, under which each
    # few groups take a visit of everything, out and lse the same every time.
    for start in range(0, groups if problem.mask is not None else 1, MAX_GROUPS):
        _attend(problem.of_groups(start, MAX_GROUPS), out, mass[..., start:], lse)
    if groups > MAX_GROUPS and problem.mask is None:
        rest = problem.of_groups(MAX_GROUPS, groups)
        mass_forward(rest, lse, list_queries(rest, None), mass[..., MAX_GROUPS:])
    return out, mass, lse


def _attend(problem: Problem, out: torch.Tensor, mass: torch.Tensor, lse: torch.Tensor) -> None:
    """Write out, lse, and the mass of at most MAX_GROUPS groups."""
    settings, groups = problem.settings(FORWARD), problem.weights.shape[2]
    num_heads = problem.q.shape[0] * problem.q.shape[2]
    blocks = classify(problem.weights, problem.padding, settings.keys, together=True)
    own = tiling(problem, settings.rows, of_keys=False) | {
        **blocks._asdict(),
        "out": out,
        "mass_out": mass,
        "lse_out": lse,
        "num_heads": num_heads,
        "section": problem.section(problem.repeat),
        "groups": groups,
        "GROUPS": triton.next_power_of_2(groups),
        "mass_stride": mass.stride(2),
        "BLOCK_M": settings.rows,
        "BLOCK_N": settings.keys,
        "BOOLEAN": problem.boolean,
    }
    launch(_forward, (own["num_tiles"] * num_heads,), problem.arguments() | own, settings)
