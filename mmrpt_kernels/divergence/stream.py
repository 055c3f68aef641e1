"""The stream over two views' logits: rows of tokens in chunks, forward and backward; the backward projects again.

The loop knows no divergence: the row arithmetic comes as a pair of functions (`RowKernels`), so that a faster pair can
take its place. Runs outside autograd: its callers are custom operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mmrpt_kernels.common.head import (
    HeadOptions,
    chunk_rows,
    project,
    project_backward_hidden,
    project_backward_weight,
    statistics_dtype,
)

__all__ = ["Head", "RowKernels", "RowValues", "backward", "forward", "k3", "k3_slope", "sum_by_kind"]

VIEWS = 2  # a chunk of rows holds the logits of both views


class Head(NamedTuple):
    """Both views' lm head."""

    weight_p: torch.Tensor  # (V, H)
    weight_q: torch.Tensor  # (V, H_q)
    bias: torch.Tensor | None  # (V,)
    options: HeadOptions


class RowValues(NamedTuple):
    """What n rows give, or the gradients of it, in the statistics dtype."""

    divergence: torch.Tensor  # (n, K)
    logps_p: torch.Tensor | None  # (n,); None without targets
    logps_q: torch.Tensor | None  # (n,)
    entropy_p: torch.Tensor  # (n,)
    entropy_q: torch.Tensor  # (n,)


class RowKernels(NamedTuple):
    """Arithmetic on a chunk of both views' raw logits (n, V) in the statistics dtype, which it may overwrite.

    values(raw_p, raw_q, targets (n,) or None, kinds) -> RowValues
    gradients(raw_p, raw_q, targets, kinds, grads: RowValues, wanted) -> d loss / d raw (n, V) of each view, None for a
        view that is not `wanted` (two booleans); in the statistics dtype, or in that of the products to come
    """

    values: Callable[..., RowValues]
    gradients: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None]]


def k3(target_p: torch.Tensor, target_q: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1, d = clamp(target_q - target_p, -20, 20), clamped to [0, 10]; (n,) -> (n,)."""
    d = (target_q - target_p).clamp_(-20.0, 20.0)
    return (torch.expm1(d) - d).clamp_(0.0, 10.0)


def k3_slope(target_p: torch.Tensor, target_q: torch.Tensor) -> torch.Tensor:
    """d k3 / d target_q = - d k3 / d target_p, (n,); zero where a clamp holds."""
    d = target_q - target_p
    slope = torch.expm1(d.clamp(-20.0, 20.0))
    return slope.masked_fill_((d.abs() > 20.0) | (slope - d > 10.0), 0.0)


def sum_by_kind(divergence: torch.Tensor, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Gradients (n,) of each kind from those of the columns (n, K); a kind may have several columns."""
    g: dict[str, torch.Tensor] = {}
    for column, kind in enumerate(kinds):
        g[kind] = g[kind] + divergence[:, column] if kind in g else divergence[:, column]
    return g


def forward(kernels: RowKernels, hidden_p, hidden_q, head: Head, targets, kinds, chunk_size) -> RowValues:
    """divergence (N, K), logps_p, logps_q (N,) or (0,) without targets, entropy_p, entropy_q (N,)."""
    num_rows, vocab = hidden_p.shape[0], head.weight_p.shape[0]
    dtype = statistics_dtype(hidden_p, hidden_q, head.weight_p)
    with_targets = num_rows if targets is not None else 0
    divergence = hidden_p.new_empty(num_rows, len(kinds), dtype=dtype)
    vectors = (hidden_p.new_empty(n, dtype=dtype) for n in (with_targets, with_targets, num_rows, num_rows))
    out = RowValues(divergence, *vectors)
    step = chunk_rows(num_rows, VIEWS * vocab, chunk_size, dtype)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        raw_p = project(hidden_p[rows], head.weight_p, head.bias)
        raw_q = project(hidden_q[rows], head.weight_q, head.bias)
        values = kernels.values(raw_p, raw_q, None if targets is None else targets[rows], kinds)
        for whole, part in zip(out, values, strict=True):
            if part is not None:
                whole[rows] = part
        raw_p = raw_q = None  # the next chunk's logits take this one's memory
    return out


class _Accumulators(NamedTuple):
    """Gradients under way; None where not needed. Those of the head gather in the statistics dtype."""

    hidden_p: torch.Tensor | None
    hidden_q: torch.Tensor | None
    weight: torch.Tensor | None
    weight_q: torch.Tensor | None
    bias: torch.Tensor | None


def active_rows(grads: RowValues) -> torch.Tensor:
    """Indices (n,) of the rows with a gradient other than exactly zero; others cost nothing and spread no NaN."""
    active = (grads.divergence != 0).any(-1) | (grads.entropy_p != 0) | (grads.entropy_q != 0)
    if grads.logps_p is not None:
        active |= (grads.logps_p != 0) | (grads.logps_q != 0)
    return active.nonzero()[:, 0]


def backward(
    kernels: RowKernels, grads: RowValues, hidden_p, hidden_q, head: Head, shared_weight, targets, kinds, chunk, needs
) -> _Accumulators:
    """Gradients of (hidden_p, hidden_q, weight, weight_q, bias), None where not needed.

    Args:
        shared_weight: both views use one weight, whose gradient is then the sum over the views.
        chunk: rows a chunk at most; None: from a memory budget.
        needs: five booleans in that order.
    """
    vocab, dtype = head.weight_p.shape[0], statistics_dtype(hidden_p, hidden_q, head.weight_p)
    sources = (hidden_p, hidden_q, head.weight_p, head.weight_q, head.bias)
    dtypes = (hidden_p.dtype, hidden_q.dtype, dtype, dtype, dtype)
    made = zip(sources, dtypes, needs, strict=True)
    out = _Accumulators(*(t.new_zeros(t.shape, dtype=of) if need else None for t, of, need in made))
    into_q = out.weight if shared_weight else out.weight_q
    wanted = (
        out.hidden_p is not None or out.weight is not None or out.bias is not None,
        out.hidden_q is not None or into_q is not None or out.bias is not None,
    )
    active = active_rows(grads)
    step = chunk_rows(active.numel(), VIEWS * vocab, chunk, dtype)
    for rows in active.split(step) if active.numel() else ():
        some = RowValues(*(None if t is None else t[rows] for t in grads))
        hp, hq = hidden_p[rows], hidden_q[rows]
        raw_p, raw_q = project(hp, head.weight_p, head.bias), project(hq, head.weight_q, head.bias)
        chosen = None if targets is None else targets[rows]
        d_raw_p, d_raw_q = kernels.gradients(raw_p, raw_q, chosen, kinds, some, wanted)
        raw_p = raw_q = None
        _spread(d_raw_p, hp, rows, head.weight_p, out.hidden_p, out.weight, out.bias)
        _spread(d_raw_q, hq, rows, head.weight_q, out.hidden_q, into_q, out.bias)
        d_raw_p = d_raw_q = None
    return out


def _spread(d_raw, hidden_rows, rows, weight, into_hidden, into_weight, into_bias) -> None:
    """Carry d loss / d raw (n, V) of one view to its hidden rows, its weight and the bias."""
    if d_raw is None:
        return
    if into_hidden is not None:
        into_hidden[rows] = project_backward_hidden(d_raw, weight).to(into_hidden.dtype)
    if into_weight is not None:
        project_backward_weight(d_raw.to(into_weight.dtype), hidden_rows, into_weight)
    if into_bias is not None:
        into_bias += d_raw.sum(0, dtype=into_bias.dtype)
