"""Where a stream's gradients gather: chunks of the logits' gradient become d hidden, d weight and d bias.

A chunk is a matrix (n, V) and, where that is not all, one factor a row: their product is d loss / d raw logits. So a
row kernel can leave a matrix that knows no loss yet, and a matrix can have a short range (float16) however small the
loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mmrpt_kernels.common.autocast import dtypes_of
from mmrpt_kernels.common.head import (
    HeadOptions,
    multiplies_halves,
    products_dtype,
    project_backward_hidden,
    project_backward_weight,
    statistics_dtype,
)
from mmrpt_kernels.common.shards import Shard
from mmrpt_kernels.logprobs import columns
from mmrpt_kernels.logprobs.rows import Slopes

__all__ = ["Gradients", "Head", "unit_slopes"]

# What float16 matrices are made of: a word's gradient is at most about this (1 times it for a log-probability), far
# from float16's end at 65504, and probabilities down to 4e-12 are above its other end.
HALF_UNIT = 2.0**14
# Rows that the sum for d bias widens at a time: a sixteenth of a tall chunk.
BIAS_ROWS = 256


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
        self,
        hidden: torch.Tensor,
        head: Head,
        *,
        need: tuple[bool, bool, bool],
        skip_below: float = 0.0,
        before_loss_scale: bool = False,
        dtypes: tuple[torch.dtype | None, ...] | None = None,
    ) -> None:
        """`need`: whether hidden, weight and bias want a gradient. hidden: (N, H).

        skip_below: words that together hold at most this share of a chunk's gradient leave it (`columns.leave_out`).
        before_loss_scale: what comes out is multiplied by a scale afterwards, without which float16 would lose it:
            float16's gradients come out as float32.
        dtypes: of what comes out, for hidden, weight and bias; None: theirs. They differ where autocast has cast these.
        """
        self.head, self.need = head, (need[0], need[1], need[2] and head.bias is not None)
        self.dtype = statistics_dtype(hidden, head.weight, head.bias)
        given = dtypes or dtypes_of(hidden, head.weight, head.bias)
        self.dtypes = tuple(torch.float32 if before_loss_scale and d == torch.float16 else d for d in given)
        self.hidden = hidden.new_zeros(hidden.shape, dtype=self.dtypes[0]) if need[0] else None
        self.skip_below = skip_below
        self.left_out: list[tuple[torch.Tensor, torch.Tensor]] = []  # shares (V,) and d weight (H,) of words left out
        self.weight = self.bias = None  # made by the first chunk, which has nothing to add to
        self.rows: list[torch.Tensor] = []  # of d hidden that hold a shard's part of a sum over ranks

    def wanted(self) -> bool:
        return any(self.need)

    def takes_scale(self) -> bool:
        """Whether `add` takes factors: which words may be left out is told from d raw itself."""
        return self.skip_below == 0.0

    def add(
        self,
        rows: torch.Tensor,
        hidden_rows: torch.Tensor,
        matrix: torch.Tensor,
        scale: torch.Tensor | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """Add a chunk: rows (n,) of the tokens, hidden_rows (n, H), and d raw (n, V) = scale (n, 1) * matrix (n, V).

        scale: (n,) in the statistics dtype; None: matrix is d raw itself, as words are left out by (`skip_below`). Rows
            of factor 0 give nothing, whatever their hidden states are.
        alone: no other chunk has come or will: on CUDA d weight is then made in its own dtype, without an accumulator
            whose writing, reading and rounding would take as long as a third of the product (at 3000 rows).
        """
        half = products_dtype(hidden_rows, self.head.weight, scaled=scale is not None)
        if half != matrix.dtype and multiplies_halves(matrix.device, half):
            matrix = matrix.to(half)
        few = columns.leave_out(matrix, self.skip_below) if self.skip_below > 0.0 else None
        if few is not None:
            self._add_columns(rows, hidden_rows, few)
        else:
            self._add_all(rows, hidden_rows, matrix, scale, alone)
        self.rows.append(rows)
        if self.need[2]:
            summed = column_sums(matrix, scale, self.dtype)
            self.bias = summed if self.bias is None else self.bias.add_(summed)

    def _add_all(self, rows, hidden_rows, matrix, scale: torch.Tensor | None, alone: bool) -> None:
        if self.need[0]:
            grads = project_backward_hidden(matrix, self.head.weight)
            if scale is not None:
                grads.mul_(scale[:, None])
            self.hidden.index_copy_(0, rows, grads.to(self.hidden.dtype))
        if not self.need[1]:
            return
        factor = None
        if scale is not None:
            hidden_rows, factor = scaled_rows(hidden_rows, scale, matrix.dtype)
        direct = alone and factor is None and matrix.is_cuda
        if direct and matrix.dtype == hidden_rows.dtype == self.dtypes[1]:
            self.weight = matrix.t() @ hidden_rows  # sums in float32, rounded once
            return
        fresh = self.weight is None
        if fresh:
            self.weight = matrix.new_empty(self.head.weight.shape, dtype=self.dtype)
        project_backward_weight(matrix, hidden_rows, self.weight, fresh=fresh, factor=factor)

    def _add_columns(self, rows: torch.Tensor, hidden_rows: torch.Tensor, few: columns.Columns) -> None:
        if self.need[0]:
            self.hidden.index_copy_(0, rows, few.backward_hidden(self.head.weight).to(self.hidden.dtype))
        if self.need[1]:
            if self.weight is None:
                self.weight = few.rest.new_zeros(self.head.weight.shape)
            self.left_out.append((few.shares, few.backward_weight(hidden_rows, self.weight)))

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """d hidden, d weight, d bias in the dtypes of their tensors (float32 for float16 before a loss scale); once.

        d hidden is the sum over a shard's ranks, whose parts were rounded to its dtype and are added in float32.
        """
        if self.head.shard is not None and self.need[0] and self.rows:
            rows = torch.cat(self.rows)
            self.hidden.index_copy_(0, rows, self.head.shard.add_up(self.hidden[rows]))
        if self.left_out:
            shares, common = (torch.stack(parts) for parts in zip(*self.left_out, strict=True))
            self.weight.addmm_(shares.t(), common)

        def rounded(place: int, grad: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
            if not self.need[place]:
                return None
            if grad is None:  # no chunk came
                return like.new_zeros(like.shape, dtype=self.dtypes[place])
            return grad.to(self.dtypes[place])

        return self.hidden, rounded(1, self.weight, self.head.weight), rounded(2, self.bias, self.head.bias)


def unit_slopes(slopes: Slopes, vocab: int, options: HeadOptions) -> tuple[Slopes, torch.Tensor]:
    """slopes of rows as multiples of a factor (n,), such that the rows' gradients fit float16; 0 stays 0.

    A word's d z is at most |d_logps| + |d_entropy| (log V + 1/e), as p_j |log p_j| <= 1/e and entropy <= log V; its
    d raw at most logit_scale / temperature times that.
    """
    d_logps, d_entropy = slopes
    size = d_logps.abs()
    if d_entropy is not None:
        size = size + d_entropy.abs() * (math.log(vocab) + math.exp(-1.0))
    factor = size * (abs(options.logit_scale) / options.temperature / HALF_UNIT)
    units = tuple(None if t is None else torch.where(t == 0, 0.0, t / factor) for t in slopes)
    return units, factor


def scaled_rows(
    hidden_rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """hidden_rows (n, H) times scale (n,), in `dtype`, and a 0-d factor that they lack (float16 only: its range), or
    None. Rows of scale 0 are 0, whatever their hidden states are."""
    factor = None
    if dtype == torch.float16:
        factor = scale.abs().amax()
        scale = torch.where(scale == 0, 0.0, scale / factor)
    scaled = (hidden_rows.to(scale.dtype) * scale[:, None]).masked_fill_((scale == 0)[:, None], 0.0)
    return scaled.to(dtype), factor


def column_sums(matrix: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(V,) sum of scale (n, 1) * matrix (n, V) over its rows, in `dtype`."""
    if scale is None:
        return matrix.sum(0, dtype=dtype)
    if matrix.dtype == dtype:
        return scale @ matrix
    total = matrix.new_zeros(matrix.shape[1], dtype=dtype)
    for start in range(0, matrix.shape[0], BIAS_ROWS):
        rows = slice(start, start + BIAS_ROWS)
        total.addmv_(matrix[rows].to(dtype).t(), scale[rows])
    return total
