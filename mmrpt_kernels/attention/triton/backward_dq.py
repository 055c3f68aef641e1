"""The backward pass over rows: dq of a block of rows, from all keys that they may attend to; and the rows' terms."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.config import ROW_TERMS, dq_settings
from mmrpt_kernels.attention.triton.key_blocks import classify
from mmrpt_kernels.attention.triton.launch import Problem, architecture, launch, strides, tiling
from mmrpt_kernels.attention.triton.tiles import (
    LENGTHS,
    band_allows,
    capped_scores,
    key_blocks_of_rows,
    load_tile,
    place_of_program,
    products_of,
    weigh,
)

__all__ = ["backward_dq", "row_terms"]


@triton.jit(do_not_specialize=LENGTHS)
def _row_terms(
    q, out, dout, mass_in, dmass, norm_in, dlse, delta_out, dmass_out, num_rows, heads, groups,
    do_b, do_t, do_h, dm_b, dm_h, dm_t, dm_g, dl_b, dl_h, dl_t,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DOUT: tl.constexpr, HAS_DMASS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """What both passes need of every row, so that a dead row has no part in anything, whatever gradient arrived for it.

    delta_out (B, Hq, T) and dmass_out (B, Hq, T, groups), 0 in dead rows. Programs: blocks of rows x heads x batch. q
    is not read.
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
    dead = tl.load(norm_in + 2 * places + 1, mask=inside, other=0.0) == 0.0  # (BLOCK_M,)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_DOUT:
        keep = inside[:, None] & (dim < DIM_V)[None, :]
        out_tile = tl.load(out + ((batch * num_rows + row) * heads + head)[:, None] * DIM_V + dim, mask=keep, other=0.0)
        do_tile = tl.load(dout + batch * do_b + head * do_h + row[:, None] * do_t + dim, mask=keep, other=0.0)
        total += tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)  # of (BLOCK_M, BLOCK_V)
    if HAS_DMASS:
        for g in range(groups):
            share = tl.load(mass_in + places * groups + g, mask=inside, other=0.0)  # (BLOCK_M,)
            dm_ptrs = dmass + batch * dm_b + head * dm_h + row * dm_t + g * dm_g
            change = tl.load(dm_ptrs, mask=inside & (dead == 0), other=0.0)  # (BLOCK_M,)
            total += share * change
            tl.store(dmass_out + places * groups + g, change, mask=inside)
    if HAS_DLSE:
        total -= tl.load(dlse + batch * dl_b + head * dl_h + row * dl_t, mask=inside, other=0.0)
    tl.store(delta_out + places, tl.where(dead, 0.0, total), mask=inside)


