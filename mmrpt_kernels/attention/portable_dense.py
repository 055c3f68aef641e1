"""The portable backend on one dense batch: choose an engine, walk the tiles, settle the rows that need exactness."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Tile, attended_counts, band, tile_allowed, tiles
from mmrpt_kernels.attention.portable_tiles import (
    FLASH_AVAILABLE,
    CpuFlashTiles,
    Gradients,
    PlainTiles,
    RowGradients,
    TileAttention,
)

__all__ = ["Masks", "attend", "attend_backward", "statistics_dtype"]

# Scores or masks of one tile. On a CPU a few MiB per core keep the passes of the softmax in cache; elsewhere a tile is
# a dozen launches, and a layer of 8,192 rows and 28 heads should be tens of tiles, not hundreds.
TILE_BYTES, CPU_TILE_BYTES = 256 * 2**20, 8 * 2**20
MIN_BLOCK_ROWS, CPU_MAX_BLOCK_ROWS = 16, 512


class Masks(NamedTuple):
    """What thins out the band."""

    key_padding_mask: torch.Tensor | None = None  # (B, S) bool, True = may be attended
    attn_mask: torch.Tensor | None = None  # (B or 1, 1, T, S) bool


def statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _widen(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def block_size(block_rows: int, bytes_per_row: int, device: torch.device) -> int:
    """`block_rows` where given, else the rows of a tile that fit the device's budget."""
    if block_rows > 0:
        return block_rows
    on_cpu = device.type == "cpu"
    rows = (CPU_TILE_BYTES if on_cpu else TILE_BYTES) // max(1, bytes_per_row)
    return max(MIN_BLOCK_ROWS, min(rows, CPU_MAX_BLOCK_ROWS) if on_cpu else rows)


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    w: torch.Tensor,
    options: AttentionOptions,
    masks: Masks,
    block_rows: int,
) -> tuple[TileAttention, list[Tile]]:
    """The engine that is fastest for the call, and its tiles.

    Keys and values that padding forbids are zeroed, so that what stands there, NaN included, reaches nobody. The fused
    kernel adds its mask to the scores, and NaN + -inf is NaN: keys that are not finite take the plain engine there.
    """
    dtype = statistics_dtype(q)
    q, k, w = _widen(q, dtype), _widen(k, dtype), w.to(dtype)
    v = None if v is None else _widen(v, dtype)
    if masks.key_padding_mask is not None:
        forbidden = ~masks.key_padding_mask[:, :, None, None]
        k = k.masked_fill(forbidden, 0.0)
        v = None if v is None else v.masked_fill(forbidden, 0.0)
    num_rows, num_keys, explicit = q.shape[1], k.shape[1], masks.attn_mask is not None
    if FLASH_AVAILABLE and q.device.type == "cpu" and options.softcap == 0.0 and v is not None:
        rows = block_size(block_rows, num_keys * q.element_size() * (q.shape[0] if explicit else 1), q.device)
        found = tiles(num_rows, num_keys, options, rows, whole=True, explicit_mask=explicit)
        if all(tile.shape != "masked" for tile in found) or bool(torch.isfinite(k).all()):
            return CpuFlashTiles(q, k, v, w, options), found
    rows = block_size(block_rows, q.shape[0] * q.shape[2] * num_keys * q.element_size(), q.device)
    found = tiles(num_rows, num_keys, options, rows, whole=False, explicit_mask=explicit)
    return PlainTiles(q, k, v, w, options), found


def _settle(
    out: torch.Tensor,
    mass: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    masks: Masks,
) -> None:
    """In place: rows that attend nothing get 0, 0 and -inf; masses of boolean groups lie in [0, 1] and are 1 where all
    that a row attends to is in the group: what rounding blurs, counting knows."""
    everything = key_weights.new_ones((*key_weights.shape[:-1], 1), dtype=torch.bool)
    members = everything
    if key_weights.dtype == torch.bool:
        members = torch.cat([everything, key_weights], dim=-1)
    rows = block_size(0, members.shape[0] * members.shape[1] * 4, members.device)
    counts = attended_counts(members, bounds, *masks, block_rows=rows)
    total, counts = counts[..., :1], counts[..., 1:]
    dead = total == 0  # (B, T, 1)
    out.masked_fill_(dead[..., None], 0.0)
    lse.masked_fill_(dead[:, None, :, 0], -torch.inf)
    if key_weights.dtype == torch.bool:
        mass.clamp_(0.0, 1.0)
        # NaN keeps its place: a row that attends to NaN has no mass to speak of.
        full = (counts == total)[:, None] & ~mass.isnan()
        mass.masked_fill_(full, 1.0)
    mass.masked_fill_(dead[:, None], 0.0)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    options: AttentionOptions,
    masks: Masks,
    block_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, Dv) as q, mass (B, Hq, T, G) and lse (B, Hq, T) in float32 or float64.

    Args:
        q, k, v: (B, T, Hq, D), (B, S, Hkv, D), (B, S, Hkv, Dv).
        key_weights: (B, S, G) bool or float.
        block_rows: rows of a tile, 0 = choose.
    """
    batch, num_rows, heads, _ = q.shape
    dtype = statistics_dtype(q)
    out = q.new_zeros((batch, num_rows, heads, v.shape[-1]))
    mass = q.new_zeros((batch, heads, num_rows, key_weights.shape[-1]), dtype=dtype)
    lse = q.new_full((batch, heads, num_rows), -torch.inf, dtype=dtype)
    if q.numel() == 0 or k.numel() == 0:
        return out, mass, lse
    bounds = band(num_rows, k.shape[1], options, q.device)
    engine, found = _plan(q, k, v, key_weights, options, masks, block_rows)
    for tile in found:
        part = engine.forward(tile, tile_allowed(tile, bounds, *masks))
        out[:, tile.rows], mass[:, :, tile.rows], lse[:, :, tile.rows] = part
    _settle(out, mass, lse, key_weights, bounds, masks)
    return out, mass, lse


def attend_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    key_weights: torch.Tensor,
    rows: RowGradients,
    options: AttentionOptions,
    masks: Masks,
    block_rows: int,
) -> Gradients:
    """Gradients of q, k, v, key_weights in float32 or float64.

    Args:
        v: None when `rows.dout` is (the mass alone).
        rows: as `attend` made them and as they arrived; lse -inf in dead rows.
    """
    dtype = statistics_dtype(q)
    wants_w = key_weights.is_floating_point() and rows.dmass is not None
    into = Gradients(
        *(torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k)),
        None if v is None else torch.zeros(v.shape, dtype=dtype, device=q.device),
        torch.zeros(key_weights.shape, dtype=dtype, device=q.device) if wants_w else None,
    )
    if q.numel() == 0 or k.numel() == 0:
        return into
    dead = rows.lse == -torch.inf  # (B, Hq, T)
    dead_out = dead.transpose(1, 2)[..., None]
    rows = RowGradients(
        None if rows.dout is None else rows.dout.to(dtype).masked_fill(dead_out, 0.0),
        None if rows.dmass is None else rows.dmass.to(dtype).masked_fill(dead[..., None], 0.0),
        None if rows.dlse is None else rows.dlse.to(dtype).masked_fill(dead, 0.0),
        None if rows.dout is None else rows.out.to(dtype),
        rows.mass,
        rows.lse.masked_fill(dead, torch.inf),
    )
    bounds = band(q.shape[1], k.shape[1], options, q.device)
    engine, found = _plan(q, k, v, key_weights, options, masks, block_rows)
    for tile in found:
        engine.backward(tile, tile_allowed(tile, bounds, *masks), rows, into)
    return into
