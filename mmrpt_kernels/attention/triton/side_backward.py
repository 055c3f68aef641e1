"""The gradient of the mass from a known lse. lse is a function of q and k, so every key that a row sees takes part:

    dS = P * (dmass w^T - rowsum(dmass * mass)),   dq = scale dS k,   dk = scale dS^T q,   dw = P^T dmass

Only rows that are wanted and have a gradient are visited. One kernel writes dq by rows, one dk (or dw) by keys: nothing
is added to from two sides, so the results do not depend on the order of execution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.triton.launch import architecture
from mmrpt_kernels.attention.triton.mass_forward import precision, query_tile
from mmrpt_kernels.attention.triton.query_list import QueryList
from mmrpt_kernels.attention.triton.tiles import LENGTHS, LOG2_E, capped_scores, products_of

__all__ = ["Tiles", "side_backward_settings", "side_mass_backward"]


class Tiles(NamedTuple):
    """Launch settings of one backward kernel."""

    block_m: int  # rows of a tile
    block_n: int  # keys of a tile
    slice_d: int  # of the head size that a product q . k takes at a time; 0 = whole
    num_warps: int
    num_stages: int


def side_backward_settings(architecture: int, dtype: torch.dtype, dim: int) -> tuple[Tiles, Tiles]:
    """Of the kernel over rows and the kernel over keys, by compute capability times ten (0: the interpreter).

    Chosen by what compiles without spills, with the 64 rows of a product that wgmma wants; not yet timed on a GPU.
    """
    if architecture == 0:
        return Tiles(32, 16, 8, 4, 1), Tiles(16, 32, 0, 4, 1)
    if dtype == torch.float32:
        tiles = Tiles(16, 16, 16 if architecture < 90 else 32, 8, 1) if dim > 64 else Tiles(32, 32, 0, 8, 1)
        return tiles, tiles
    if architecture < 90:
        return Tiles(32, 64, 0, 8, 2), Tiles(32, 64, 0, 8, 1)
    if dim > 128:
        return Tiles(64, 32, 0, 8, 2), Tiles(32, 64, 0, 8, 1)
    return Tiles(64, 64, 0, 8, 2), Tiles(64, 64, 0, 8, 1)


@triton.jit
def _row_statistics(lse, dmass, delta, at_lse, at_dmass, at_delta, live):
    """lse in units of log2 (+inf where the row attends nothing), dmass of one group, delta: (BLOCK_M,) float32."""
    row_lse = tl.load(lse + at_lse, mask=live, other=float("-inf")).to(tl.float32) * LOG2_E
    alive = row_lse != float("-inf")
    # In a row that attends nothing P is 0, and 0 times an infinite gradient must stay 0.
    return (
        tl.where(alive, row_lse, float("inf")),
        tl.load(dmass + at_dmass, mask=live & alive, other=0.0).to(tl.float32),
        tl.load(delta + at_delta, mask=live & alive, other=0.0),
        alive,
    )


@triton.jit
def _first_above(values, count, bound):
    """The first index of the rising `values` (count,) that holds more than `bound`; `count` if none does."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if tl.load(values + middle) > bound:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit(do_not_specialize=LENGTHS)