@triton.jit
def _keys_of_row_block(
    dq, q_tile, q_at, do_tile, do_at, row, live, top, share, delta, k_base, v_base, w_base, pad_base, mask_base,
    dm_ptrs, kinds_base, k_s, v_s, w_s, w_g, pad_s, mask_t, mask_s,
    first, inner_first, inner_stop, stop, shift, row_hi, key_lo, key_hi, groups, left, right, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SLICE_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, HAS_DOUT: tl.constexpr,
    HAS_DMASS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq after key blocks [first, stop); the band cuts only blocks outside [inner_first, inner_stop).

    top, share (BLOCK_M,): the rows' normalizers. One loop with a branch, not one for each kind of block: two would not
    fit the registers.
    """
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_V)
    place = tl.arange(0, BLOCK_N)
    k_offsets = place[:, None] * k_s + dim[None, :]
    v_offsets = place[:, None] * v_s + dim_v[None, :]
    for block in range(first, stop):
        key = block * BLOCK_N + place
        start = block * BLOCK_N + tl.full((), 0, tl.int64)
        keep = (key >= key_lo) & (key < key_hi)  # (BLOCK_N,)
        if PADDED:
            keep = keep & (tl.load(pad_base + key * pad_s, mask=keep, other=0) != 0)
        k_tile = load_tile((k_base + start * k_s) + k_offsets, keep[:, None], dim[None, :], True, DIM, BLOCK_D)
        k_at = (k_base + start * k_s) + place * k_s
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        products = products_of(q_at, k_at, live, keep, q_tile, k_tile, products, DIM, SLICE_D, PRECISION)
        x, bend = capped_scores(products, scale, softcap, CAPPED)
        p = tl.exp2(x - top[:, None]) * share[:, None]
        if MASKED or (block < inner_first) | (block >= inner_stop):
            allowed = band_allows(row[:, None], key[None, :], shift, key_lo, key_hi, left, right, LEFT, RIGHT)
            if MASKED:
                inside = (row < row_hi)[:, None] & (key < key_hi)[None, :]
                mask_ptrs = mask_base + row.to(tl.int64)[:, None] * mask_t + key.to(tl.int64)[None, :] * mask_s
                allowed = allowed & (tl.load(mask_ptrs, mask=inside, other=0) != 0)
            p = tl.where(allowed, p, 0.0)
        if PADDED:
            p = tl.where(keep[None, :], p, 0.0)
        dp = tl.zeros_like(p) - delta[:, None]
        if HAS_DOUT:
            v_ptrs = (v_base + start * v_s) + v_offsets
            v_tile = load_tile(v_ptrs, keep[:, None], dim_v[None, :], True, DIM_V, BLOCK_V)  # (BLOCK_N, BLOCK_V)
            v_at = (v_base + start * v_s) + place * v_s
            dp = products_of(do_at, v_at, live, keep, do_tile, v_tile, dp, DIM_V, SLICE_D, PRECISION)
        if HAS_DMASS:
            extra = tl.zeros_like(delta)
            w_ptrs = (w_base + start * w_s) + place * w_s
            kinds = kinds_base + block * groups
            dp, extra = weigh(dp, extra, w_ptrs, w_g, keep, dm_ptrs, live, kinds, groups, GROUPS, False)
            dp += extra[:, None]
        ds = p * dp * bend
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def _backward_dq(
    q, k, v, weights, padding, mask, kinds, dout, dmass, norm_in, delta_in, dq_out,
    cu_q, cu_k, tile_sequence, tile_first,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, w_b, w_s, w_g, pad_b, pad_s, mask_b, mask_t, mask_s,
    do_b, do_t, do_h,
    num_rows, num_keys, num_tiles, num_heads, heads, repeat, section, groups, left, right, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SLICE_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, HAS_DOUT: tl.constexpr,
    HAS_DMASS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, CAPPED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
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
        row_hi = tl.load(cu_q + sequence + 1).to(tl.int32)
        key_lo = tl.load(cu_k + sequence).to(tl.int32)
        key_hi = tl.load(cu_k + sequence + 1).to(tl.int32)
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
    q_base = q + batch * q_b + head * q_h + start * q_t
    q_ptrs = q_base + (place[:, None] * q_t + dim[None, :])
    q_tile = load_tile(q_ptrs, live[:, None], dim[None, :], True, DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    q_at, do_tile, do_at = q_base + place * q_t, q_tile, place
    if HAS_DOUT:
        do_base = dout + batch * do_b + head * do_h + start * do_t
        do_ptrs = do_base + (place[:, None] * do_t + dim_v[None, :])
        do_tile = load_tile(do_ptrs, live[:, None], dim_v[None, :], True, DIM_V, BLOCK_V)  # (BLOCK_M, BLOCK_V)
        do_at = do_base + place * do_t
    places = (batch * heads + head) * num_rows + start
    top = tl.load((norm_in + 2 * places) + 2 * place, mask=live, other=float("inf"))  # (BLOCK_M,)
    share = tl.load((norm_in + 2 * places) + (2 * place + 1), mask=live, other=0.0)  # (BLOCK_M,)
    delta = tl.load((delta_in + places) + place, mask=live, other=0.0)  # (BLOCK_M,)
    dm_ptrs = (dmass + places * groups) + place * groups if HAS_DMASS else place
    k_base = k + batch * k_b + head_kv * k_h
    v_base = v + batch * v_b + head_kv * v_h
    w_base = weights + batch * w_b
    pad_base = padding + batch * pad_b if PADDED else padding
    mask_base = mask + batch * mask_b if MASKED else mask
    kinds_base = kinds + batch * tl.cdiv(num_keys, BLOCK_N) * groups
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = _keys_of_row_block(
        dq, q_tile, q_at, do_tile, do_at, row, live, top, share, delta, k_base, v_base, w_base, pad_base, mask_base,
        dm_ptrs, kinds_base, k_s, v_s, w_s, w_g, pad_s, mask_t, mask_s,
        first_block, inner_first, inner_stop, stop_block, shift, row_hi, key_lo, key_hi, groups, left, right,
        scale, softcap,
        DIM, DIM_V, BLOCK_D, BLOCK_V, SLICE_D, BLOCK_M, BLOCK_N, GROUPS, HAS_DOUT, HAS_DMASS,
        LEFT, RIGHT, PADDED, MASKED, CAPPED, PRECISION,
    )  # fmt: skip
    dq_base = dq_out + ((batch * num_rows + start) * heads + head) * DIM
    dq_ptrs = dq_base + (place[:, None] * (heads * DIM) + dim[None, :])
    tl.store(dq_ptrs, (dq * scale).to(dq_out.dtype.element_ty), mask=live[:, None] & (dim < DIM)[None, :])


def row_terms(
    problem: Problem, results: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """delta (B, Hq, T), dmass (B, Hq, T, G): as the kernel says. results: out, mass, normalizers."""
    out, mass, norm = results
    dout, dmass, dlse = gradients
    (batch, heads, num_rows), block = norm.shape[:3], ROW_TERMS.rows
    made = (norm.new_empty((batch, heads, num_rows)), None if dmass is None else torch.empty_like(mass))
    arguments = {
        "q": problem.q,
        "out": out,
        "dout": dout,
        "mass_in": mass,
        "dmass": dmass,
        "norm_in": norm,
        "dlse": dlse,
        "delta_out": made[0],
        "dmass_out": made[1],
        "num_rows": num_rows,
        "heads": heads,
        "groups": mass.shape[3],
        **strides("do", "bth", dout),
        **strides("dm", "bhtg", dmass),
        **strides("dl", "bht", dlse),
        "DIM_V": out.shape[3],
        "BLOCK_V": problem.block_dims()[1],
        "BLOCK_M": block,
        "HAS_DOUT": dout is not None,
        "HAS_DMASS": dmass is not None,
        "HAS_DLSE": dlse is not None,
    }
    launch(_row_terms, triton.cdiv(num_rows, block) * batch * heads, arguments, ROW_TERMS)
    return made


def backward_dq(problem: Problem, shared: dict[str, Any], dq: torch.Tensor) -> None:
    """Write dq (B, T, Hq, D). shared: the arguments of both passes."""
    q = problem.q
    settings = dq_settings(architecture(q.device), q.dtype, max(problem.block_dims()), problem.rich)
    heads = q.shape[0] * q.shape[2]
    own = tiling(problem, settings.rows, of_keys=False) | {
        "kinds": classify(problem.weights, problem.padding, settings.keys).kinds,
        "dq_out": dq,
        "num_heads": heads,
        "section": problem.section(problem.repeat),
        "BLOCK_M": settings.rows,
        "BLOCK_N": settings.keys,
        "SLICE_D": settings.slice_d,
    }
    launch(_backward_dq, own["num_tiles"] * heads, shared | own, settings)
