"""The portable backend's mass from a known lse: only wanted rows against only keys of non-zero weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Tile, band, tile_allowed
from mmrpt_kernels.attention.portable_dense import block_size, statistics_dtype
from mmrpt_kernels.attention.portable_tiles import Gradients, PlainTiles, RowGradients

__all__ = ["selected_mass", "selected_mass_backward"]


def _blocks(
    rows: torch.Tensor, keys: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor], block_rows: int
) -> Iterator[Tile]:
    """Tiles over positions in `rows` (R,) and `keys` (N,), both rising: per block the keys that its rows see."""
    first, last = (bound[rows] for bound in bounds)
    # Both bounds rise with the row, except in rows that see nothing, which stand first as (0, 0).
    starts, ends = torch.searchsorted(keys, first).tolist(), torch.searchsorted(keys, last).tolist()
    for start in range(0, len(starts), block_rows):
        stop = min(start + block_rows, len(starts))
        if starts[start] < ends[stop - 1]:
            same = starts[start] == starts[stop - 1] and ends[start] == ends[stop - 1]
            yield Tile(start, stop, starts[start], ends[stop - 1], "full" if same else "masked")


def _members(mask: torch.Tensor | None, size: int, device: torch.device) -> torch.Tensor:
    """Positions where `mask` (size,) is True, or all."""
    return torch.arange(size, device=device) if mask is None else mask.nonzero()[:, 0]


def _allowed(
    tile: Tile, rows: torch.Tensor, keys: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor | None:
    """(rows, keys) bool of a tile, None when everything is allowed."""
    if tile.shape == "full":
        return None
    first, last = (bound[rows[tile.rows], None] for bound in bounds)
    key = keys[tile.keys]
    return (key >= first) & (key < last)


def selected_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    query_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    options: AttentionOptions,
    block_rows: int,
) -> torch.Tensor:
    """mass (B, Hq, T, G) in float32 or float64; rows outside query_mask and rows of lse -inf are 0.

    Args:
        q, k: (B, T, Hq, D), (B, S, Hkv, D).
        lse: (B, Hq, T).
        key_weights: (B, S, G) bool or float.
        query_mask, key_padding_mask: (B, T), (B, S) bool or None.
    """
    dtype, (batch, num_rows, heads, dim) = statistics_dtype(q), q.shape
    heads_kv, groups = k.shape[2], key_weights.shape[-1]
    mass = q.new_zeros((batch, heads, num_rows, groups), dtype=dtype)
    bounds = band(num_rows, k.shape[1], options, q.device)
    for b in range(batch):
        weighted = (key_weights[b] != 0).any(-1)
        keys = _members(weighted if key_padding_mask is None else weighted & key_padding_mask[b], k.shape[1], q.device)
        rows = _members(None if query_mask is None else query_mask[b], num_rows, q.device)
        k_b = k[b, keys].to(dtype).transpose(0, 1).contiguous()  # (Hkv, N, D)
        w_b = key_weights[b, keys].to(dtype)  # (N, G)
        lse_b = lse[b].to(dtype).masked_fill(lse[b] == -torch.inf, torch.inf)  # exp(s - inf) = 0
        size = block_size(block_rows, heads * keys.numel() * k_b.element_size(), q.device)
        for tile in _blocks(rows, keys, bounds, size):
            picked = rows[tile.rows]
            q_b = (q[b, picked].to(dtype) * options.scale).transpose(0, 1)  # (Hq, R, D)
            scores = q_b.reshape(heads_kv, -1, dim) @ k_b[:, tile.keys].mT
            if options.softcap > 0:
                scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
            scores = scores.view(heads, picked.numel(), -1).sub_(lse_b[:, picked, None])
            allowed = _allowed(tile, rows, keys, bounds)
            if allowed is not None:
                scores.masked_fill_(~allowed, -torch.inf)
            mass[b][:, picked] = scores.exp_() @ w_b[tile.keys]
    return mass.clamp_(0.0, 1.0) if key_weights.dtype == torch.bool else mass


def selected_mass_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    dmass: torch.Tensor,
    mass: torch.Tensor,
    query_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    options: AttentionOptions,
    block_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk, dw (None for boolean weights) in float32 or float64; arguments as in `selected_mass`.

    lse depends on every key, so the total gradient dS = P * (dmass w^T - dmass mass) visits every key, though only the
    rows whose dmass is not zero.
    """
    dtype, num_keys = statistics_dtype(q), k.shape[1]
    dq, dk = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k))
    dw = torch.zeros(key_weights.shape, dtype=dtype, device=q.device) if key_weights.is_floating_point() else None
    bounds = band(q.shape[1], num_keys, options, q.device)
    for b in range(q.shape[0]):
        wanted = (dmass[b] != 0).any(-1).any(0)
        rows = _members(wanted if query_mask is None else wanted & query_mask[b], q.shape[1], q.device)
        padding = None if key_padding_mask is None else key_padding_mask[b : b + 1]
        k_b = k[b : b + 1].to(dtype)
        if padding is not None:
            k_b = k_b.masked_fill(~padding[..., None, None], 0.0)
        lse_b = lse[b : b + 1, :, rows].to(dtype)
        dead = lse_b == -torch.inf
        dmass_b = dmass[b : b + 1, :, rows].to(dtype).masked_fill(dead[..., None], 0.0)
        known = RowGradients(None, dmass_b, None, None, mass[b : b + 1, :, rows], lse_b.masked_fill(dead, torch.inf))
        into = Gradients(q.new_zeros((1, rows.numel()) + q.shape[2:], dtype=dtype), dk[b : b + 1], None, None)
        into = into._replace(w=None if dw is None else dw[b : b + 1])
        engine = PlainTiles(q[b : b + 1, rows].to(dtype), k_b, None, key_weights[b : b + 1].to(dtype), options)
        size = block_size(block_rows, q.shape[2] * num_keys * k_b.element_size(), q.device)
        row_bounds = (bounds[0][rows], bounds[1][rows])
        for tile in _blocks(rows, torch.arange(num_keys, device=q.device), bounds, size):
            engine.backward(tile, tile_allowed(tile, row_bounds, padding, None), known, into)
        dq[b, rows] = into.q[0]
    return dq, dk, dw
