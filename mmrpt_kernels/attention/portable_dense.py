"""The portable backend on one dense batch: choose how to compute a tile, walk the tiles, mend what must be exact."""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks, Tile, attended_counts, band, tile_allowed, tiles
from mmrpt_kernels.attention.portable_tiles import (
    FLASH_AVAILABLE,
    CpuFlashTiles,
    Gradients,
    PlainTiles,
    RowGradients,
    TileAttention,
)
from mmrpt_kernels.common.dtypes import statistics_dtype

# Scores or masks of one tile. On a CPU a few MiB per core keep the passes of the softmax in cache; elsewhere a tile is
# a dozen launches, and a layer of 8,192 rows and 28 heads should be tens of tiles, not hundreds.
TILE_BYTES, CPU_TILE_BYTES = 256 * 2**20, 8 * 2**20
MIN_BLOCK_ROWS, CPU_MAX_BLOCK_ROWS = 16, 512


def _widen(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def block_size(bytes_per_row: int, device: torch.device) -> int:
    """The rows of a tile that fit the device's budget."""
    on_cpu = device.type == "cpu"
    rows = (CPU_TILE_BYTES if on_cpu else TILE_BYTES) // max(1, bytes_per_row)
    return max(MIN_BLOCK_ROWS, min(rows, CPU_MAX_BLOCK_ROWS) if on_cpu else rows)


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    options: AttentionOptions,
    masks: Masks,
) -> tuple[TileAttention, list[Tile]]:
    """The fastest implementation of a tile for the call, and the tiles.

    Padded keys and values are set to 0, so that NaN there does not spread. The fused CPU kernel adds its mask to the
    scores, and NaN + -inf is NaN: keys that are not finite take PlainTiles. So does a scale of 0 or below: the kernel
    takes the largest product for the largest score.
    """
    dtype = statistics_dtype(q)
    q, k, v, w = _widen(q, dtype), _widen(k, dtype), _widen(v, dtype), w.to(dtype)
    if masks.key_padding_mask is not None:
        forbidden = ~masks.key_padding_mask[:, :, None, None]
        k, v = k.masked_fill(forbidden, 0.0), v.masked_fill(forbidden, 0.0)
    num_rows, num_keys, explicit = q.shape[1], k.shape[1], masks.attn_mask is not None
    if FLASH_AVAILABLE and q.device.type == "cpu" and options.softcap == 0.0 and options.scale > 0.0:
        rows = block_size(num_keys * q.element_size() * (q.shape[0] if explicit else 1), q.device)
        found = tiles(num_rows, num_keys, options, rows, whole=True, explicit_mask=explicit)
        if all(tile.shape != "masked" for tile in found) or bool(torch.isfinite(k).all()):
            return CpuFlashTiles(q, k, v, w, options), found
    rows = block_size(q.shape[0] * q.shape[2] * num_keys * q.element_size(), q.device)
    found = tiles(num_rows, num_keys, options, rows, whole=False, explicit_mask=explicit)
    return PlainTiles(q, k, v, w, options), found


def exact_shares(
    mass: torch.Tensor, key_weights: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor], masks: Masks
) -> torch.Tensor:
    """How many keys a row may attend to, (B, T, 1). In place: masses of boolean weights lie in [0, 1], and are exactly
    1 where all of those keys are weighted, which counts tell and rounded sums do not."""
    members = key_weights.new_ones((*key_weights.shape[:-1], 1), dtype=torch.bool)
    if key_weights.dtype == torch.bool:
        members = torch.cat([members, key_weights], dim=-1)
    rows = block_size(members.shape[0] * members.shape[1] * 4, members.device)
    counts = attended_counts(members, bounds, masks, rows)
    total = counts[..., :1]
    if key_weights.dtype == torch.bool:
        mass.clamp_(0.0, 1.0)
        # NaN keeps its place: a row that attends to NaN has no mass to speak of.
        mass.masked_fill_((counts[..., 1:] == total)[:, None] & ~mass.isnan(), 1.0)
    return total


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    options: AttentionOptions,
    masks: Masks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, Dv) as q, mass (B, Hq, T, G) and lse (B, Hq, T) in float32 or float64.

    Args:
        q, k, v: (B, T, Hq, D), (B, S, Hkv, D), (B, S, Hkv, Dv).
        key_weights: (B, S, G) bool or float.
    """
    batch, num_rows, heads, _ = q.shape
    dtype = statistics_dtype(q)
    out = q.new_zeros((batch, num_rows, heads, v.shape[-1]))
    mass = q.new_zeros((batch, heads, num_rows, key_weights.shape[-1]), dtype=dtype)
    lse = q.new_full((batch, heads, num_rows), -torch.inf, dtype=dtype)
    if q.numel() == 0 or k.numel() == 0:
        return out, mass, lse
    bounds = band(num_rows, k.shape[1], options, q.device)
    tile_attention, found = _plan(q, k, v, key_weights, options, masks)
    for tile in found:
        part = tile_attention.forward(tile, tile_allowed(tile, bounds, masks))
        out[:, tile.rows], mass[:, :, tile.rows], lse[:, :, tile.rows] = part
    dead = exact_shares(mass, key_weights, bounds, masks) == 0  # (B, T, 1)
    out.masked_fill_(dead[..., None], 0.0)
    lse.masked_fill_(dead[:, None, :, 0], -torch.inf)
    mass.masked_fill_(dead[:, None], 0.0)
    return out, mass, lse


def attend_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    rows: RowGradients,
    options: AttentionOptions,
    masks: Masks,
) -> Gradients:
    """Gradients of q, k, v, key_weights in float32 or float64.

    Args:
        rows: as `attend` made them and as they arrived.
    """
    dtype = statistics_dtype(q)
    wants_w = key_weights.is_floating_point() and rows.dmass is not None
    into = Gradients(
        *(torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k)),
        torch.zeros(v.shape, dtype=dtype, device=q.device),
        torch.zeros(key_weights.shape, dtype=dtype, device=q.device) if wants_w else None,
    )
    if q.numel() == 0 or k.numel() == 0:
        return into
    rows = rows.without_dead_rows(dtype)
    bounds = band(q.shape[1], k.shape[1], options, q.device)
    tile_attention, found = _plan(q, k, v, key_weights, options, masks)
    for tile in found:
        tile_attention.backward(tile, tile_allowed(tile, bounds, masks), rows, into)
    return into
