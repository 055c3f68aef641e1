"""The backward pass of a block of rows: dq, from all keys that they may attend to; before it, delta of every row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.config import DQ, ROW_TERMS
from mmrpt_kernels.attention.triton.key_blocks import classify
from mmrpt_kernels.attention.triton.launch import Problem, launch, strides, tiling
from mmrpt_kernels.attention.triton.tiles import (
    LENGTHS,
    add_dmass,
    allowed_pairs,
    capped_scores,
    key_blocks_of_rows,
    load_lse,
    load_tile,
    place_of_program,
    sequence_bounds,
)


@triton.jit(do_not_specialize=LENGTHS)
def _row_terms(
    out, dout, mass_in, dmass, lse, dlse, delta_out, dmass_out, num_rows, heads, groups,
    stride_dob, stride_dot, stride_doh, stride_dmb, stride_dmh, stride_dmt, stride_dmg,
    stride_dlb, stride_dlh, stride_dlt,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DOUT: tl.constexpr, HAS_DMASS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """What both passes need of every row, so that a dead row has no part in anything, whatever gradient arrived for it.

    delta_out (B, Hq, T) and dmass_out (B, Hq, T, groups), 0 in dead rows. Programs: blocks of rows x heads x batch.
    """
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    head_all = tl.program_id(0) // num_tiles
    batch = (head_all // heads).to(tl.int64)
    head = (head_all % heads).to(tl.int64)
    row = (tl.program_id(0) % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < num_rows
    row = row.to(tl.int64)
    dim = tl.arange(0, BLOCK_V)
    places = (batch * heads + head) * num_rows + row
    dead = tl.load(lse + places, mask=inside, other=0.0) == float("-inf")  # (BLOCK_M,)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_DOUT:
        keep = inside[:, None] & (dim < DIM_V)[None, :]
        out_tile = tl.load(out + ((batch * num_rows + row) * heads + head)[:, None] * DIM_V + dim, mask=keep, other=0.0)
        do_tile = tl.load(
            dout + batch * stride_dob + head * stride_doh + row[:, None] * stride_dot + dim, mask=keep, other=0.0
        )
        total += tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)  # of (BLOCK_M, BLOCK_V)
    if HAS_DMASS:
        for g in range(groups):
            share = tl.load(mass_in + places * groups + g, mask=inside, other=0.0)  # (BLOCK_M,)
            dm_ptrs = dmass + batch * stride_dmb + head * stride_dmh + row * stride_dmt + g * stride_dmg
            change = tl.load(dm_ptrs, mask=inside & (dead == 0), other=0.0)  # (BLOCK_M,)
            total += share * change
            tl.store(dmass_out + places * groups + g, change, mask=inside)
    if HAS_DLSE:
        total -= tl.load(dlse + batch * stride_dlb + head * stride_dlh + row * stride_dlt, mask=inside, other=0.0)
    tl.store(delta_out + places, tl.where(dead, 0.0, total), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_dq(
    q, k, v, weights, padding, mask, kinds, dout, dmass, lse, delta_in, dq_out,
    cu_q, cu_k, tile_sequence, tile_first,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_wb, stride_ws, stride_wg, stride_pb, stride_ps, stride_mb, stride_mt, stride_ms,
    stride_dob, stride_dot, stride_doh,
    num_rows, num_keys, num_tiles, num_heads, heads, repeat, section, groups, left, right, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, HAS_DOUT: tl.constexpr,
    HAS_DMASS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head against their keys. dq_out (B, T, Hq, D)."""
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
    live = row < row_hi
    # Addresses as one 64-bit base and 32-bit offsets: tensors of 64-bit addresses cost twice the registers.
    place = tl.arange(0, BLOCK_M)
    start = row_first.to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_V)

    first_block, inner_first, inner_stop, stop_block = key_blocks_of_rows(
        row_first, row_last, shift, key_lo, key_hi, left, right, LEFT, RIGHT, BLOCK_N
    )

    head = head.to(tl.int64)
    q_base = q + batch * stride_qb + head * stride_qh + start * stride_qt
    q_ptrs = q_base + (place[:, None] * stride_qt + dim[None, :])
    q_tile = load_tile(q_ptrs, live[:, None], dim[None, :], True, DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    do_tile = q_tile
    if HAS_DOUT:
        do_base = dout + batch * stride_dob + head * stride_doh + start * stride_dot
        do_ptrs = do_base + (place[:, None] * stride_dot + dim_v[None, :])
        do_tile = load_tile(do_ptrs, live[:, None], dim_v[None, :], True, DIM_V, BLOCK_V)  # (BLOCK_M, BLOCK_V)
    places = (batch * heads + head) * num_rows + start
    row_lse = load_lse((lse + places) + place, live)  # (BLOCK_M,)
    delta = tl.load((delta_in + places) + place, mask=live, other=0.0)  # (BLOCK_M,)
    dm_ptrs = (dmass + places * groups) + place * groups if HAS_DMASS else place
    k_base = k + batch * stride_kb + head_kv * stride_kh
    v_base = v + batch * stride_vb + head_kv * stride_vh
    w_base = weights + batch * stride_wb
    pad_base = padding + batch * stride_pb if PADDED else padding
    mask_base = mask + batch * stride_mb if MASKED else mask
    kinds_base = kinds + batch * tl.cdiv(num_keys, BLOCK_N) * groups
    key_place = tl.arange(0, BLOCK_N)
    k_offsets = key_place[:, None] * stride_ks + dim[None, :]
    v_offsets = key_place[:, None] * stride_vs + dim_v[None, :]
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # One loop with a branch, not one for each kind of block: two would not fit the registers.
    for block in range(first_block, stop_block):
        key = block * BLOCK_N + key_place
        key_start = block * BLOCK_N + tl.full((), 0, tl.int64)
        keep = (key >= key_lo) & (key < key_hi)  # (BLOCK_N,)
        if PADDED:
            keep = keep & (tl.load(pad_base + key * stride_ps, mask=keep, other=0) != 0)
        k_ptrs = (k_base + key_start * stride_ks) + k_offsets
        k_tile = load_tile(k_ptrs, keep[:, None], dim[None, :], True, DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        scores, slope = capped_scores(tl.dot(q_tile, tl.trans(k_tile)), scale, softcap, CAPPED)
        probability = tl.exp2(scores - row_lse[:, None])  # (BLOCK_M, BLOCK_N)
        if MASKED or (block < inner_first) | (block >= inner_stop):
            allowed = allowed_pairs(
                row[:, None], key[None, :], shift, row_hi, key_lo, key_hi, left, right, mask_base, stride_mt, stride_ms,
                LEFT, RIGHT, MASKED,
            )  # fmt: skip
            probability = tl.where(allowed, probability, 0.0)
        if PADDED:
            probability = tl.where(keep[None, :], probability, 0.0)
        dp = tl.zeros_like(probability) - delta[:, None]
        if HAS_DOUT:
            v_ptrs = (v_base + key_start * stride_vs) + v_offsets
            v_tile = load_tile(v_ptrs, keep[:, None], dim_v[None, :], True, DIM_V, BLOCK_V)  # (BLOCK_N, BLOCK_V)
            dp = tl.dot(do_tile, tl.trans(v_tile), dp)
        if HAS_DMASS:
            w_ptrs = (w_base + key_start * stride_ws) + key_place * stride_ws
            block_kinds = kinds_base + block * groups
            dp = add_dmass(dp, w_ptrs, stride_wg, keep, dm_ptrs, live, block_kinds, groups, GROUPS, False)
        ds = probability * dp * slope
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq)
    dq_base = dq_out + ((batch * num_rows + start) * heads + head) * DIM
    dq_ptrs = dq_base + (place[:, None] * (heads * DIM) + dim[None, :])
    tl.store(dq_ptrs, (dq * scale).to(dq_out.dtype.element_ty), mask=live[:, None] & (dim < DIM)[None, :])


def row_terms(
    problem: Problem, results: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """delta (B, Hq, T), dmass (B, Hq, T, G): as the kernel says. results: out, mass, lse."""
    out, mass, lse = results
    dout, dmass, dlse = gradients
    (batch, heads, num_rows), block = lse.shape, ROW_TERMS.rows
    made = (lse.new_empty((batch, heads, num_rows)), None if dmass is None else torch.empty_like(mass))
    arguments = {
        "out": out,
        "dout": dout,
        "mass_in": mass,
        "dmass": dmass,
        "lse": lse,
        "dlse": dlse,
        "delta_out": made[0],
        "dmass_out": made[1],
        "num_rows": num_rows,
        "heads": heads,
        "groups": mass.shape[3],
        **strides("do", "bth", dout),
        **strides("dm", "bhtg", dmass),
        **strides("dl", "bht", dlse),
        "DIM_V": problem.v.shape[3],
        "BLOCK_V": problem.block_dims()[1],
        "BLOCK_M": block,
        "HAS_DOUT": dout is not None,
        "HAS_DMASS": dmass is not None,
        "HAS_DLSE": dlse is not None,
    }
    launch(_row_terms, (triton.cdiv(num_rows, block) * batch * heads,), arguments, ROW_TERMS)
    return made


def backward_dq(problem: Problem, shared: dict[str, Any], dq: torch.Tensor) -> None:
    """Write dq (B, T, Hq, D). shared: the arguments of both passes."""
    q = problem.q
    settings = problem.settings(DQ)
    heads = q.shape[0] * q.shape[2]
    own = tiling(problem, settings.rows, of_keys=False) | {
        "kinds": classify(problem.weights, problem.padding, settings.keys).kinds,
        "dq_out": dq,
        "num_heads": heads,
        "section": problem.section(problem.repeat),
        "BLOCK_M": settings.rows,
        "BLOCK_N": settings.keys,
    }
    launch(_backward_dq, (own["num_tiles"] * heads,), shared | own, settings)
