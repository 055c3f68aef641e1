"""The stream over the vocabulary: rows of tokens in chunks, each chunk of logits visited once.

For every chunk: project to logits -> row partials, finished to log-prob and entropy -> two coefficients per token,
asked of the caller -> gradient of the logits -> two matrix products for d hidden and d weight. The loop knows no loss;
the row arithmetic comes as a pair of functions (`rows.RowKernels`), so that a faster pair can take their place.

Runs outside autograd: its callers are custom operators and autograd functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mmrpt_kernels.common.head import (
    HeadOptions,
    chunk_rows,
    even_rows,
    products_dtype,
    project,
    project_backward_hidden,
    project_backward_weight,
    statistics_dtype,
)
from mmrpt_kernels.logprobs import columns
from mmrpt_kernels.logprobs.rows import RowKernels, Slopes, finish
from mmrpt_kernels.logprobs.shards import Shard

__all__ = ["Coefficients", "Gradients", "Head", "check_targets", "visit"]

# On a CPU taller chunks gain nothing more.
MAX_TALL_ROWS = 1024
# On a GPU a chunk is sized by what the weight gradient costs: the product that adds n rows to it does 2 n H V FLOPs and
# reads and writes 8 H V bytes of float32 accumulator, n / 4 FLOPs a byte. An H100 needs about 300 (990 TFLOP/s dense in
# bfloat16, 3.35 TB/s), an H200 about 200: 4096 rows give 1024, so that the accumulator's traffic is at most a third of
# that one product's time even where nothing overlaps. A logit takes 6 bytes (float32, and its bfloat16 gradient).
GPU_ROWS = 4096
GPU_BYTES = 4 * 2**30

# (logps (n,), entropy (n,) or None, rows (n,) int64) -> d loss / d logps (n,), d loss / d entropy (n,) or None
Coefficients = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], Slopes]


class Head(NamedTuple):
    """The lm head: weight (V, H), bias (V,) or None, and what happens between raw logits and softmax.

    With a shard, weight and bias are one rank's part of it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    options: HeadOptions
    shard: Shard | None = None

    @property
    def vocab(self) -> int:
        """Words of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab


class Gradients:
    """Accumulators of d hidden (N, H), d weight (V, H) and d bias (V,); None where nobody asked.

    Weight and bias gather float32 (float64 for float64) whatever the inputs and are rounded once, by `result`.
    """

    def __init__(
        self, hidden: torch.Tensor, head: Head, *, need: tuple[bool, bool, bool], skip_below: float = 0.0
    ) -> None:
        """`need`: whether hidden, weight and bias want a gradient. hidden: (N, H).

        skip_below: words that together hold at most this share of a chunk's gradient leave it (`columns.leave_out`).
        """
        self.head, self.need = head, (need[0], need[1], need[2] and head.bias is not None)
        self.dtype = statistics_dtype(hidden, head.weight, head.bias)
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need[0] else None
        self.skip_below = skip_below
        self.left_out: list[tuple[torch.Tensor, torch.Tensor]] = []  # shares (V,) and d weight (H,) of words left out
        self.weight = self.bias = None  # made by the first chunk, which has nothing to add to
        self.rows: list[torch.Tensor] = []  # of d hidden that hold a shard's part of a sum over ranks

    def wanted(self) -> bool:
        return any(self.need)

    def add(
        self, rows: torch.Tensor, hidden_rows: torch.Tensor, grad_raw: torch.Tensor, *, alone: bool = False
    ) -> None:
        """Add a chunk: rows (n,) of the tokens, hidden_rows (n, H), grad_raw (n, V).

        alone: no other chunk has come or will: on CUDA d weight is then made in its own dtype, without an accumulator
        whose writing, reading and rounding would take as long as a third of the product (at 3000 rows).
        """
        half = products_dtype(hidden_rows, self.head.weight)
        if grad_raw.is_cuda and half != grad_raw.dtype:
            grad_raw = grad_raw.to(half)
        few = columns.leave_out(grad_raw, self.skip_below) if self.skip_below > 0.0 else None
        if few is not None:
            self._add_columns(rows, hidden_rows, few)
        else:
            self._add_all(rows, hidden_rows, grad_raw, alone)
        self.rows.append(rows)
        if self.need[2]:
            summed = grad_raw.sum(0, dtype=self.dtype)
            self.bias = summed if self.bias is None else self.bias.add_(summed)

    def _add_all(self, rows: torch.Tensor, hidden_rows: torch.Tensor, grad_raw: torch.Tensor, alone: bool) -> None:
        if self.need[0]:
            grads = project_backward_hidden(grad_raw, self.head.weight)
            self.hidden.index_copy_(0, rows, grads.to(self.hidden.dtype))
        if self.need[1] and alone and grad_raw.is_cuda and grad_raw.dtype == hidden_rows.dtype:
            self.weight = grad_raw.t() @ hidden_rows  # sums in float32, rounded once
        elif self.need[1]:
            fresh = self.weight is None
            if fresh:
                self.weight = grad_raw.new_empty(self.head.weight.shape, dtype=self.dtype)
            project_backward_weight(grad_raw, hidden_rows, self.weight, fresh=fresh)

    def _add_columns(self, rows: torch.Tensor, hidden_rows: torch.Tensor, few: columns.Columns) -> None:
        if self.need[0]:
            self.hidden.index_copy_(0, rows, few.backward_hidden(self.head.weight).to(self.hidden.dtype))
        if self.need[1]:
            if self.weight is None:
                self.weight = few.rest.new_zeros(self.head.weight.shape)
            self.left_out.append((few.shares, few.backward_weight(hidden_rows, self.weight)))

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """d hidden, d weight, d bias in the dtypes of their tensors; called once.

        d hidden is the sum over a shard's ranks, whose parts were rounded to its dtype and are added in float32.
        """
        if self.head.shard is not None and self.need[0] and self.rows:
            rows = torch.cat(self.rows)
            self.hidden.index_copy_(0, rows, self.head.shard.add_up(self.hidden[rows]))
        if self.left_out:
            shares, common = (torch.stack(parts) for parts in zip(*self.left_out, strict=True))
            self.weight.addmm_(shares.t(), common)

        def rounded(grad: torch.Tensor | None, like: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
            if not wanted:
                return None
            if grad is None:  # no chunk came
                return torch.zeros_like(like, memory_format=torch.contiguous_format)
            return grad.to(like.dtype)

        return (
            self.hidden,
            rounded(self.weight, self.head.weight, self.need[1]),
            rounded(self.bias, self.head.bias, self.need[2]),
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

    Every chunk reads and writes the whole weight gradient, which only tall chunks pay back: on a CPU the budget may
    grow to an eighth of the weight gradient's own size.
    """
    vocab, width = head.weight.shape
    if head.shard is not None:
        vocab = head.shard.largest  # the same chunks on every rank
    if chunk_size is not None:
        limit = chunk_size
    elif head.weight.is_cuda:
        limit = max(1, min(GPU_ROWS, GPU_BYTES // (6 * vocab)))
    else:
        limit = max(chunk_rows(num_rows, vocab, None, dtype), min(width // 8, MAX_TALL_ROWS))
    return even_rows(num_rows, limit)


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
        rows: (n,) int64, the tokens to visit; the others cost nothing. Or (N,) bool: all tokens are visited, which
            waits for no device; those outside have log-prob and entropy 0 and give no gradient, whatever they hold.
        want_entropy: compute the entropy.
        entropy_learns: `coefficients` may give a second coefficient; False saves a second buffer of logits.
        chunk_size: rows a chunk at most; None: from a memory budget.
        coefficients: called once a chunk; None: statistics only.
        gradients: where the chunks' gradients go; None: `coefficients` is called for what else it does.

    Returns:
        logps (n,), entropy (n,) or None, in the order of `rows`, float32 (float64 where an input is).
    """
    dtype = statistics_dtype(hidden, head.weight, head.bias)
    masked = rows.dtype == torch.bool
    places = torch.arange(rows.shape[0], device=rows.device) if masked else rows
    logps = hidden.new_empty(rows.shape, dtype=dtype)
    entropy = hidden.new_empty(rows.shape, dtype=dtype) if want_entropy else None
    count = rows.shape[0]
    learns = coefficients is not None and gradients is not None and gradients.wanted()
    keep_logits = learns and (entropy_learns or head.options.softcap > 0.0)
    step = rows_per_chunk(count, head, chunk_size, dtype)
    vocab, rounded = head.weight.shape[0], products_dtype(hidden, head.weight)
    into = None
    if learns and kernels.rounds and rounded != dtype:
        into = hidden.new_empty(min(step, count), vocab, dtype=rounded)
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        taken = places[chunk]
        hidden_rows, wanted = hidden[taken], targets[taken]
        if head.shard is not None:
            wanted = wanted - head.shard.start
        if masked:  # 0 * NaN would reach d weight
            hidden_rows.masked_fill_(~rows[chunk, None], 0.0)
        raw = project(hidden_rows, head.weight, head.bias)
        partials, state = kernels.statistics(raw, wanted, head.options, want_entropy, keep_logits)
        if head.shard is not None:
            partials = head.shard.merge(partials)
        seen, uncertain, softmax = finish(partials, head.vocab, want_entropy)
        if masked:
            seen, uncertain = (None if t is None else torch.where(rows[chunk], t, 0.0) for t in (seen, uncertain))
        logps[chunk] = seen
        if entropy is not None:
            entropy[chunk] = uncertain
        if coefficients is not None:
            slopes = coefficients(seen, uncertain, taken)
            if learns:
                if masked:
                    slopes = tuple(None if t is None else torch.where(rows[chunk], t, 0.0) for t in slopes)
                some = None if into is None else into[: taken.shape[0]]
                grad_raw = kernels.gradient(state, wanted, head.options, softmax, slopes, some)
                gradients.add(taken, hidden_rows, grad_raw, alone=step >= count)
        raw = state = grad_raw = None  # the next chunk's logits take this one's memory
    return logps, entropy
