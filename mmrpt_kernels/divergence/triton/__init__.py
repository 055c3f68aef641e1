"""The row arithmetic of linear_token_divergence as Triton kernels: float32 logits of both views in, sums or gradients
out.

Gradients come in the dtype of the products that follow (`products_dtype`)."""

from __future__ import annotations

from functools import partial

import torch

from mmrpt_kernels.common.head import HeadOptions, products_dtype
from mmrpt_kernels.divergence.rows import RowKernels, Slopes, Statistics, Sums, Wanted
from mmrpt_kernels.divergence.stream import Problem
from mmrpt_kernels.divergence.triton.backward import gradient
from mmrpt_kernels.divergence.triton.forward import mean_sums, row_sums

__all__ = ["row_kernels"]

# The kernels want to see the raw logits of both views again.
State = tuple[torch.Tensor, torch.Tensor]


def row_kernels(problem: Problem) -> RowKernels:
    """The kernels for one call."""
    pairs = ((problem.hidden_p, problem.weight), (problem.hidden_q, problem.head_q()))
    made = (partial(one, options=problem.options) for one in (sums, means, gradients))
    return RowKernels(*made, tuple(products_dtype(hidden, weight) for hidden, weight in pairs))


def sums(raw_p, raw_q, targets, wanted: Wanted, *, options: HeadOptions) -> tuple[Sums, State]:
    """RowKernels.sums."""
    with torch.cuda.device_of(raw_p):
        return row_sums(raw_p, raw_q, targets, wanted.kinds, options), (raw_p, raw_q)


def _rows(found: Statistics) -> torch.Tensor:
    """What kernels read of whole rows, (n, FIELDS)."""
    views = (found.top, found.log_total)
    return torch.stack([*(each[v] for v in (0, 1) for each in views), *found.entropy, *found.kl], -1).float()


def means(state: State, found: Statistics, kinds: tuple[str, ...], *, options: HeadOptions) -> torch.Tensor:
    """RowKernels.means."""
    with torch.cuda.device_of(state[0]):
        return mean_sums(*state, _rows(found), kinds, options).t().contiguous()


def gradients(state: State, targets, found: Statistics, slopes: Slopes, outs, *, options: HeadOptions) -> None:
    """RowKernels.gradients, in the views' dtypes."""
    zero = torch.zeros_like(found.top[0])
    singles = [zero if slope is None else slope for slope in slopes[:4]]
    pairs = [(zero, zero) if pair is None else pair.unbind() for pair in (slopes.logps, slopes.entropy)]
    grads = torch.stack([*singles, *pairs[0], *pairs[1]], -1).float()
    kinds = tuple(kind for kind in ("kl", "reverse_kl", "js", "hellinger") if getattr(slopes, kind) is not None)
    row_means = None if found.means is None else found.means.t().float().contiguous()
    with torch.cuda.device_of(state[0]):
        gradient(*state, targets, kinds, options, rows=_rows(found), means=row_means, grads=grads, outs=outs)
