"""The fused attention as a custom operator.

Triton launches on the current device, whatever device its arguments are on: the operators make it the tensors' own.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.operators import attention_operator
from mmrpt_kernels.attention.triton import backward as backward_pass
from mmrpt_kernels.attention.triton.forward import forward
from mmrpt_kernels.attention.triton.launch import as_batch, prepare

__all__ = ["attention", "backward"]


def _forward(q, k, v, key_weights, masks: Masks, options: AttentionOptions):
    with torch.cuda.device_of(q):
        out, mass, lse = forward(prepare(q, k, v, key_weights, options, masks))
    if key_weights.shape[-1] == 0:
        mass = mass.new_empty((*mass.shape[:-1], 0))
    return (out, mass, lse) if masks.cu_seqlens_q is None else (out[0], mass[0], lse[0])


def backward(inputs, results, gradients, masks: Masks, options: AttentionOptions):
    """dq, dk, dv, dw of both operators, see `operators.attention_operator`."""
    packed = masks.cu_seqlens_q is not None
    with torch.cuda.device_of(inputs[0]):
        problem = prepare(*inputs, options, masks)
        *made, dw = backward_pass.backward(problem, as_batch(packed, *results), as_batch(packed, *gradients))
    return *made, (None if dw is None else dw[..., : inputs[3].shape[-1]])


attention = attention_operator("triton_attention", _forward, backward)
