"""The mass from a known lse as custom operators."""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.autograd import make_mass_differentiable
from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.triton.launch import as_batch, last_contiguous
from mmrpt_kernels.attention.triton.mass_forward import mass_forward
from mmrpt_kernels.attention.triton.query_list import QueryList, list_queries
from mmrpt_kernels.attention.triton.side_backward import side_mass_backward
from mmrpt_kernels.common.autocast import without_autocast

__all__ = ["mass_from_lse"]


def _rows_of(
    q: torch.Tensor,
    k: torch.Tensor,
    wanted: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    options: AttentionOptions,
) -> QueryList:
    """`list_queries` of a batch; a packed one is a batch of one."""
    cu_seqlens = None if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k)
    return list_queries(q.shape[0], q.shape[1], k.shape[1], wanted, cu_seqlens, options, q.device)


@torch.library.custom_op("mmrpt_kernels::triton_visual_mass", mutates_args=())
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
) -> torch.Tensor:
    options = AttentionOptions(window_left, window_right, scale, softcap)
    packed = cu_seqlens_q is not None
    q, k, lse, key_weights, query_mask = as_batch(packed, q, k, lse, key_weights, query_mask)
    with torch.cuda.device_of(q):
        rows = _rows_of(q, k, query_mask, cu_seqlens_q, cu_seqlens_k, options)
        mass = mass_forward(last_contiguous(q), last_contiguous(k), lse, key_weights, key_padding_mask, rows, options)
    return mass[0] if packed else mass


@torch.library.custom_op("mmrpt_kernels::triton_visual_mass_backward", mutates_args=())
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dw in the dtypes of their tensors; dw (0,) for boolean weights."""
    options = AttentionOptions(window_left, window_right, scale, softcap)
    packed = cu_seqlens_q is not None
    inputs = as_batch(packed, q, k, lse, key_weights, dmass, mass, query_mask)
    q_b, k_b, lse, weights, dmass, mass, query_mask = inputs
    wanted = (dmass != 0).any(-1).any(1)  # (B, T): rows without a gradient add nothing
    if query_mask is not None:
        wanted &= query_mask
    with torch.cuda.device_of(q):
        rows = _rows_of(q_b, k_b, wanted, cu_seqlens_q, cu_seqlens_k, options)
        q_b, k_b = last_contiguous(q_b), last_contiguous(k_b)
        dq, dk, dw = side_mass_backward(q_b, k_b, lse, weights, dmass, mass, key_padding_mask, rows, options)
    dw = q.new_empty(0) if dw is None else dw.view(key_weights.shape).to(key_weights.dtype)
    return dq.view(q.shape), dk.view(k.shape), dw


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
) -> torch.Tensor:
    """mass (B, Hq, T, G) as `reference.mass_from_lse`; float16, bfloat16 or float32, D at most 256."""
    return _visual_mass(q, k, lse, key_weights, query_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, *options)
