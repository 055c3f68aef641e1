"""Backward pass of out, mass and lse together, without atomics: the same bits every time.

    P = exp(s - lse)
    dP = dout v^T + dmass w^T,  delta = rowsum(dout * out) + rowsum(dmass * mass) - dlse
    dS = P * (dP - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout,  dw = sum over heads of P^T dmass

The gradient of a mass costs next to nothing: a constant of the row in delta, in blocks of weight 1 another constant in
dP, in blocks of weight 0 nothing at all, and only where a block holds both a product per element. One kernel makes
delta, one loops over the rows for each block of keys (backward_dkv.py), one over the keys for each block of rows
(backward_dq.py).
"""

from __future__ import annotations

import torch
import triton

from mmrpt_kernels.attention.config import MAX_GROUPS
from mmrpt_kernels.attention.triton.backward_dkv import backward_dkv
from mmrpt_kernels.attention.triton.backward_dq import backward_dq, row_terms
from mmrpt_kernels.attention.triton.launch import Problem, last_contiguous, strides


def backward(
    problem: Problem,
    results: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor],
    gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk, dv in the dtypes of q, k, v; dw (B, S, G) float32, None for boolean weights.

    Args:
        results: out (B, T, Hq, Dv) or None where dout is, mass (B, Hq, T, G), lse (B, Hq, T).
        gradients: those of out, mass and lse, None where none arrived.
    """
    q, k, v, groups = problem.q, problem.k, problem.v, problem.weights.shape[2]
    dout, dmass, dlse = gradients
    # Packed rows and keys that no sequence owns are visited by no program; at padded keys nothing is written.
    idle = problem.packed or problem.padding is not None or q.numel() == 0 or k.numel() == 0
    fresh = torch.zeros_like if idle else torch.empty_like
    dq, dk = (fresh(x, memory_format=torch.contiguous_format) for x in (q, k))
    dv = (torch.zeros_like if dout is None else fresh)(v, memory_format=torch.contiguous_format)
    dw = None if problem.boolean else q.new_zeros(problem.weights.shape, dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk, dv, dw
    dout = None if dout is None else last_contiguous(dout)
    delta, dmass = row_terms(problem, results, (dout, dmass, dlse))
    shared = problem.arguments() | {
        "dout": dout,
        "dmass": dmass,
        "lse": results[2],
        "delta_in": delta,
        **strides("do", "bth", dout),
        "groups": groups,
        "GROUPS": triton.next_power_of_2(groups) if groups <= MAX_GROUPS else 0,
        "HAS_DOUT": dout is not None,
        "HAS_DMASS": dmass is not None,
    }
    backward_dq(problem, shared, dq)
    backward_dkv(problem, shared, dk, dv, dw if dmass is not None else None)
    return dq, dk, dv, dw
