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
    even_rows,
    project,
    project_backward_hidden,
    project_backward_weight,
    statistics_dtype,
)

__all__ = ["Problem", "RowKernels", "RowValues", "backward", "forward", "k3", "k3_slope", "sum_by_kind"]

VIEWS = 2  # a chunk of rows holds the logits of both views
# On a GPU a chunk is sized by what its products move. Scoring, n rows do 2 n H V FLOPs a view and read the 2 H V bytes
# of a bfloat16 head: n FLOPs a byte, where an H100 needs about 300 (990 TFLOP/s, 3.35 TB/s). Learning, d weight's
# product reads and writes 8 H V bytes of float32 accumulator: n / 4. The row kernels' second sweep does not decide:
# logits of 152k words leave the L2 cache (50 MB) at 40 rows. A word takes two float32 logits, two bfloat16 gradients.
GPU_SCORE_ROWS = 1024
GPU_LEARN_ROWS = 4096
GPU_BYTES = 4 * 2**30
GPU_BYTES_PER_WORD = 12


class Problem(NamedTuple):
    """One call's tensors and what is asked of them."""

    hidden_p: torch.Tensor  # (N, H)
    hidden_q: torch.Tensor  # (N, H_q)
    weight: torch.Tensor  # (V, H)
    weight_q: torch.Tensor | None  # (V, H_q); None: weight serves both views
    bias: torch.Tensor | None  # (V,)
    targets: torch.Tensor | None  # (N,) int64, negative: no target
    options: HeadOptions
    kinds: tuple[str, ...]
    chunk_size: int | None

    def head_q(self) -> torch.Tensor:
        """The second view's weight (V, H_q)."""
        return self.weight if self.weight_q is None else self.weight_q

    def dtype(self) -> torch.dtype:
        """Of statistics and accumulators."""
        return statistics_dtype(self.hidden_p, self.hidden_q, self.weight)

    def chunk(self, num_rows: int, gpu_rows: int) -> int:
        """Rows to hold at once: `chunk_size`, or by a memory budget; on a GPU at most `gpu_rows`, all chunks alike."""
        vocab = self.weight.shape[0]
        if self.chunk_size is not None or not self.weight.is_cuda:
            return chunk_rows(num_rows, VIEWS * vocab, self.chunk_size, self.dtype())
        limit = max(1, min(gpu_rows, GPU_BYTES // (GPU_BYTES_PER_WORD * vocab)))
        return even_rows(num_rows, limit)

    def logits(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw logits (n, V) of both views at `rows`."""
        raw_p = project(self.hidden_p[rows], self.weight, self.bias)
        return raw_p, project(self.hidden_q[rows], self.head_q(), self.bias)


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


def forward(kernels: RowKernels, problem: Problem) -> RowValues:
    """divergence (N, K), logps_p, logps_q (N,) or (0,) without targets, entropy_p, entropy_q (N,)."""
    hidden, targets, kinds = problem.hidden_p, problem.targets, problem.kinds
    num_rows, dtype = hidden.shape[0], problem.dtype()
    with_targets = num_rows if targets is not None else 0
    vectors = (hidden.new_empty(n, dtype=dtype) for n in (with_targets, with_targets, num_rows, num_rows))
    out = RowValues(hidden.new_empty(num_rows, len(kinds), dtype=dtype), *vectors)
    step = problem.chunk(num_rows, GPU_SCORE_ROWS)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        raw = problem.logits(rows)
        values = kernels.values(*raw, None if targets is None else targets[rows], kinds)
        for whole, part in zip(out, values, strict=True):
            if part is not None:
                whole[rows] = part
        raw = values = None  # the next chunk's logits take this one's memory
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


def backward(kernels: RowKernels, problem: Problem, grads: RowValues, needs: list[bool]) -> _Accumulators:
    """Gradients of (hidden_p, hidden_q, weight, weight_q, bias), None where not needed: five booleans in that order.

    Where one weight serves both views its gradient is the sum over them.
    """
    sources, dtype = problem[:5], problem.dtype()
    dtypes = (problem.hidden_p.dtype, problem.hidden_q.dtype, dtype, dtype, dtype)
    made = zip(sources, dtypes, needs, strict=True)
    out = _Accumulators(*(t.new_zeros(t.shape, dtype=of) if need else None for t, of, need in made))
    into_q = out.weight if problem.weight_q is None else out.weight_q
    wanted = (
        out.hidden_p is not None or out.weight is not None or out.bias is not None,
        out.hidden_q is not None or into_q is not None or out.bias is not None,
    )
    active = active_rows(grads)
    for rows in active.split(problem.chunk(active.numel(), GPU_LEARN_ROWS)) if active.numel() else ():
        some = RowValues(*(None if t is None else t[rows] for t in grads))
        raw = problem.logits(rows)
        targets = None if problem.targets is None else problem.targets[rows]
        d_p, d_q = kernels.gradients(*raw, targets, problem.kinds, some, wanted)
        raw = None
        _spread(d_p, problem.hidden_p[rows], rows, problem.weight, (out.hidden_p, out.weight, out.bias))
        _spread(d_q, problem.hidden_q[rows], rows, problem.head_q(), (out.hidden_q, into_q, out.bias))
        d_p = d_q = None
    return out


def _spread(d_raw, hidden_rows, rows, weight, into) -> None:
    """Carry d loss / d raw (n, V) of one view into the gradients of its hidden rows, its weight and the bias."""
    if d_raw is None:
        return
    into_hidden, into_weight, into_bias = into
    if into_hidden is not None:
        into_hidden[rows] = project_backward_hidden(d_raw, weight).to(into_hidden.dtype)
    if into_weight is not None:
        project_backward_weight(d_raw, hidden_rows, into_weight)
    if into_bias is not None:
        into_bias += d_raw.sum(0, dtype=into_bias.dtype)
