"""The mass from a known lse as a custom operator."""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.operators import mass_operator
from mmrpt_kernels.attention.triton.attention_op import backward
from mmrpt_kernels.attention.triton.launch import as_batch, prepare
from mmrpt_kernels.attention.triton.mass_forward import mass_forward
from mmrpt_kernels.attention.triton.query_list import list_queries

__all__ = ["mass_and_lse"]


def _forward(q, k, lse, key_weights, masks: Masks, options: AttentionOptions) -> torch.Tensor:
    packed = masks.cu_seqlens_q is not None
    mass = q.new_zeros((*lse.shape, key_weights.shape[-1]), dtype=torch.float32)
    if key_weights.shape[-1] == 0:
        return mass
    with torch.cuda.device_of(q):
        problem = prepare(q, k, k, key_weights, options, masks)
        lse_b, mass_b, wanted = as_batch(packed, lse, mass, masks.query_mask)
        mass_forward(problem, lse_b, list_queries(problem, wanted), mass_b)
    return mass


mass_and_lse = mass_operator("triton_visual_mass", _forward, backward)
