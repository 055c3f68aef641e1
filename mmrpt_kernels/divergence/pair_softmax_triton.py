"""The divergence's row kernels in Triton: float32 logits of both views in, sums or gradients out."""

from __future__ import annotations

import torch

from mmrpt_kernels.divergence.pair_softmax import PairHead, PairKernels, Slopes, Statistics, Sums, Wanted
from mmrpt_kernels.divergence.triton_backward import gradient
from mmrpt_kernels.divergence.triton_forward import mean_sums, row_sums

__all__ = ["PAIR_KERNELS"]

# The kernels read the raw logits of both views again.
State = tuple[torch.Tensor, torch.Tensor]


def sums(raw_p, raw_q, targets, head: PairHead, wanted: Wanted) -> tuple[Sums, State]:
    """`PairKernels.sums`."""
    with torch.cuda.device_of(raw_p):
        return row_sums(raw_p, raw_q, targets, wanted.kinds, head), (raw_p, raw_q)


def _rows(found: Statistics) -> torch.Tensor:
    """What kernels read of whole rows, (n, FIELDS)."""
    views = (found.top, found.log_total)
    return torch.stack([*(each[v] for v in (0, 1) for each in views), *found.entropy, *found.kl], -1).float()


def to_mean(state: State, found: Statistics, head: PairHead) -> torch.Tensor:
    """`PairKernels.to_mean`."""
    with torch.cuda.device_of(state[0]):
        return mean_sums(*state, _rows(found), head).t().contiguous()


def gradients(state: State, targets, found: Statistics, slopes: Slopes, head: PairHead, outs) -> None:
    """`PairKernels.gradients`."""
    zero = torch.zeros_like(found.top[0])
    singles = [zero if slope is None else slope for slope in slopes[:3]]
    pairs = [(zero, zero) if pair is None else pair.unbind() for pair in (slopes.logps, slopes.entropy)]
    grads = torch.stack([*singles, *pairs[0], *pairs[1]], -1).float()
    kinds = tuple(kind for kind in ("kl", "reverse_kl", "js") if getattr(slopes, kind) is not None)
    means = None if found.to_mean is None else found.to_mean.t().float().contiguous()
    with torch.cuda.device_of(state[0]):
        gradient(state, targets, kinds, head, rows=_rows(found), means=means, grads=grads, outs=outs)


PAIR_KERNELS = PairKernels(sums, to_mean, gradients)
