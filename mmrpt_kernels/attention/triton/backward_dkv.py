"""The backward pass of a block of keys: dk, dv and dw, from all rows that may attend to it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.config import DKV, MAX_GROUPS, PROGRAMS_WANTED
from mmrpt_kernels.attention.triton.key_blocks import classify
from mmrpt_kernels.attention.triton.launch import Problem, launch, tiling
from mmrpt_kernels.attention.triton.tiles import (
    LENGTHS,
    add_dmass,
    allowed_pairs,
    capped_scores,
    load_lse,
    load_tile,
    place_of_program,
    rows_of_keys,
    sequence_bounds,
)


@triton.jit
def _add_dw(dw, probability, dmass_ptrs, live, groups, DW_GROUPS: tl.constexpr):
    """dw (BLOCK_N, DW_GROUPS) plus probability (BLOCK_N, BLOCK_M) . dmass of the first `groups` groups."""
    for g in tl.static_range(DW_GROUPS):
        dmass = tl.load(dmass_ptrs + g, mask=live & (g < groups), other=0.0)  # (BLOCK_M,)
        part = tl.sum(probability * dmass[None, :], 1)  # (BLOCK_N,)
        dw = tl.where(tl.arange(0, DW_GROUPS)[None, :] == g, dw + part[:, None], dw)
    return dw


@triton.jit(do_not_specialize=LENGTHS)
def _backward_dkv(
    q, k, v, weights, padding, mask, kinds, dout, dmass, lse, delta_in, dk_out, dv_out, dw_out,
    cu_q, cu_k, tile_sequence, tile_first,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_wb, stride_ws, stride_wg, stride_pb, stride_ps, stride_mb, stride_mt, stride_ms,
    stride_dob, stride_dot, stride_doh,
    num_rows, num_keys, num_tiles, num_heads, heads, repeat, splits, section, groups, dw_first, left, right,
    scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, DW_GROUPS: tl.constexpr,
    HAS_DOUT: tl.constexpr, HAS_DMASS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key head, against the rows of its query heads, or of one split of them.

    dk_out (splits, B, S, Hkv, D), dv_out (splits, B, S, Hkv, Dv), dw_out (B, Hkv, splits, S, groups) float32.
    """
    tile, head_all = place_of_program(tl.program_id(0), num_tiles, num_heads, section)
    heads_kv = heads // repeat
    batch = (head_all // (heads_kv * splits)).to(tl.int64)
    head_kv = head_all // splits % heads_kv
    split = head_all % splits
    row_lo, row_hi, key_lo, key_hi, key_first = 0, num_rows, 0, num_keys, tile * BLOCK_N
    if PACKED:
        sequence = tl.load(tile_sequence + tile)
        if sequence < 0:
            return
        row_lo, row_hi, key_lo, key_hi = sequence_bounds(cu_q, cu_k, sequence)
        key_first = tl.load(tile_first + tile)
    shift = key_hi - row_hi
    key = key_first + tl.arange(0, BLOCK_N)
    keep = (key >= key_lo) & (key < key_hi)
    if PADDED:
        keep = keep & (tl.load(padding + batch * stride_pb + key * stride_ps, mask=keep, other=0) != 0)
    # Addresses as one 64-bit base and 32-bit offsets: tensors of 64-bit addresses cost twice the registers.
    place = tl.arange(0, BLOCK_N)
    start = key_first.to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_V)
    k_base = k + batch * stride_kb + head_kv.to(tl.int64) * stride_kh + start * stride_ks
    v_base = v + batch * stride_vb + head_kv.to(tl.int64) * stride_vh + start * stride_vs
    k_ptrs = k_base + (place[:, None] * stride_ks + dim[None, :])
    v_ptrs = v_base + (place[:, None] * stride_vs + dim_v[None, :])
    k_tile = load_tile(k_ptrs, keep[:, None], dim[None, :], True, DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    v_tile = load_tile(v_ptrs, keep[:, None], dim_v[None, :], True, DIM_V, BLOCK_V)  # (BLOCK_N, BLOCK_V)

    a, b = max(key_first, key_lo), min(key_first + BLOCK_N, key_hi) - 1
    origin, stop = rows_of_keys(a, b, shift, row_lo, row_hi, left, right, LEFT, RIGHT)
    first, last = rows_of_keys(b, a, shift, row_lo, row_hi, left, right, LEFT, RIGHT)
    blocks = tl.where(origin < stop, tl.cdiv(stop - origin, BLOCK_M), 0)
    inner_first = tl.cdiv(max(first - origin, 0), BLOCK_M)
    inner_stop = max(last - origin, 0) // BLOCK_M
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    dw = tl.zeros((BLOCK_N, max(1, DW_GROUPS)), tl.float32)
    block_kinds = kinds + (batch * tl.cdiv(num_keys, BLOCK_N) + key_first // BLOCK_N) * groups
    w_ptrs = (weights + batch * stride_wb + start * stride_ws) + place * stride_ws
    mask_base = mask + batch * stride_mb if MASKED else mask
    row_place = tl.arange(0, BLOCK_M)
    q_offsets = row_place[:, None] * stride_qt + dim[None, :]
    do_offsets = row_place[:, None] * stride_dot + dim_v[None, :] if HAS_DOUT else q_offsets
    per_split = repeat // splits
    for member in range(per_split):
        head = (head_kv * repeat + split * per_split + member).to(tl.int64)
        q_base = q + batch * stride_qb + head * stride_qh
        do_base = dout + batch * stride_dob + head * stride_doh if HAS_DOUT else dout
        places = (batch * heads + head) * num_rows
        dm_base = dmass + places * groups if HAS_DMASS else dmass
        # One loop with a branch, not one for each kind of block: two would not fit the registers.
        for block in range(0, blocks):
            row_start = origin + block * BLOCK_M + tl.full((), 0, tl.int64)
            row = origin + block * BLOCK_M + row_place
            live = row < row_hi  # (BLOCK_M,)
            q_ptrs = (q_base + row_start * stride_qt) + q_offsets
            q_tile = load_tile(q_ptrs, live[:, None], dim[None, :], True, DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            row_lse = load_lse((lse + places + row_start) + row_place, live)  # (BLOCK_M,)
            delta = tl.load((delta_in + places + row_start) + row_place, mask=live, other=0.0)  # (BLOCK_M,)
            scores, slope = capped_scores(tl.dot(k_tile, tl.trans(q_tile)), scale, softcap, CAPPED)
            # Keys that do not exist collect anything: nothing is stored for them.
            probability = tl.exp2(scores - row_lse[None, :])  # (BLOCK_N, BLOCK_M)
            if MASKED or (block < inner_first) | (block >= inner_stop):
                allowed = allowed_pairs(
                    row[None, :], key[:, None], shift, row_hi, key_lo, key_hi, left, right, mask_base, stride_mt,
                    stride_ms, LEFT, RIGHT, MASKED,
                )  # fmt: skip
                probability = tl.where(allowed, probability, 0.0)
            dp = tl.zeros_like(probability) - delta[None, :]
            if HAS_DOUT:
                do_ptrs = (do_base + row_start * stride_dot) + do_offsets
                do_tile = load_tile(do_ptrs, live[:, None], dim_v[None, :], True, DIM_V, BLOCK_V)  # (BLOCK_M, BLOCK_V)
                dv = tl.dot(probability.to(do_tile.dtype), do_tile, dv)
                dp = tl.dot(v_tile, tl.trans(do_tile), dp)
            if HAS_DMASS:
                dm_ptrs = (dm_base + row_start * groups) + row_place * groups
                dp = add_dmass(dp, w_ptrs, stride_wg, keep, dm_ptrs, live, block_kinds, groups, GROUPS, True)
                dw = _add_dw(dw, probability, dm_ptrs + dw_first, live, groups - dw_first, DW_GROUPS)
            ds = probability * dp * slope
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk)

    # Keys beyond the sequence are another program's; padded ones collected nonsense, and the outputs hold 0 for them.
    first_out = ((split * (num_heads // (heads_kv * splits)) + batch) * num_keys + start) * heads_kv + head_kv
    dk = (dk * scale).to(dk_out.dtype.element_ty)
    dk_ptrs = (dk_out + first_out * DIM) + (place[:, None] * (heads_kv * DIM) + dim[None, :])
    tl.store(dk_ptrs, dk, mask=keep[:, None] & (dim < DIM)[None, :])
    if HAS_DOUT:
        dv = dv.to(dv_out.dtype.element_ty)
        dv_ptrs = (dv_out + first_out * DIM_V) + (place[:, None] * (heads_kv * DIM_V) + dim_v[None, :])
        tl.store(dv_ptrs, dv, mask=keep[:, None] & (dim_v < DIM_V)[None, :])
    if DW_GROUPS > 0:
        group = dw_first + tl.arange(0, DW_GROUPS)[None, :]
        first_out = ((batch * heads_kv + head_kv) * splits + split) * num_keys + start
        tl.store(
            (dw_out + first_out * groups) + (place[:, None] * groups + group), dw, mask=keep[:, None] & (group < groups)
        )


def _splits(programs: int, repeat: int) -> int:
    """Over how many programs to spread the query heads of a key head: the fewest that keep a large GPU busy.

    From shapes alone, so that results do not depend on the device.
    """
    divisors = (n for n in range(1, repeat + 1) if repeat % n == 0)
    return next((n for n in divisors if programs * n >= PROGRAMS_WANTED), repeat)


def backward_dkv(
    problem: Problem, shared: dict[str, Any], dk: torch.Tensor, dv: torch.Tensor, dw: torch.Tensor | None
) -> None:
    """Write dk (B, S, Hkv, D), dv (B, S, Hkv, Dv) where dout came, and dw (B, S, G) float32 where wanted.

    shared: the arguments of both passes.
    """
    k = problem.k
    (batch, num_keys, heads_kv), groups = k.shape[:3], problem.weights.shape[2]
    settings = problem.settings(DKV)
    own = tiling(problem, settings.keys, of_keys=True)
    splits = _splits(own["num_tiles"] * batch * heads_kv, problem.repeat)
    # What several programs share they write apart, and a sum in a fixed order brings it together.
    parts = (dk, dv)
    if splits > 1:
        parts = tuple(x.new_zeros((splits, *x.shape), dtype=torch.float32) for x in (dk, dv))
    dw_parts = None if dw is None else dw.new_zeros((batch, heads_kv * splits, num_keys, groups))
    own |= {
        "kinds": classify(problem.weights, problem.padding, settings.keys).kinds,
        "dk_out": parts[0],
        "dv_out": parts[1],
        "dw_out": dw_parts,
        "num_heads": batch * heads_kv * splits,
        "splits": splits,
        "section": problem.section(splits),
        "BLOCK_M": settings.rows,
        "BLOCK_N": settings.keys,
    }
    # dw of more groups than fit the registers takes a launch each MAX_GROUPS; dk and dv come out the same every time.
    for start in range(0, 1 if dw is None else groups, MAX_GROUPS):
        count = 0 if dw is None else triton.next_power_of_2(min(groups - start, MAX_GROUPS))
        own |= {"dw_first": start, "DW_GROUPS": count}
        launch(_backward_dkv, (own["num_tiles"] * own["num_heads"],), shared | own, settings)
    if splits > 1:
        dk.copy_(parts[0].sum(0))
        if shared["HAS_DOUT"]:
            dv.copy_(parts[1].sum(0))
    if dw is not None:
        torch.sum(dw_parts, 1, out=dw)
