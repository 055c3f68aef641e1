"""The portable backend as custom operators: packed batches are walked sequence by sequence, each one dense.

Memory is linear in T and S: tiles of scores are made, used and dropped, and the backward pass makes them again from the
saved lse. On a CPU without a soft cap the products run in torch's fused attention (see portable_tiles.py).
"""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.autograd import (
    gradients_like,
    make_attention_differentiable,
    make_mass_differentiable,
    mass_like,
    results_like,
)
from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.portable_dense import Masks, attend, attend_backward
from mmrpt_kernels.attention.portable_mass import selected_mass, selected_mass_backward
from mmrpt_kernels.attention.portable_tiles import RowGradients
from mmrpt_kernels.common.autocast import without_autocast
from mmrpt_kernels.common.packing import Segment, read_segments

__all__ = ["attention", "mass_from_lse"]


def _segments(q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None) -> list[Segment]:
    return [] if cu_q is None else read_segments(cu_q, cu_k, q.shape[0], k.shape[0])


@torch.library.custom_op("mmrpt_kernels::attention_with_mass", mutates_args=())
@without_autocast
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
    block_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = AttentionOptions(window_left, window_right, scale, softcap)
    if cu_seqlens_q is None:
        return attend(q, k, v, key_weights, options, Masks(key_padding_mask, attn_mask), block_rows)
    made = results_like(q, k, v, key_weights)
    for rows, keys in _segments(q, k, cu_seqlens_q, cu_seqlens_k):
        part = attend(
            q[None, rows], k[None, keys], v[None, keys], key_weights[None, keys], options, Masks(), block_rows
        )
        made[0][rows], made[1][:, rows], made[2][:, rows] = (x[0] for x in part)
    return made


@torch.library.custom_op("mmrpt_kernels::attention_with_mass_backward", mutates_args=())
@without_autocast
def _attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    dout: torch.Tensor | None,
    dmass: torch.Tensor | None,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    mass: torch.Tensor,
    lse: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
    block_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, dw in the dtypes of their tensors; dw (0,) for boolean weights."""
    options = AttentionOptions(window_left, window_right, scale, softcap)
    made = gradients_like(key_weights, q, k, v)
    if cu_seqlens_q is None:
        rows = RowGradients(dout, dmass, dlse, out, mass, lse)
        masks = Masks(key_padding_mask, attn_mask)
        _store(made, attend_backward(q, k, v, key_weights, rows, options, masks, block_rows))
        return made
    for rows, keys in _segments(q, k, cu_seqlens_q, cu_seqlens_k):
        known = RowGradients(
            None if dout is None else dout[None, rows],
            *(None if x is None else x[None, :, rows] for x in (dmass, dlse)),
            out[None, rows],
            mass[None, :, rows],
            lse[None, :, rows],
        )
        inputs = (q[None, rows], k[None, keys], v[None, keys], key_weights[None, keys])
        part = attend_backward(*inputs, known, options, Masks(), block_rows)
        targets = (made[0][rows], made[1][keys], made[2][keys], made[3][keys])
        _store(targets, part)
    return made


def _store(targets, gradients) -> None:
    """Write a dense batch's gradients where they belong; a gradient nobody computed is 0."""
    for target, gradient in zip(targets, gradients, strict=True):
        if gradient is None:
            target.zero_()
        else:
            target.copy_(gradient.view(target.shape))


make_attention_differentiable(_attention, _attention_backward)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    options: AttentionOptions,
    *,
    key_padding_mask: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    block_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, mass (B, Hq, T, G), lse as `reference.attention`; block_rows: rows of a tile, 0 = choose."""
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k)
    return _attention(q, k, v, key_weights, *masks, *options, block_rows)


@torch.library.custom_op("mmrpt_kernels::visual_mass", mutates_args=())
@without_autocast
def _visual_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    query_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
    block_rows: int,
) -> torch.Tensor:
    options = AttentionOptions(window_left, window_right, scale, softcap)
    if cu_seqlens_q is None:
        return selected_mass(q, k, lse, key_weights, query_mask, key_padding_mask, options, block_rows)
    mass = mass_like(q, k, lse, key_weights)
    for rows, keys in _segments(q, k, cu_seqlens_q, cu_seqlens_k):
        wanted = None if query_mask is None else query_mask[None, rows]
        inputs = (q[None, rows], k[None, keys], lse[None, :, rows], key_weights[None, keys])
        mass[:, rows] = selected_mass(*inputs, wanted, None, options, block_rows)[0]
    return mass


@torch.library.custom_op("mmrpt_kernels::visual_mass_backward", mutates_args=())
@without_autocast
def _visual_mass_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    dmass: torch.Tensor,
    mass: torch.Tensor,
    query_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
    block_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dw in the dtypes of their tensors; dw (0,) for boolean weights."""
    options = AttentionOptions(window_left, window_right, scale, softcap)
    made = gradients_like(key_weights, q, k)
    if cu_seqlens_q is None:
        inputs = (q, k, lse, key_weights, dmass, mass, query_mask, key_padding_mask)
        _store(made, selected_mass_backward(*inputs, options, block_rows))
        return made
    for rows, keys in _segments(q, k, cu_seqlens_q, cu_seqlens_k):
        inputs = (q[None, rows], k[None, keys], lse[None, :, rows], key_weights[None, keys])
        known = (
            dmass[None, :, rows],
            mass[None, :, rows],
            None if query_mask is None else query_mask[None, rows],
            None,
        )
        _store(
            (made[0][rows], made[1][keys], made[2][keys]), selected_mass_backward(*inputs, *known, options, block_rows)
        )
    return made


make_mass_differentiable(_visual_mass, _visual_mass_backward)


def mass_from_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    options: AttentionOptions,
    *,
    query_mask: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    block_rows: int = 0,
) -> torch.Tensor:
    """mass (B, Hq, T, G) as `reference.mass_from_lse`; block_rows: rows of a tile, 0 = choose."""
    masks = (query_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k)
    return _visual_mass(q, k, lse, key_weights, *masks, *options, block_rows)
