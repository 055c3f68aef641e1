"""The mass from a known lse as a custom operator.

lse is a statistic of q and k, so the gradient of a mass is that of attention whose out has none: the fused backward
pass makes it, from every key that a row sees.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.operators import mass_operator
from mmrpt_kernels.attention.triton.backward import backward
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


def _backward(q, k, lse, key_weights, mass, dmass, dlse, masks: Masks, options: AttentionOptions):
    lse = lse.float().contiguous()
    if masks.query_mask is not None:
        # Nobody asked for these rows: whatever stands there, NaN included, counts as a row without keys.
        q = q.masked_fill(~masks.query_mask[..., None, None], 0.0)
        lse = lse.masked_fill(~masks.query_mask.unsqueeze(-2), -torch.inf)
    packed = masks.cu_seqlens_q is not None
    with torch.cuda.device_of(q):
        problem = prepare(q, k, k, key_weights, options, masks)
        mass, lse, dmass, dlse = as_batch(packed, mass, lse, dmass, dlse)
        dq, dk, _, dw = backward(problem, (None, mass, lse), (None, dmass, dlse))
    return dq, dk, dw


mass_and_lse = mass_operator("triton_visual_mass", _forward, _backward)
