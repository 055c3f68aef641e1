"""The fused attention, and the mass from a known lse, as custom operators.

Triton launches on the current device, whatever device its arguments are on: the operators make it the tensors' own.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.operators import attention_operator, mass_operator
from mmrpt_kernels.attention.triton import backward as backward_pass
from mmrpt_kernels.attention.triton.forward import forward
from mmrpt_kernels.attention.triton.launch import as_batch, prepare
from mmrpt_kernels.attention.triton.mass_forward import mass_forward
from mmrpt_kernels.attention.triton.query_list import list_queries


def attend(q, k, v, key_weights, masks: Masks, options: AttentionOptions):
    """out, mass and lse, see `attention.operators.attention_operator`."""
    with torch.cuda.device_of(q):
        out, mass, lse = forward(prepare(q, k, v, key_weights, options, masks))
    if key_weights.shape[-1] == 0:
        mass = mass.new_empty((*mass.shape[:-1], 0))
    return (out, mass, lse) if masks.cu_seqlens_q is None else (out[0], mass[0], lse[0])


def visual_mass(q, k, lse, key_weights, masks: Masks, options: AttentionOptions) -> torch.Tensor:
    """The mass, see `attention.operators.mass_operator`."""
    packed = masks.cu_seqlens_q is not None
    mass = q.new_zeros((*lse.shape, key_weights.shape[-1]), dtype=torch.float32)
    if key_weights.shape[-1] == 0:
        return mass
    with torch.cuda.device_of(q):
        problem = prepare(q, k, k, key_weights, options, masks)
        lse_b, mass_b, wanted = as_batch(packed, lse, mass, masks.query_mask)
        mass_forward(problem, lse_b, list_queries(problem, wanted), mass_b)
    return mass


def backward(inputs, results, gradients, masks: Masks, options: AttentionOptions):
    """dq, dk, dv, dw of both operators."""
    packed = masks.cu_seqlens_q is not None
    with torch.cuda.device_of(inputs[0]):
        problem = prepare(*inputs, options, masks)
        *made, dw = backward_pass.backward(problem, as_batch(packed, *results), as_batch(packed, *gradients))
    return *made, (None if dw is None else dw[..., : inputs[3].shape[-1]])


attention = attention_operator("triton_attention", attend, backward)
mass_and_lse = mass_operator("triton_visual_mass", visual_mass, backward)
