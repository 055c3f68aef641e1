"""The stream over the vocabulary: rows of tokens in chunks, each chunk of logits visited once.

For every chunk: project to logits -> row statistics (log-prob, entropy) -> two coefficients per token, asked of the
caller -> logits overwritten by their gradient -> two matrix products for d hidden and d weight. The loop knows no loss;
the row arithmetic comes as a pair of functions (`RowKernels`), so that a faster pair can take their place.

Runs outside autograd: its callers are custom operators and autograd functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mmrpt_kernels.common.head import (
    HeadOptions,
    chunk_rows,
    project,
    project_backward_hidden,
    project_backward_weight,
    statistics_dtype,
)

# Taller chunks gain nothing more.
MAX_TALL_ROWS = 1024

__all__ = ["Coefficients", "Gradients", "Head", "RowKernels", "check_targets", "visit"]

# (logps (n,), entropy (n,) or None, rows (n,) int64) -> d loss / d logps (n,), d loss / d entropy (n,) or None
Coefficients = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


class Head(NamedTuple):
    """The lm head: weight (V, H), bias (V,) or None, and what happens between raw logits and softmax."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    options: HeadOptions


class RowKernels(NamedTuple):
    """Arithmetic on a chunk of logits.

    statistics(raw logits (n, V) to overwrite, targets (n,), options, want_entropy, keep_logits) -> state with .logps
    and .entropy (n,); keep_logits: the gradient will read the logits themselves, for an entropy or a soft cap
    gradient(state, targets (n,), options, d logps (n,), d entropy (n,) or None) -> d raw logits (n, V), exactly zero in
    rows whose two coefficients are zero
    """

    statistics: Callable[..., Any]
    gradient: Callable[..., torch.Tensor]


class Gradients:
    """Accumulators of d hidden (N, H), d weight (V, H) and d bias (V,); None where nobody asked.

    Weight and bias gather float32 (float64 for float64) whatever the inputs and are rounded once, by `result`.
    """

    def __init__(self, hidden: torch.Tensor, head: Head, *, need: tuple[bool, bool, bool]) -> None:
        """`need`: whether hidden, weight and bias want a gradient. hidden: (N, H)."""
        dtype = statistics_dtype(hidden, head.weight, head.bias)
        self.weight_dtype, self.bias_dtype = head.weight.dtype, None if head.bias is None else head.bias.dtype
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need[0] else None
        self.weight = hidden.new_zeros(head.weight.shape, dtype=dtype) if need[1] else None
        self.bias = hidden.new_zeros(head.bias.shape, dtype=dtype) if need[2] and head.bias is not None else None

    def wanted(self) -> bool:
        return self.hidden is not None or self.weight is not None or self.bias is not None

    def add(self, rows: torch.Tensor, hidden_rows: torch.Tensor, grad_raw: torch.Tensor, weight: torch.Tensor) -> None:
        """Add a chunk: rows (n,) of the tokens, hidden_rows (n, H), grad_raw (n, V)."""
        if self.hidden is not None:
            grads = project_backward_hidden(grad_raw, weight)
            self.hidden.index_copy_(0, rows, grads.to(self.hidden.dtype))
        if self.weight is not None:
            project_backward_weight(grad_raw, hidden_rows, self.weight)
        if self.bias is not None:
            self.bias.add_(grad_raw.sum(0))

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """d hidden, d weight, d bias in the dtypes of their tensors."""
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(self.weight_dtype),
            None if self.bias is None else self.bias.to(self.bias_dtype),
        )


def check_targets(targets: torch.Tensor, rows: torch.Tensor, vocab: int) -> None:
    """Raise ValueError when a wanted row's target is no word. CPU only: elsewhere it would wait for the device."""
    if targets.device.type != "cpu" or rows.numel() == 0:
        return
    low, high = torch.aminmax(targets[rows])
    if int(low) < 0 or int(high) >= vocab:
        raise ValueError(
            f"targets: got ids from {int(low)} to {int(high)}, expected 0 to {vocab - 1}, the lm head's rows; mask "
            "these tokens out, set them to ignore_index, or keep placeholder ids out of sampling"
        )


def rows_per_chunk(num_rows: int, head: Head, chunk_size: int | None, dtype: torch.dtype) -> int:
    """Rows a chunk: `chunk_size` or a memory budget at most, and all chunks alike so that the last is no stub.

    Every chunk reads and writes the whole weight gradient, which only tall chunks pay back: the budget may grow to an
    eighth of the weight gradient's own size.
    """
    vocab, width = head.weight.shape
    limit = chunk_rows(num_rows, vocab, chunk_size, dtype)
    if chunk_size is None:
        limit = max(limit, min(width // 8, MAX_TALL_ROWS))
    chunks = max(1, -(-num_rows // limit))
    return max(1, -(-num_rows // chunks))


def visit(
    kernels: RowKernels,
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    rows: torch.Tensor,
    *,
    want_entropy: bool,
    entropy_learns: bool = False,
    chunk_size: int | None = None,
    coefficients: Coefficients | None = None,
    gradients: Gradients | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Visit the logits of `rows` once, chunk by chunk.

    Args:
        hidden: (N, H). targets: (N,) int64, valid at `rows`.
        rows: (n,) int64, the tokens to visit; the others cost nothing.
        want_entropy: compute the entropy.
        entropy_learns: `coefficients` may give a second coefficient; False saves a second buffer of logits.
        chunk_size: rows a chunk at most; None: from a memory budget.
        coefficients: called once a chunk; None: statistics only.
        gradients: where the chunks' gradients go; None: `coefficients` is called for what else it does.

    Returns:
        logps (n,), entropy (n,) or None, in the order of `rows`, float32 (float64 where an input is).
    """
    dtype = statistics_dtype(hidden, head.weight, head.bias)
    logps = hidden.new_empty(rows.shape, dtype=dtype)
    entropy = hidden.new_empty(rows.shape, dtype=dtype) if want_entropy else None
    count = rows.shape[0]
    learns = coefficients is not None and gradients is not None and gradients.wanted()
    keep_logits = learns and (entropy_learns or head.options.softcap > 0.0)
    step = rows_per_chunk(count, head, chunk_size, dtype)
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        taken = rows[chunk]
        hidden_rows, wanted = hidden[taken], targets[taken]
        raw = project(hidden_rows, head.weight, head.bias)
        state = kernels.statistics(raw, wanted, head.options, want_entropy, keep_logits)
        logps[chunk] = state.logps
        if entropy is not None:
            entropy[chunk] = state.entropy
        if coefficients is not None:
            d_logps, d_entropy = coefficients(state.logps, state.entropy, taken)
            if learns:
                grad_raw = kernels.gradient(state, wanted, head.options, d_logps, d_entropy)
                gradients.add(taken, hidden_rows, grad_raw, head.weight)
        raw = state = grad_raw = None  # the next chunk's logits take this one's memory
    return logps, entropy