def _rows_kernel(
    q, k, lse, weights, padding, dmass, delta, dq, rows, first, last, counts,
    num_rows, num_keys, groups, repeat, scale, softcap,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_lb, stride_lh, stride_lt,
    stride_wb, stride_ws, stride_wg, stride_pb, stride_ps, stride_mb, stride_mh, stride_mt, stride_mg,
    stride_eb, stride_eh, stride_et, stride_gb, stride_gt, stride_gh,
    CAPPED: tl.constexpr, HAS_PADDING: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICE_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of listed rows of one head. Grid: (tiles, heads, samples)."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if tile * BLOCK_M >= tl.load(counts + batch):
        return
    row, live, low, high = query_tile(rows, first, last, counts, batch, num_rows, tile, BLOCK_M)
    k += batch * stride_kb + (head // repeat) * stride_kh
    weights += batch * stride_wb
    padding += batch * stride_pb
    dmass += batch * stride_mb + head * stride_mh
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    within = d < DIM
    at_q = batch * stride_qb + head * stride_qh + row * stride_qt
    q_tile = tl.load(q + at_q[:, None] + d[None, :], mask=live[:, None] & within[None, :], other=0.0)  # (M, D)
    at_lse = batch * stride_lb + head * stride_lh + row * stride_lt
    at_delta = batch * stride_eb + head * stride_eh + row * stride_et
    row_lse, dmass_0, row_delta, alive = _row_statistics(lse, dmass, delta, at_lse, row * stride_mt, at_delta, live)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin, end = tl.min(low, axis=0) // BLOCK_N, tl.cdiv(tl.max(high, axis=0), BLOCK_N)
    for block in range(begin, end):
        key = block * BLOCK_N + n  # (BLOCK_N,)
        key_wide = key.to(tl.int64)
        kept = key < num_keys
        if HAS_PADDING:
            kept &= tl.load(padding + key_wide * stride_ps, mask=kept, other=0) != 0
        at_k = key_wide * stride_ks
        # 0 where padding forbids: 0 * NaN would be NaN in dq.
        k_tile = tl.load(k + at_k[:, None] + d[None, :], mask=kept[:, None] & within[None, :], other=0.0)  # (N, D)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        products = products_of(q + at_q, k + at_k, live, kept, q_tile, k_tile, products, DIM, SLICE_D, PRECISION)
        scores, slope = capped_scores(products, scale, softcap, CAPPED)
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]) & kept[None, :]
        probs = tl.where(seen, tl.exp2(scores - row_lse[:, None]), 0.0)
        weight = tl.load(weights + key_wide * stride_ws, mask=kept, other=0).to(tl.float32)
        dprobs = dmass_0[:, None] * weight[None, :] - row_delta[:, None]
        for g in range(1, groups):
            weight = tl.load(weights + key_wide * stride_ws + g * stride_wg, mask=kept, other=0).to(tl.float32)
            dmass_g = tl.load(dmass + row * stride_mt + g * stride_mg, mask=live & alive, other=0.0).to(tl.float32)
            dprobs += dmass_g[:, None] * weight[None, :]
        dscores = probs * dprobs * slope  # (BLOCK_M, BLOCK_N)
        total = tl.dot(dscores.to(k_tile.dtype), k_tile, total, input_precision=PRECISION)
    at_dq = batch * stride_gb + head * stride_gh + row * stride_gt
    made = (total * scale).to(dq.dtype.element_ty)
    tl.store(dq + at_dq[:, None] + d[None, :], made, mask=live[:, None] & within[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _keys_kernel(
    q, k, lse, weights, padding, dmass, delta, gradient, rows, first, last, counts,
    num_rows, num_keys, groups, repeat, scale, softcap,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_lb, stride_lh, stride_lt,
    stride_wb, stride_ws, stride_wg, stride_pb, stride_ps, stride_mb, stride_mh, stride_mt, stride_mg,
    stride_eb, stride_eh, stride_et, stride_gb, stride_gs, stride_gh,
    CAPPED: tl.constexpr, HAS_PADDING: tl.constexpr, OF_WEIGHTS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, SLICE_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one block of keys of one key head; with OF_WEIGHTS that head's share of dw of one group.

    Grid: (blocks, key heads, samples), for weights (blocks, key heads * groups, samples).
    """
    shares = groups if OF_WEIGHTS else 1
    head_kv = (tl.program_id(1) // shares).to(tl.int64)
    group = (tl.program_id(1) % shares).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    within = d < DIM
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    key_wide = key.to(tl.int64)
    inside = key < num_keys
    kept = inside
    if HAS_PADDING:
        kept &= tl.load(padding + batch * stride_pb + key_wide * stride_ps, mask=kept, other=0) != 0
    k += batch * stride_kb + head_kv * stride_kh
    weights += batch * stride_wb
    at_k = key_wide * stride_ks
    k_tile = tl.load(k + at_k[:, None] + d[None, :], mask=kept[:, None] & within[None, :], other=0.0)  # (N, D)
    weight_0 = tl.load(weights + key_wide * stride_ws, mask=kept, other=0).to(tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32) if OF_WEIGHTS else tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Both ends of the rows' intervals rise along the list: the rows that see this block stand together.
    count = tl.load(counts + batch)
    begin = _first_above(last + batch * num_rows, count, tl.program_id(0) * BLOCK_N)
    end = _first_above(first + batch * num_rows, count, tl.program_id(0) * BLOCK_N + BLOCK_N - 1)
    for step in range(0, repeat):
        head = head_kv * repeat + step
        dmass_head = dmass + batch * stride_mb + head * stride_mh + group * stride_mg
        for tile in range(begin // BLOCK_M, tl.cdiv(end, BLOCK_M)):
            row, live, low, high = query_tile(rows, first, last, counts, batch, num_rows, tile, BLOCK_M)
            at_q = batch * stride_qb + head * stride_qh + row * stride_qt
            q_tile = tl.load(q + at_q[:, None] + d[None, :], mask=live[:, None] & within[None, :], other=0.0)  # (M, D)
            at_lse = batch * stride_lb + head * stride_lh + row * stride_lt
            at_delta = batch * stride_eb + head * stride_eh + row * stride_et
            row_lse, dmass_0, row_delta, alive = _row_statistics(
                lse, dmass_head, delta, at_lse, row * stride_mt, at_delta, live
            )
            products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            products = products_of(k + at_k, q + at_q, kept, live, k_tile, q_tile, products, DIM, SLICE_D, PRECISION)
            scores, slope = capped_scores(products, scale, softcap, CAPPED)
            seen = (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :]) & kept[:, None]
            probs = tl.where(seen, tl.exp2(scores - row_lse[None, :]), 0.0)  # (BLOCK_N, BLOCK_M)
            if OF_WEIGHTS:
                total += tl.sum(probs * dmass_0[None, :], axis=1)
            else:
                dprobs = weight_0[:, None] * dmass_0[None, :] - row_delta[None, :]
                for g in range(1, groups):
                    weight = tl.load(weights + key_wide * stride_ws + g * stride_wg, mask=kept, other=0).to(tl.float32)
                    at_dmass = row * stride_mt + g * stride_mg
                    dmass_g = tl.load(dmass_head + at_dmass, mask=live & alive, other=0.0).to(tl.float32)
                    dprobs += weight[:, None] * dmass_g[None, :]
                dscores = probs * dprobs * slope
                total = tl.dot(dscores.to(q_tile.dtype), q_tile, total, input_precision=PRECISION)
    at = batch * stride_gb + head_kv * stride_gh + key_wide * stride_gs
    if OF_WEIGHTS:
        tl.store(gradient + at + group, total, mask=inside)
    else:
        made = (total * scale).to(gradient.dtype.element_ty)
        tl.store(gradient + at[:, None] + d[None, :], made, mask=inside[:, None] & within[None, :])


def side_mass_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    dmass: torch.Tensor,
    mass: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    rows: QueryList,
    options: AttentionOptions,
    settings: tuple[Tiles, Tiles] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk in the dtypes of q and k, dw (B, S, G) float32, None for boolean weights.

    Args:
        q, k, lse, key_weights, key_padding_mask: as in `mass_forward`.
        dmass, mass: (B, Hq, T, G) float32.
        rows: the rows to visit; the others add nothing.
    """
    (batch, num_rows, heads, dim), (_, num_keys, heads_kv, _) = q.shape, k.shape
    groups, boolean = key_weights.shape[-1], key_weights.dtype == torch.bool
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=k.dtype, device=q.device)
    shares = None if boolean else dk.new_zeros((batch, num_keys, heads_kv, groups), dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0 or groups == 0:
        return dq, dk, None if shares is None else shares.sum(2)
    settings = settings or side_backward_settings(architecture(q.device), q.dtype, dim)
    delta = (dmass * mass).sum(-1)  # (B, Hq, T)
    weights = key_weights.view(torch.uint8) if boolean else key_weights
    padding = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)
    padded = padding is not None
    tensors = (q, k, lse, weights, padding if padded else weights, dmass, delta)
    sizes = (num_rows, num_keys, groups, heads // heads_kv, options.scale, options.softcap)
    padding_strides = padding.stride() if padded else (0, 0)
    strides = (*q.stride()[:3], *k.stride()[:3], *lse.stride(), *weights.stride(), *padding_strides)
    strides = (*strides, *dmass.stride(), *delta.stride())
    shape = {
        "CAPPED": options.softcap > 0.0,
        "HAS_PADDING": padded,
        "DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "PRECISION": precision(q.dtype),
        "maxnreg": 255,
    }
    by_rows, by_keys = (
        {
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "SLICE_D": tiles.slice_d,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }
        for tiles in settings
    )
    grid = (triton.cdiv(num_rows, by_rows["BLOCK_M"]), heads, batch)
    _rows_kernel[grid](*tensors, dq, *rows, *sizes, *strides, *dq.stride()[:3], **shape, **by_rows)
    blocks = triton.cdiv(num_keys, by_keys["BLOCK_N"])
    arguments = (*rows, *sizes, *strides)
    _keys_kernel[(blocks, heads_kv, batch)](
        *tensors, dk, *arguments, *dk.stride()[:3], OF_WEIGHTS=False, **shape, **by_keys
    )
    if shares is None:
        return dq, dk, None
    _keys_kernel[(blocks, heads_kv * groups, batch)](
        *tensors, shares, *arguments, *shares.stride()[:3], OF_WEIGHTS=True, **shape, **by_keys
    )
    return dq, dk, shares.sum(2)
