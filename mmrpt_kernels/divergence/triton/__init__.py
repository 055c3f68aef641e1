"""The row arithmetic of linear_token_divergence as Triton kernels: float32 logits of both views in, values or gradients
out.

Gradients come in the dtype of the products that follow (`products_dtype`)."""

from __future__ import annotations

import math
from functools import partial

import torch

from mmrpt_kernels.common.head import HeadOptions, products_dtype
from mmrpt_kernels.divergence.stream import Problem, RowKernels, RowValues, k3, k3_slope, sum_by_kind
from mmrpt_kernels.divergence.triton.backward import gradient
from mmrpt_kernels.divergence.triton.forward import (
    ENTROPY_P,
    ENTROPY_Q,
    HELLINGER,
    KL,
    LOGP_P,
    LOGP_Q,
    MEAN_P,
    MEAN_Q,
    REVERSE_KL,
    Statistics,
    statistics,
)

__all__ = ["row_kernels"]


def row_kernels(problem: Problem) -> RowKernels:
    """The pair for one call."""
    pairs = ((problem.hidden_p, problem.weight), (problem.hidden_q, problem.head_q()))
    dtypes = tuple(products_dtype(hidden, weight) for hidden, weight in pairs)
    settings = {"options": problem.options}
    return RowKernels(partial(values, **settings), partial(gradients, **settings, dtypes=dtypes))


def _column(kind: str, found: Statistics) -> torch.Tensor:
    """One divergence (n,) of a chunk."""
    rows, means = found
    if kind == "k3":
        return k3(rows[:, LOGP_P.value], rows[:, LOGP_Q.value])
    if kind == "js":
        return (means[:, MEAN_P.value] + means[:, MEAN_Q.value]).mul_(0.5).clamp_(0.0, math.log(2.0))
    if kind == "hellinger":
        return means[:, HELLINGER.value].clamp(0.0, 1.0)
    return rows[:, KL.value if kind == "kl" else REVERSE_KL.value]


def values(raw_p, raw_q, targets, kinds, *, options: HeadOptions) -> RowValues:
    """RowKernels.values."""
    with torch.cuda.device_of(raw_p):
        found = statistics(raw_p, raw_q, targets, kinds, options)
    logps = (None, None) if targets is None else (found.rows[:, LOGP_P.value], found.rows[:, LOGP_Q.value])
    entropies = (found.rows[:, ENTROPY_P.value], found.rows[:, ENTROPY_Q.value])
    return RowValues(torch.stack([_column(kind, found) for kind in kinds], -1), *logps, *entropies)


def _row_gradients(grads: RowValues, found: Statistics, targets, kinds) -> torch.Tensor:
    """What the kernel reads of each row, (n, 8) float32: see backward.py."""
    g = sum_by_kind(grads.divergence, kinds)
    zero = torch.zeros_like(grads.entropy_p)
    g_p = g_q = zero
    if targets is not None:
        g_p, g_q = grads.logps_p, grads.logps_q
        if "k3" in g:
            slope = k3_slope(found.rows[:, LOGP_P.value], found.rows[:, LOGP_Q.value]).mul_(g["k3"])
            slope.masked_fill_(g["k3"] == 0, 0.0)  # not NaN from a row that asks for nothing
            g_p, g_q = g_p - slope, g_q + slope
        g_p, g_q = g_p.masked_fill(targets < 0, 0.0), g_q.masked_fill(targets < 0, 0.0)
    divergences = (g.get(kind, zero) for kind in ("kl", "reverse_kl", "js", "hellinger"))
    return torch.stack((*divergences, g_p, g_q, grads.entropy_p, grads.entropy_q), -1)


def gradients(raw_p, raw_q, targets, kinds, grads: RowValues, wanted, *, options: HeadOptions, dtypes):
    """RowKernels.gradients, in the views' `dtypes`; over the logits where these are float32."""
    with torch.cuda.device_of(raw_p):
        found = statistics(raw_p, raw_q, targets, kinds, options)
        outs = tuple(
            (raw if dtype == raw.dtype else torch.empty_like(raw, dtype=dtype)) if want else None
            for raw, dtype, want in zip((raw_p, raw_q), dtypes, wanted, strict=True)
        )
        gradient(raw_p, raw_q, targets, kinds, options, found, _row_gradients(grads, found, targets, kinds), outs)
    return outs
