"""Fused forward pass: out, mass and lse of every row in one visit of its keys.

A program owns a block of rows of one head and walks the key blocks with an online softmax. The mass of a group is a
second row sum beside the softmax's own. Blocks without weight add nothing, blocks of weight 1 add the row sum that
is there already, and only blocks of both multiply per element. Both sums take the same steps in the same order, so
rounding, which never reverses an order, keeps the mass of boolean weights in [0, 1], and the two are equal bit for bit
where a row sees weighted keys alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.config import MAX_GROUPS, MAX_GROUPS_ALONE, forward_settings
from mmrpt_kernels.attention.triton.key_blocks import classify
from mmrpt_kernels.attention.triton.launch import Problem, architecture, launch, tiling
from mmrpt_kernels.attention.triton.tiles import (
    ALL,
    LENGTHS,
    LN_2,
    LOG2_E,
    SOME,
    band_allows,
    capped_scores,
    key_blocks_of_rows,
    load_tile,
    place_of_program,
)

__all__ = ["forward"]


@triton.jit
def _mass_of_block(mass, p, row_sum, alpha, block_kinds, w_ptrs, w_g, keep, groups, GROUPS: tl.constexpr):
    """mass (BLOCK_M, GROUPS) after a key block of probabilities p (BLOCK_M, BLOCK_N), unnormalised.

    keep (BLOCK_N,): keys that exist. GROUPS: groups, up to a power of two.
    """
    column = tl.arange(0, GROUPS)[None, :]
    for g in tl.static_range(GROUPS):
        kind = tl.load(block_kinds + g, mask=g < groups, other=0)
        part = tl.where(kind == ALL, row_sum, 0.0)
        if kind == SOME:
            w = tl.load(w_ptrs + g * w_g, mask=keep, other=0).to(tl.float32)  # (BLOCK_N,)
            part = tl.sum(p * w[None, :], 1)
        mass = tl.where(column == g, tl.fma(mass, alpha[:, None], part[:, None]), mass)
    return mass


@triton.jit
def _forward_blocks(
    acc, top, total, mass, q_tile, row, k_base, v_base, w_base, pad_base, mask_base, kinds_base,
    k_s, v_s, w_s, w_g, pad_s, mask_t, mask_s,
    first, gap_first, gap, stop, shift, row_hi, key_lo, key_hi, groups, left, right, scale, softcap,
    EDGE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, FOLD: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over key blocks [first, stop), `gap` blocks from gap_first on left out.

    EDGE: the band may forbid pairs, or the sequence end within a block. VALUES: whether acc sums values.
    """
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_V)
    place = tl.arange(0, BLOCK_N)
    k_offsets = place[:, None] * k_s + dim[None, :]
    v_offsets = place[:, None] * v_s + dim_v[None, :]
    for index in range(first, stop - gap):
        block = index + tl.where(index >= gap_first, gap, 0) if EDGE else index
        key = block * BLOCK_N + place
        start = block * BLOCK_N + tl.full((), 0, tl.int64)
        keep = (key >= key_lo) & (key < key_hi)  # (BLOCK_N,)
        if PADDED:
            keep = keep & (tl.load(pad_base + key * pad_s, mask=keep, other=0) != 0)
        k_ptrs = (k_base + start * k_s) + k_offsets
        some_keys: tl.constexpr = EDGE or PADDED
        k_tile = load_tile(k_ptrs, keep[:, None], dim[None, :], some_keys, DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        if VALUES:
            v_ptrs = (v_base + start * v_s) + v_offsets
            v_tile = load_tile(v_ptrs, keep[:, None], dim_v[None, :], some_keys, DIM_V, BLOCK_V)  # (BLOCK_N, BLOCK_V)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if FOLD:
            factor = scale * LOG2_E
        else:
            x, _ = capped_scores(x, scale, softcap, CAPPED)
            factor = 1.0
        if EDGE:
            allowed = band_allows(row[:, None], key[None, :], shift, key_lo, key_hi, left, right, LEFT, RIGHT)
            if MASKED:
                inside = (row < row_hi)[:, None] & (key < key_hi)[None, :]
                mask_ptrs = mask_base + row.to(tl.int64)[:, None] * mask_t + key.to(tl.int64)[None, :] * mask_s
                allowed = allowed & (tl.load(mask_ptrs, mask=inside, other=0) != 0)
            x = tl.where(allowed, x, float("-inf"))
        if PADDED:
            x = tl.where(keep[None, :], x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1) * factor)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without keys so far
        p = tl.exp2(x * factor - safe[:, None])
        alpha = tl.exp2(top - safe)
        row_sum = tl.sum(p, 1)
        total = tl.fma(total, alpha, row_sum)
        w_ptrs = (w_base + start * w_s) + place * w_s
        mass = _mass_of_block(mass, p, row_sum, alpha, kinds_base + block * groups, w_ptrs, w_g, keep, groups, GROUPS)
        if VALUES:
            acc = acc * alpha[:, None]
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total, mass


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    q, k, v, weights, padding, mask, kinds, out, mass_out, lse_out, norm_out, cu_q, cu_k, tile_sequence, tile_first,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, w_b, w_s, w_g, pad_b, pad_s, mask_b, mask_t, mask_s, mass_g,
    num_rows, num_keys, num_tiles, num_heads, heads, repeat, section, groups, left, right, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, BOOLEAN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, CAPPED: tl.constexpr, FOLD: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head.

    out (B, T, Hq, Dv), mass_out (B, Hq, T, mass_g), lse_out (B, Hq, T), norm_out (B, Hq, T, 2): see `forward`; without
    VALUES mass_out alone.
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
        row_hi = tl.load(cu_q + sequence + 1).to(tl.int32)
        key_lo = tl.load(cu_k + sequence).to(tl.int32)
        key_hi = tl.load(cu_k + sequence + 1).to(tl.int32)
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

    q_ptrs = q + batch * q_b + head.to(tl.int64) * q_h + row_first.to(tl.int64) * q_t
    q_ptrs += tl.arange(0, BLOCK_M)[:, None] * q_t + dim[None, :]
    q_tile = tl.load(q_ptrs, mask=(row < row_hi)[:, None] & (dim < DIM)[None, :], other=0.0)  # (BLOCK_M, BLOCK_D)
    k_base = k + batch * k_b + head_kv * k_h
    v_base = v + batch * v_b + head_kv * v_h
    w_base = weights + batch * w_b
    pad_base = padding + batch * pad_b if PADDED else padding
    mask_base = mask + batch * mask_b if MASKED else mask
    kinds_base = kinds + batch * tl.cdiv(num_keys, BLOCK_N) * groups
    acc = tl.zeros((BLOCK_M, BLOCK_V if VALUES else 1), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mass = tl.zeros((BLOCK_M, GROUPS), tl.float32)
    acc, top, total, mass = _forward_blocks(
        acc, top, total, mass, q_tile, row, k_base, v_base, w_base, pad_base, mask_base, kinds_base,
        k_s, v_s, w_s, w_g, pad_s, mask_t, mask_s,
        inner_first, 0, 0, inner_stop, shift, row_hi, key_lo, key_hi, groups, left, right, scale, softcap,
        False, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, GROUPS, LEFT, RIGHT, PADDED, MASKED, CAPPED, FOLD, VALUES,
        PRECISION,
    )  # fmt: skip
    acc, top, total, mass = _forward_blocks(
        acc, top, total, mass, q_tile, row, k_base, v_base, w_base, pad_base, mask_base, kinds_base,
        k_s, v_s, w_s, w_g, pad_s, mask_t, mask_s,
        first_block, inner_first, inner_stop - inner_first, stop_block, shift, row_hi, key_lo, key_hi, groups,
        left, right, scale, softcap,
        True, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, GROUPS, LEFT, RIGHT, PADDED, MASKED, CAPPED, FOLD, VALUES,
        PRECISION,
    )  # fmt: skip

    dead = total == 0.0
    divisor = tl.where(dead, 1.0, total)
    share = mass / divisor[:, None]
    if BOOLEAN:
        # The two sums are compared, not the rounded quotient. NaN compares false and stays.
        share = tl.where(((mass >= divisor[:, None]) & (mass > 0.0)) | (share > 1.0), 1.0, share)
    place = (batch * heads + head) * num_rows + row.to(tl.int64)
    if VALUES:
        out_ptrs = out + ((batch * num_rows + row.to(tl.int64)) * heads + head)[:, None] * DIM_V + dim_v[None, :]
        result = (acc / divisor[:, None]).to(out.dtype.element_ty)
        tl.store(out_ptrs, result, mask=(row < row_hi)[:, None] & (dim_v < DIM_V)[None, :])
        lse = tl.where(dead, float("-inf"), (top + tl.log2(divisor)) * LN_2)
        tl.store(lse_out + place, lse, mask=row < row_hi)
        tl.store(norm_out + 2 * place, tl.where(dead, float("inf"), top), mask=row < row_hi)
        tl.store(norm_out + 2 * place + 1, tl.where(dead, 0.0, 1.0 / divisor), mask=row < row_hi)
    group = tl.arange(0, GROUPS)[None, :]
    tl.store(mass_out + place[:, None] * mass_g + group, share, mask=(row < row_hi)[:, None] & (group < groups))


def forward(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, Dv) as q; mass (B, Hq, T, G), lse (B, Hq, T) and the normalizers (B, Hq, T, 2) in float32.

    Normalizers: the row's highest score m in units of log2, and 1 / sum exp2(x - m); (+inf, 0) in rows without keys.
    The backward pass makes its probabilities of them. An lse of size 100 is rounded by 100 eps / 4, which would scale
    all probabilities of the row; m is the very number that was subtracted, and the sum is good to eps.
    """
    q, k, v = problem.q, problem.k, problem.v
    batch, num_rows, heads, _ = q.shape
    groups = problem.weights.shape[2]
    # Rows of a packed tensor that no sequence owns are rows that attend to nothing, and no program visits them, in the
    # backward pass neither.
    idle = problem.packed or k.shape[1] == 0
    out = (q.new_zeros if idle else q.new_empty)((batch, num_rows, heads, v.shape[3]))
    mass = (q.new_zeros if idle else q.new_empty)((batch, heads, num_rows, groups), dtype=torch.float32)
    lse = q.new_full((batch, heads, num_rows), -torch.inf, dtype=torch.float32)
    norm = (lse.new_zeros if idle else lse.new_empty)((*lse.shape, 2))
    if out.numel() + lse.numel() == 0 or k.numel() == 0:
        return out, mass, lse, norm
    settings = forward_settings(architecture(q.device), q.dtype, max(problem.block_dims()), problem.rich)
    kinds = classify(problem.weights, problem.padding, settings.keys).kinds
    tiles = tiling(problem, settings.rows, of_keys=False)
    shared = problem.arguments() | {
        "out": out,
        "lse_out": lse,
        "norm_out": norm,
        **tiles,
        "num_heads": batch * heads,
        "section": problem.section(problem.repeat),
        "mass_g": groups,
        "BLOCK_M": settings.rows,
        "BLOCK_N": settings.keys,
        "BOOLEAN": problem.boolean,
    }
    # Groups that do not fit the registers take visits of their own. These walk all keys, not the weighted ones alone:
    # only a sum beside the mass, of the same steps, makes the mass of a row that sees weighted keys alone exactly 1.
    for start in (0, *range(MAX_GROUPS, groups, MAX_GROUPS_ALONE)):
        part = slice(start, min(start + (MAX_GROUPS_ALONE if start else MAX_GROUPS), groups))
        own = {
            "weights": problem.weights[..., part],
            "kinds": kinds[..., part].contiguous(),
            "mass_out": mass[..., part],
            "groups": part.stop - part.start,
            "GROUPS": triton.next_power_of_2(part.stop - part.start),
            "VALUES": start == 0,
        }
        # Left to itself the assembler gives a visit of halves without values 80 registers, and spills.
        options = {"maxnreg": 255} if start and q.dtype.itemsize == 2 else {}
        launch(_forward, tiles["num_tiles"] * batch * heads, shared | own, settings, **options)
    return out, mass, lse, norm
