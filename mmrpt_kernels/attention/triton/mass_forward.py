"""Mass from a known lse: a pass over the wanted rows and, of the keys, only the blocks that carry weight.

    mass[t, g] = sum_j exp(s[t, j] - lse[t]) w[j, g]

A program computes one tile of wanted rows, one head and one group over the group's own lists of key blocks: groups that
share no block (one per image, say) together cost what one of them over all their blocks would.

With boolean weights the weighted keys of a row are counted besides: where they are all that the row may attend to, the
mass is exactly 1, whatever rounding made of the lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.config import MASS
from mmrpt_kernels.attention.triton.key_blocks import classify
from mmrpt_kernels.attention.triton.launch import Problem, launch, strides
from mmrpt_kernels.attention.triton.query_list import QueryList
from mmrpt_kernels.attention.triton.tiles import LENGTHS, capped_scores, load_lse, load_tile


@triton.jit
def _blocks_without_edges(
    mass, count, q_tile, row_lse, k_base, lists, first, stop, stride_ks, scale, softcap,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """mass and count (BLOCK_M,) after entries [first, stop) of a list of blocks of weight 1 that all rows see."""
    dim = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_N)[:, None] * stride_ks + dim[None, :]
    for i in range(first, stop):
        start = (tl.load(lists + i) * BLOCK_N).to(tl.int64)
        k_tile = load_tile((k_base + start * stride_ks) + offsets, dim[None, :] >= 0, dim[None, :], False, DIM, BLOCK_D)
        scores, _ = capped_scores(tl.dot(q_tile, tl.trans(k_tile)), scale, softcap, CAPPED)  # (BLOCK_M, BLOCK_N)
        mass += tl.sum(tl.exp2(scores - row_lse[:, None]), 1)
        count += BLOCK_N
    return mass, count


@triton.jit(do_not_specialize=LENGTHS)
def _mass_forward(
    q, k, lse, weights, padding, allowed_before, mass, rows, first, last, counts, lists, before,
    num_rows, num_keys, num_blocks, heads, repeat, groups, mass_stride, scale, softcap,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_lb, stride_lh, stride_lt,
    stride_wb, stride_ws, stride_wg, stride_pb, stride_ps,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, PADDED: tl.constexpr, BOOLEAN: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head against one group's key blocks. Grid: (tiles, heads * groups, samples).

    mass (B, Hq, T, mass_stride): the first `groups` columns are written. allowed_before (B, S + 1): see `mass_forward`.
    """
    head = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    num_queries = tl.load(counts + batch)
    if tl.program_id(0) * BLOCK_M >= num_queries:
        return
    entry = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = entry < num_queries
    entry = batch * num_rows + entry
    row = tl.load(rows + entry, mask=live, other=0).to(tl.int64)
    low = tl.load(first + entry, mask=live, other=2147483647)  # the row's keys are [low, high)
    high = tl.load(last + entry, mask=live, other=0)
    lists += (batch * groups + group) * 2 * num_blocks
    before += (batch * groups + group) * 2 * (num_blocks + 1)
    before_some = before + num_blocks + 1
    k_base = k + batch * stride_kb + (head // repeat) * stride_kh
    w_base = weights + batch * stride_wb + group * stride_wg
    pad_base = padding + batch * stride_pb if PADDED else padding
    dim = tl.arange(0, BLOCK_D)
    place = tl.arange(0, BLOCK_N)
    k_offsets = place[:, None] * stride_ks + dim[None, :]
    q_ptrs = q + batch * stride_qb + head * stride_qh + row[:, None] * stride_qt + dim[None, :]
    q_tile = load_tile(q_ptrs, live[:, None], dim[None, :], True, DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    row_lse = load_lse(lse + batch * stride_lb + head * stride_lh + row * stride_lt, live)  # (BLOCK_M,)

    # Some row sees keys of blocks [first_block, stop_block), every row all keys of [inner_first, inner_stop).
    first_block, stop_block = tl.min(low, axis=0) // BLOCK_N, tl.cdiv(tl.max(high, axis=0), BLOCK_N)
    inner_first = tl.cdiv(tl.max(tl.where(live, low, 0), axis=0), BLOCK_N)
    inner_stop = tl.min(tl.where(live, high, 2147483647), axis=0) // BLOCK_N
    inner_first = min(inner_first, stop_block)
    inner_stop = max(inner_stop, inner_first)
    if PADDED:
        inner_stop = inner_first
    all_first, all_stop = tl.load(before + first_block), tl.load(before + stop_block)
    all_inner_first, all_inner_stop = tl.load(before + inner_first), tl.load(before + inner_stop)
    some_first, some_stop = tl.load(before_some + first_block), tl.load(before_some + stop_block)
    total = tl.zeros((BLOCK_M,), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.int32)
    total, count = _blocks_without_edges(
        total, count, q_tile, row_lse, k_base, lists, all_inner_first, all_inner_stop, stride_ks, scale, softcap,
        DIM, BLOCK_D, BLOCK_N, CAPPED,
    )  # fmt: skip
    num_left = all_inner_first - all_first
    num_edges = num_left + all_stop - all_inner_stop
    for i in range(0, num_edges + some_stop - some_first):
        in_all = tl.where(i < num_left, all_first + i, all_inner_stop + i - num_left)
        block = tl.load(lists + tl.where(i < num_edges, in_all, num_blocks + some_first + i - num_edges))
        key = block * BLOCK_N + place  # (BLOCK_N,)
        start = (block * BLOCK_N).to(tl.int64)
        keep = key < num_keys
        k_ptrs = (k_base + start * stride_ks) + k_offsets
        k_tile = load_tile(k_ptrs, keep[:, None], dim[None, :], True, DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        scores, _ = capped_scores(tl.dot(q_tile, tl.trans(k_tile)), scale, softcap, CAPPED)  # (BLOCK_M, BLOCK_N)
        w_ptrs = (w_base + start * stride_ws) + place * stride_ws
        weight = tl.load(w_ptrs, mask=keep, other=0).to(tl.float32)  # (BLOCK_N,)
        counted = weight != 0.0
        if PADDED:
            counted &= tl.load(pad_base + key * stride_ps, mask=keep, other=0) != 0
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]) & counted[None, :]
        # Selected, not multiplied by 0: NaN at keys that do not count does not spread.
        total += tl.sum(tl.where(seen, tl.exp2(scores - row_lse[:, None]) * weight[None, :], 0.0), 1)
        count += tl.sum(seen.to(tl.int32), 1)
    if BOOLEAN:
        allowed = high - low
        if PADDED:
            allowed = tl.load(allowed_before + batch * (num_keys + 1) + high, mask=live, other=0)
            allowed -= tl.load(allowed_before + batch * (num_keys + 1) + low, mask=live, other=0)
        # NaN compares false and stays.
        one = (total > 1.0) | ((count == allowed) & (count > 0) & (total > 0.0))
        total = tl.where(one, 1.0, total)
    mass_ptrs = mass + ((batch * heads + head) * num_rows + row) * mass_stride + group
    tl.store(mass_ptrs, total, mask=live)


def mass_forward(problem: Problem, lse: torch.Tensor, queries: QueryList, mass: torch.Tensor) -> None:
    """Write mass (B, Hq, T, G) float32, columns of a contiguous tensor, in the rows that are listed.

    Args:
        problem: v is not read.
        lse: (B, Hq, T) float, natural log.
        queries: the rows wanted, with their keys.
    """
    (batch, num_rows, heads, _), groups = problem.q.shape, problem.weights.shape[2]
    if problem.q.numel() == 0 or problem.k.numel() == 0:
        return
    settings = problem.settings(MASS)
    blocks = classify(problem.weights, problem.padding, settings.keys)
    allowed_before = None  # how many keys that may be attended stand before each
    if problem.padding is not None:
        allowed_before = torch.nn.functional.pad(problem.padding.cumsum(1, dtype=torch.int32), (1, 0))
    own = {
        "lse": lse,
        "allowed_before": allowed_before,
        "mass": mass,
        **queries._asdict(),
        **blocks._asdict(),
        "num_blocks": blocks.kinds.shape[1],
        "groups": groups,
        "mass_stride": mass.stride(2),
        **strides("l", "bht", lse),
        "BLOCK_M": settings.rows,
        "BLOCK_N": settings.keys,
        "BOOLEAN": problem.boolean,
    }
    grid = (triton.cdiv(num_rows, settings.rows), heads * groups, batch)
    launch(_mass_forward, grid, problem.arguments() | own, settings)
