"""Mass from a known lse: a pass over the wanted rows and, of the keys, only the blocks that carry weight.

    mass[t, g] = sum_j exp(s[t, j] - lse[t]) w[j, g]

A program takes one tile of wanted rows, one head and one group, and walks the group's own list of key blocks: groups
that share no block (one per image, say) together cost what one of them over all their blocks would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.triton.key_blocks import classify
from mmrpt_kernels.attention.triton.launch import architecture
from mmrpt_kernels.attention.triton.query_list import QueryList
from mmrpt_kernels.attention.triton.tiles import ALL, LENGTHS, LOG2_E, capped_scores

__all__ = ["SideSettings", "precision", "query_tile", "mass_forward", "side_settings"]


class SideSettings(NamedTuple):
    """Launch settings of the side pass."""

    block_m: int  # rows of a tile
    block_n: int  # keys of a block
    slice_d: int  # of the head size that one product takes; the whole where the head is no larger
    num_warps: int
    num_stages: int


def side_settings(architecture: int, dtype: torch.dtype, dim: int) -> SideSettings:
    """Settings by compute capability times ten (0: the interpreter), dtype and head size.

    Chosen by what compiles without spills and leaves room for two blocks per multiprocessor; not yet timed on a GPU.
    """
    if architecture == 0:
        return SideSettings(32, 16, 8, 4, 1)  # small and uneven: a short test crosses many borders
    if dtype == torch.float32:
        return SideSettings(64, 32, 32 if dim > 64 else 64, 8, 2)
    return SideSettings(64, 64, 256, 4, 3) if dim > 128 else SideSettings(128, 64, 128, 8, 4)


def precision(dtype: torch.dtype) -> str:
    """How matrix units multiply: float32 as three products of tf32 parts, whose error is that of float32 sums."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def query_tile(rows, first, last, counts, batch, num_rows, tile, BLOCK_M: tl.constexpr):
    """Of a tile of the list: positions (BLOCK_M,) int64, whether each is one, and its keys [low, high)."""
    entry = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = entry < tl.load(counts + batch)
    entry = batch * num_rows + entry
    row = tl.load(rows + entry, mask=live, other=0).to(tl.int64)
    low = tl.load(first + entry, mask=live, other=2147483647)
    high = tl.load(last + entry, mask=live, other=0)
    return row, live, low, high


