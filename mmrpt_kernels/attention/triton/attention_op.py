"""The fused attention as custom operators.

Triton launches on the current device, whatever device its arguments are on: the operators make it the tensors' own.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.autograd import make_attention_differentiable, results_like
from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.triton.backward import backward
from mmrpt_kernels.attention.triton.decode import decode, serves
from mmrpt_kernels.attention.triton.forward import forward
from mmrpt_kernels.attention.triton.launch import as_batch, prepare
from mmrpt_kernels.common.autocast import without_autocast

__all__ = ["attention"]


@torch.library.custom_op("mmrpt_kernels::triton_attention", mutates_args=())
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, mass, lse and the normalizers (..., Hq, T, 2) of `forward`, for the backward pass alone."""
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k)
    options = AttentionOptions(window_left, window_right, scale, softcap)
    with torch.cuda.device_of(q):
        problem = prepare(q, k, v, key_weights, options, masks)
        out, mass, *rest = decode(problem) if serves(problem) else forward(problem)
    if key_weights.shape[-1] == 0:
        mass = mass.new_empty((*mass.shape[:-1], 0))
    made = (out, mass, *rest)
    return made if cu_seqlens_q is None else tuple(x[0] for x in made)


@torch.library.custom_op("mmrpt_kernels::triton_attention_backward", mutates_args=())
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
    normalizers: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, dw in the dtypes of their tensors; dw (0,) for boolean weights."""
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k)
    options = AttentionOptions(window_left, window_right, scale, softcap)
    packed, groups = cu_seqlens_q is not None, key_weights.shape[-1]
    dmass = None if groups == 0 else dmass
    with torch.cuda.device_of(q):
        problem = prepare(q, k, v, key_weights, options, masks)
        *made, dw = backward(problem, as_batch(packed, out, mass, normalizers), as_batch(packed, dout, dmass, dlse))
    if packed:
        made = [x[0] for x in made]
    dw = q.new_empty(0) if dw is None else dw[..., :groups].reshape(key_weights.shape).to(key_weights.dtype)
    return *made, dw


def _results_like(q, k, v, key_weights, *_):
    made = results_like(q, k, v, key_weights)
    return *made, made[2].new_empty((*made[2].shape, 2))


make_attention_differentiable(_attention, _attention_backward, _results_like)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, mass (B, Hq, T, G), lse as `reference.attention`; float16, bfloat16 or float32, D and Dv at most 256."""
    masks = (key_padding_mask, attn_mask, cu_seqlens_q, cu_seqlens_k)
    return _attention(q, k, v, key_weights, *masks, *options)[:3]
