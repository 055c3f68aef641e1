"""The portable backend's mass from a known lse: only wanted rows against only keys of non-zero weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks, Tile, band, tile_allowed
from mmrpt_kernels.attention.operators import statistics_dtype
from mmrpt_kernels.attention.portable_dense import block_size, exact_shares
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
    options: AttentionOptions,
    masks: Masks,
) -> torch.Tensor:
    """mass (B, Hq, T, G) in float32 or float64; rows outside query_mask and rows of lse -inf
    are 0. Boolean weights: exactly 1 where all that a row may attend to is in the group.

    Args:
        q, k: (B, T, Hq, D), (B, S, Hkv, D).
        lse: (B, Hq, T).
        key_weights: (B, S, G) bool or float.
        masks: key_padding_mask and query_mask.
    """
    query_mask, padding = masks.query_mask, masks.key_padding_mask
    dtype, (batch, num_rows, heads, dim) = statistics_dtype(q), q.shape
    heads_kv, groups = k.shape[2], key_weights.shape[-1]
    mass = q.new_zeros((batch, heads, num_rows, groups), dtype=dtype)
    bounds = band(num_rows, k.shape[1], options, q.device)
    for b in range(batch):
        weighted = (key_weights[b] != 0).any(-1)
        keys = _members(weighted if padding is None else weighted & padding[b], k.shape[1], q.device)
        rows = _members(None if query_mask is None else query_mask[b], num_rows, q.device)
        k_b = k[b, keys].to(dtype).transpose(0, 1).contiguous()  # (Hkv, N, D)
        w_b = key_weights[b, keys].to(dtype)  # (N, G)
        lse_b = lse[b].to(dtype).masked_fill(lse[b] == -torch.inf, torch.inf)  # exp(s - inf) = 0
        size = block_size(heads * keys.numel() * k_b.element_size(), q.device)
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
    if key_weights.dtype == torch.bool:
        dead = exact_shares(mass, key_weights, bounds, masks) == 0
        mass.masked_fill_(dead[:, None], 0.0)
        mass.masked_fill_((lse == -torch.inf)[..., None], 0.0)
        if query_mask is not None:
            mass.masked_fill_(~query_mask[:, None, :, None], 0.0)
    return mass


def selected_mass_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    key_weights: torch.Tensor,
    rows: RowGradients,
    options: AttentionOptions,
    masks: Masks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk, dw (None for boolean weights) in float32 or float64; masks as in `selected_mass`.

    lse depends on every key, so dS = P * (dmass w^T - rowsum(dmass * mass) + dlse) visits every key, though only the
    rows that have a gradient. rows: lse -inf in dead rows, no out.
    """
    dtype, num_keys = statistics_dtype(q), k.shape[1]
    dq, dk = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k))
    wants_w = key_weights.is_floating_point() and rows.dmass is not None
    dw = torch.zeros(key_weights.shape, dtype=dtype, device=q.device) if wants_w else None
    bounds = band(q.shape[1], num_keys, options, q.device)
    wanted = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    if rows.dmass is not None:
        wanted |= (rows.dmass != 0).any(-1).any(1)
    if rows.dlse is not None:
        wanted |= (rows.dlse != 0).any(1)
    if masks.query_mask is not None:
        wanted &= masks.query_mask
    for b in range(q.shape[0]):
        members = _members(wanted[b], q.shape[1], q.device)
        padding = None if masks.key_padding_mask is None else masks.key_padding_mask[b : b + 1]
        k_b = k[b : b + 1].to(dtype)
        if padding is not None:
            k_b = k_b.masked_fill(~padding[..., None, None], 0.0)
        dmass, dlse, mass, lse = (
            None if x is None else x[b : b + 1, :, members].to(dtype)
            for x in (rows.dmass, rows.dlse, rows.mass, rows.lse)
        )
        dead = lse == -torch.inf
        known = RowGradients(
            None,
            None if dmass is None else dmass.masked_fill(dead[..., None], 0.0),
            None if dlse is None else dlse.masked_fill(dead, 0.0),
            None,
            mass,
            lse.masked_fill(dead, torch.inf),
        )
        dq_b = q.new_zeros((1, members.numel()) + q.shape[2:], dtype=dtype)
        into = Gradients(dq_b, dk[b : b + 1], None, None if dw is None else dw[b : b + 1])
        way = PlainTiles(q[b : b + 1, members].to(dtype), k_b, None, key_weights[b : b + 1].to(dtype), options)
        size = block_size(q.shape[2] * num_keys * k_b.element_size(), q.device)
        row_bounds = (bounds[0][members], bounds[1][members])
        for tile in _blocks(members, torch.arange(num_keys, device=q.device), bounds, size):
            way.backward(tile, tile_allowed(tile, row_bounds, padding, None), known, into)
        dq[b, members] = dq_b[0]
    return dq, dk, dw