@triton.jit(do_not_specialize=LENGTHS)
def _mass_kernel(
    q,
    k,
    lse,
    weights,
    padding,
    mass,
    rows,
    first,
    last,
    counts,
    kinds,
    visit,
    before,
    num_rows,
    num_keys,
    num_blocks,
    groups,
    repeat,
    scale,
    softcap,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_lb,
    stride_lh,
    stride_lt,
    stride_wb,
    stride_ws,
    stride_wg,
    stride_pb,
    stride_ps,
    stride_mb,
    stride_mh,
    stride_mt,
    CAPPED: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    BOOLEAN: tl.constexpr,
    DIM: tl.constexpr,
    SLICE_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows of one head against one group's key blocks. Grid: (tiles, heads * groups, samples)."""
    tile = tl.program_id(0)
    head = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if tile * BLOCK_M >= tl.load(counts + batch):
        return
    row, live, low, high = query_tile(rows, first, last, counts, batch, num_rows, tile, BLOCK_M)
    k += batch * stride_kb + (head // repeat) * stride_kh
    weights += batch * stride_wb + group * stride_wg
    padding += batch * stride_pb
    kinds += batch * num_blocks * groups + group
    visit += (batch * groups + group) * num_blocks
    before += (batch * groups + group) * (num_blocks + 1)
    d = tl.arange(0, SLICE_D)
    n = tl.arange(0, BLOCK_N)

    q_at = q + batch * stride_qb + head * stride_qh + row[:, None] * stride_qt + d[None, :]
    q_tile = tl.load(q_at, mask=live[:, None] & (d[None, :] < DIM), other=0.0)  # (BLOCK_M, SLICE_D)
    row_lse = tl.load(lse + batch * stride_lb + head * stride_lh + row * stride_lt, mask=live, other=0.0)  # (BLOCK_M,)
    row_lse = row_lse.to(tl.float32) * LOG2_E
    # A row that attends nothing has lse -inf: exp2(s - inf) is 0.
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)

    # Every row of the tile sees the keys [inner_low, inner_high); no row sees one outside [outer_low, outer_high).
    outer_low, outer_high = tl.min(low, axis=0), tl.max(high, axis=0)
    inner_low, inner_high = tl.max(tl.where(live, low, 0), axis=0), tl.min(tl.where(live, high, 2147483647), axis=0)
    begin = tl.load(before + outer_low // BLOCK_N)
    end = tl.load(before + (outer_high + BLOCK_N - 1) // BLOCK_N)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(begin, end):
        block = tl.load(visit + i)
        key = block * BLOCK_N + n  # (BLOCK_N,)
        key_wide = key.to(tl.int64)
        inside = key < num_keys
        k_at = k + key_wide[None, :] * stride_ks + d[:, None]
        k_tile = tl.load(k_at, mask=inside[None, :] & (d[:, None] < DIM), other=0.0)  # (SLICE_D, BLOCK_N)
        products = tl.dot(q_tile, k_tile, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        for done in range(SLICE_D, DIM, SLICE_D):
            left = DIM - done
            q_slice = tl.load(q_at + done, mask=live[:, None] & (d[None, :] < left), other=0.0)  # (BLOCK_M, SLICE_D)
            k_slice = tl.load(k_at + done, mask=inside[None, :] & (d[:, None] < left), other=0.0)  # (SLICE_D, BLOCK_N)
            products = tl.dot(q_slice, k_slice, products, input_precision=PRECISION)
        scores, _ = capped_scores(products, scale, softcap, CAPPED)
        probs = tl.exp2(scores - row_lse[:, None])
        seen_by_all = (block * BLOCK_N >= inner_low) & (block * BLOCK_N + BLOCK_N <= inner_high)
        if seen_by_all & (tl.load(kinds + block * groups) == ALL) & (HAS_PADDING == 0):
            total += tl.sum(probs, axis=1)
        else:
            weight = tl.load(weights + key_wide * stride_ws, mask=inside, other=0).to(tl.float32)  # (BLOCK_N,)
            counted = weight != 0.0
            if HAS_PADDING:
                counted &= tl.load(padding + key_wide * stride_ps, mask=inside, other=0) != 0
            seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]) & counted[None, :]
            # Blanked, not multiplied: what stands at keys that do not count, NaN included, reaches nobody.
            total += tl.sum(tl.where(seen, probs * weight[None, :], 0.0), axis=1)
    if BOOLEAN:
        total = tl.clamp(total, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    mass_at = mass + batch * stride_mb + head * stride_mh + row * stride_mt + group
    tl.store(mass_at, total, mask=live)


def mass_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    rows: QueryList,
    options: AttentionOptions,
    settings: SideSettings | None = None,
) -> torch.Tensor:
    """mass (B, Hq, T, G) float32; 0 in rows that are not listed. Packed inputs come as a batch of one.

    Args:
        q, k: (B, T, Hq, D), (B, S, Hkv, D), the last dimension of stride 1; float32, bfloat16 or float16.
        lse: (B, Hq, T) float, natural log.
        key_weights: (B, S, G) bool or float.
        key_padding_mask: (B, S) bool or None.
        rows: the rows wanted, with their keys.
    """
    batch, num_rows, heads, dim = q.shape
    groups = key_weights.shape[-1]
    settings = settings or side_settings(architecture(q.device), q.dtype, dim)
    mass = torch.zeros((batch, heads, num_rows, groups), dtype=torch.float32, device=q.device)
    if mass.numel() == 0 or k.numel() == 0:
        return mass
    blocks = classify(key_weights, key_padding_mask, settings.block_n)
    boolean = key_weights.dtype == torch.bool
    weights = key_weights.view(torch.uint8) if boolean else key_weights
    padding = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)
    _mass_kernel[(triton.cdiv(num_rows, settings.block_m), heads * groups, batch)](
        q,
        k,
        lse,
        weights,
        weights if padding is None else padding,
        mass,
        *rows,
        *blocks[:3],
        num_rows,
        k.shape[1],
        blocks.kinds.shape[1],
        groups,
        heads // k.shape[2],
        options.scale,
        options.softcap,
        *q.stride()[:3],
        *k.stride()[:3],
        *lse.stride(),
        *weights.stride(),
        *((0, 0) if padding is None else padding.stride()),
        *mass.stride()[:3],
        CAPPED=options.softcap > 0.0,
        HAS_PADDING=padding is not None,
        BOOLEAN=boolean,
        DIM=dim,
        SLICE_D=min(settings.slice_d, max(16, triton.next_power_of_2(dim))),
        BLOCK_M=settings.block_m,
        BLOCK_N=settings.block_n,
        PRECISION=precision(q.dtype),
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        maxnreg=255,
    )
    return mass
