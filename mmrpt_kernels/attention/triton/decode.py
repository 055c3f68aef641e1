"""A few new rows (16 at most) over a long cache of keys: the keys are split over programs, then the splits are merged.

All query heads that share a key head, and all new rows, stand as rows of one tile, so that a key is read once. Each
split leaves its unnormalised out, mass, row sum and maximum; a second kernel merges them in a fixed order. Reading keys
and values is all the time it takes, so the mass multiplies per key and needs no classification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.config import MAX_GROUPS_DECODE, decode_settings
from mmrpt_kernels.attention.triton.launch import Problem, architecture
from mmrpt_kernels.attention.triton.tiles import LENGTHS, LN_2, capped_scores

__all__ = ["MAX_ROWS", "decode", "serves"]

MAX_ROWS = 16
MIN_KEYS = 128  # below it one program does all the work, and the merge is for nothing
MAX_SPLITS = 64
# Multiprocessors that a launch is cut for where there is no device to ask.
NO_DEVICE = 3


@triton.jit(do_not_specialize=LENGTHS)
def _split_kernel(
    q, k, v, weights, padding, mask, parts, mass_parts, top_parts, total_parts,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    w_b, w_s, w_g, pad_b, pad_s, mask_b, mask_t, mask_s,
    num_rows, num_keys, heads, repeat, groups, splits, tiles, first_block, blocks_of_split, left, right, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, SLICE_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the keys against BLOCK_M of a key head's rows; row r is new row r // repeat of head r % repeat.

    parts (B, Hq, T, splits, Dv), mass_parts (B, Hq, T, splits, groups), top_parts, total_parts (B, Hq, T, splits).
    Grid: (splits, key heads * tiles, samples).
    """
    split = tl.program_id(0)
    head_kv = (tl.program_id(1) // tiles).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    r = (tl.program_id(1) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    t = r // repeat
    head = head_kv * repeat + r % repeat
    live = t < num_rows
    d = tl.arange(0, SLICE_D)
    e = tl.arange(0, BLOCK_V)
    q_at = q + batch * q_b + head * q_h + t.to(tl.int64) * q_t
    q_tile = tl.load(
        q_at[:, None] + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0
    )  # (BLOCK_M, SLICE_D)
    k += batch * k_b + head_kv * k_h
    v += batch * v_b + head_kv * v_h
    weights += batch * w_b
    position = t + (num_keys - num_rows)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mass = tl.zeros((BLOCK_M, GROUPS), tl.float32)
    column = tl.arange(0, GROUPS)[None, :]
    begin = first_block + split * blocks_of_split
    for block in range(begin, min(begin + blocks_of_split, tl.cdiv(num_keys, BLOCK_N))):
        key = block * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        at = key.to(tl.int64)
        keep = key < num_keys
        if PADDED:
            keep &= tl.load(padding + batch * pad_b + at * pad_s, mask=keep, other=0) != 0
        k_at = k + at[None, :] * k_s + d[:, None]
        k_tile = tl.load(k_at, mask=keep[None, :] & (d < DIM)[:, None], other=0.0)  # (SLICE_D, BLOCK_N)
        v_at = v + at[:, None] * v_s + e[None, :]
        v_tile = tl.load(v_at, mask=keep[:, None] & (e < DIM_V)[None, :], other=0.0)  # (BLOCK_N, BLOCK_V)
        products = tl.dot(q_tile, k_tile, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        for done in range(SLICE_D, DIM, SLICE_D):
            within = d < DIM - done
            q_slice = tl.load(q_at[:, None] + done + d[None, :], mask=live[:, None] & within[None, :], other=0.0)
            k_slice = tl.load(k_at + done, mask=keep[None, :] & within[:, None], other=0.0)
            products = tl.dot(q_slice, k_slice, products, input_precision=PRECISION)
        scores, _ = capped_scores(products, scale, softcap, CAPPED)
        allowed = live[:, None] & keep[None, :]  # (BLOCK_M, BLOCK_N)
        if LEFT:
            allowed &= key[None, :] >= (position - left)[:, None]
        if RIGHT:
            allowed &= key[None, :] <= (position + right)[:, None]
        if MASKED:
            mask_at = mask + batch * mask_b + t.to(tl.int64)[:, None] * mask_t + at[None, :] * mask_s
            allowed &= tl.load(mask_at, mask=allowed, other=0) != 0
        scores = tl.where(allowed, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without keys so far
        probs = tl.exp2(scores - safe[:, None])
        alpha = tl.exp2(top - safe)
        total = tl.fma(total, alpha, tl.sum(probs, axis=1))
        for g in tl.static_range(GROUPS):
            weight = tl.load(weights + at * w_s + g * w_g, mask=keep & (g < groups), other=0).to(tl.float32)
            part = tl.sum(probs * weight[None, :], axis=1)
            mass = tl.where(column == g, tl.fma(mass, alpha[:, None], part[:, None]), mass)
        acc = tl.dot(probs.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
        top = new_top
    place = ((batch * heads + head) * num_rows + t) * splits + split
    tl.store(parts + place[:, None] * DIM_V + e[None, :], acc, mask=live[:, None] & (e < DIM_V)[None, :])
    tl.store(mass_parts + place[:, None] * groups + column, mass, mask=live[:, None] & (column < groups))
    tl.store(top_parts + place, top, mask=live)
    tl.store(total_parts + place, total, mask=live)


@triton.jit(do_not_specialize=LENGTHS)
def _merge_kernel(
    parts, mass_parts, top_parts, total_parts, out, mass_out, lse_out, norm_out, num_rows, heads, groups, splits,
    out_b, out_t, out_h, mass_g,
    DIM_V: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, BOOLEAN: tl.constexpr,
):  # fmt: skip
    """One row of one head from its splits.

    out (B, T, Hq, Dv), mass_out (B, Hq, T, groups), lse_out (B, Hq, T), norm_out (B, Hq, T, 2).
    """
    place = tl.program_id(0).to(tl.int64)  # (B, Hq, T) row-major
    t = place % num_rows
    head = place // num_rows % heads
    batch = place // num_rows // heads
    split = tl.arange(0, SPLITS)
    e = tl.arange(0, BLOCK_V)
    there = split < splits
    at = place * splits + split
    top = tl.load(top_parts + at, mask=there, other=float("-inf"))  # (SPLITS,)
    highest = tl.max(top, axis=0)
    factor = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(tl.load(total_parts + at, mask=there, other=0.0) * factor, axis=0)
    dead = total == 0.0
    divisor = tl.where(dead, 1.0, total)
    tl.store(lse_out + place, tl.where(dead, float("-inf"), (highest + tl.log2(divisor)) * LN_2))
    tl.store(norm_out + 2 * place, tl.where(dead, float("inf"), highest))
    tl.store(norm_out + 2 * place + 1, tl.where(dead, 0.0, 1.0 / divisor))
    acc = tl.load(parts + at[:, None] * DIM_V + e[None, :], mask=there[:, None] & (e < DIM_V)[None, :], other=0.0)
    result = tl.sum(acc * factor[:, None], axis=0) / divisor  # (BLOCK_V,)
    out_at = out + batch * out_b + t * out_t + head * out_h + e
    tl.store(out_at, result.to(out.dtype.element_ty), mask=e < DIM_V)
    for g in range(0, groups):
        mass = tl.sum(tl.load(mass_parts + at * groups + g, mask=there, other=0.0) * factor, axis=0)
        share = mass / divisor
        if BOOLEAN:
            # Both sums took the same steps: equal where a row sees weighted keys alone. NaN compares false and stays.
            share = tl.where(((mass >= divisor) & (mass > 0.0)) | (share > 1.0), 1.0, share)
        tl.store(mass_out + place * mass_g + g, share)


def serves(problem: Problem) -> bool:
    """Whether splitting the keys is the way for this call: few rows, many keys, one sequence a sample."""
    rows, keys = problem.q.shape[1], problem.k.shape[1]
    return not problem.packed and 0 < rows <= MAX_ROWS and keys >= MIN_KEYS


def _splits(programs: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """(splits, key blocks of each): two programs for every multiprocessor, if there are keys enough."""
    processors = NO_DEVICE
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(MAX_SPLITS, blocks, max(1, triton.cdiv(2 * processors, programs)))
    blocks_of_split = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, blocks_of_split), blocks_of_split


def decode(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, mass, lse and normalizers as `forward` returns them, for calls that `serves` admits."""
    q, k, v = problem.q, problem.k, problem.v
    (batch, num_rows, heads, _), (_, num_keys, heads_kv, _), dim_v = q.shape, k.shape, v.shape[3]
    groups, device = problem.weights.shape[2], q.device
    out = q.new_empty((batch, num_rows, heads, dim_v))
    mass = q.new_empty((batch, heads, num_rows, groups), dtype=torch.float32)
    lse = q.new_empty((batch, heads, num_rows), dtype=torch.float32)
    norm = lse.new_empty((*lse.shape, 2))
    if lse.numel() == 0:
        return out, mass, lse, norm
    settings = decode_settings(architecture(device), q.dtype, max(problem.block_dims()), problem.rich)
    stacked = num_rows * problem.repeat
    block_m = min(settings.rows, max(16, triton.next_power_of_2(stacked)))
    tiles = triton.cdiv(stacked, block_m)
    # A window leaves the beginning of the cache to nobody.
    left = problem.options.window_left
    first_block = max(0, num_keys - num_rows - left) // settings.keys if left >= 0 else 0
    blocks = triton.cdiv(num_keys, settings.keys) - first_block
    splits, blocks_of_split = _splits(batch * heads_kv * tiles, blocks, device)
    rows = (batch, heads, num_rows, splits)
    parts = q.new_empty((*rows, dim_v), dtype=torch.float32)
    top_parts, total_parts = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    arguments = problem.arguments()
    for name in ("cu_q", "cu_k", "PACKED", "FOLD", "BLOCK_D"):
        del arguments[name]
    block_d = problem.block_dims()[0]
    # Of wider float32 rows the parts that matrix units take would not fit the registers.
    arguments["SLICE_D"] = min(block_d, 64 if block_d <= 128 else 32) if q.dtype == torch.float32 else block_d
    launch = {"num_warps": settings.warps, "num_stages": settings.stages, "maxnreg": 255}
    # More groups than fit the registers take visits of their own; out and lse come out the same every time.
    for start in range(0, max(1, groups), MAX_GROUPS_DECODE):
        part = slice(start, min(start + MAX_GROUPS_DECODE, groups))
        size = part.stop - part.start
        mass_parts = q.new_empty((*rows, size), dtype=torch.float32)
        own = {
            "weights": problem.weights[..., part],
            "parts": parts,
            "mass_parts": mass_parts,
            "top_parts": top_parts,
            "total_parts": total_parts,
            "groups": size,
            "splits": splits,
            "tiles": tiles,
            "first_block": first_block,
            "blocks_of_split": blocks_of_split,
            "BLOCK_M": block_m,
            "BLOCK_N": settings.keys,
            "GROUPS": max(1, triton.next_power_of_2(size)),
        }
        _split_kernel[(splits, heads_kv * tiles, batch)](**arguments | own, **launch)
        _merge_kernel[(lse.numel(),)](
            parts,
            mass_parts,
            top_parts,
            total_parts,
            out,
            mass[..., part],
            lse,
            norm,
            num_rows,
            heads,
            size,
            splits,
            *out.stride()[:3],
            groups,
            DIM_V=dim_v,
            BLOCK_V=arguments["BLOCK_V"],
            SPLITS=triton.next_power_of_2(splits),
            BOOLEAN=problem.boolean,
            num_warps=4,
        )
    return out, mass, lse, norm
