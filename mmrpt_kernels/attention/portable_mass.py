"""The portable backend's mass from a known lse: only wanted rows against only keys of non-zero weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks, Tile, band
from mmrpt_kernels.attention.portable_dense import block_size, exact_shares
from mmrpt_kernels.common.dtypes import statistics_dtype


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


def selected_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    options: AttentionOptions,
    masks: Masks,
) -> torch.Tensor:
    """mass (B, Hq, T, G) in float32 or float64; 0 in rows outside query_mask and in rows of lse -inf. Boolean weights:
    exactly 1 where all that a row may attend to is in the group.

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
            if tile.shape == "masked":
                first, last = (bound[picked, None] for bound in bounds)
                key = keys[tile.keys]
                scores.masked_fill_((key < first) | (key >= last), -torch.inf)
            mass[b][:, picked] = scores.exp_() @ w_b[tile.keys]
    if key_weights.dtype == torch.bool:
        dead = exact_shares(mass, key_weights, bounds, masks) == 0
        mass.masked_fill_(dead[:, None], 0.0)
        mass.masked_fill_((lse == -torch.inf)[..., None], 0.0)
        if query_mask is not None:
            mass.masked_fill_(~query_mask[:, None, :, None], 0.0)
    return mass
