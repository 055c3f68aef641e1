"""Where d hidden, d weight and d bias are accumulated, chunk by chunk.

A chunk is a matrix (n, V) and one factor a row: their product is d loss / d raw logits. So a row kernel can leave a
matrix before the loss is known, and a matrix can have a short range (float16) however small the loss.
"""

from __future__ import annotations

import math

import torch

from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head import gemm, sparse_vocab
from mmrpt_kernels.lm_head.chunk_sizes import device_type
from mmrpt_kernels.lm_head.options import Head, HeadOptions
from mmrpt_kernels.lm_head.row_softmax import Slopes

# The size of float16 matrices: a word's gradient is at most about this (1 times it for a log-probability), far from
# float16's end at 65504, and probabilities down to 4e-12 are above its other end.
HALF_UNIT = 2.0**14


class HeadGradients:
    """Accumulators of d hidden (N, H) of each of the head's hidden states, d weight (V, H) and d bias (V,).

    Weight and bias gather float32 (float64 for float64) whatever the inputs and are rounded once, by `result`.
    """

    def __init__(
        self,
        hiddens: tuple[torch.Tensor, ...],
        head: Head,
        *,
        need: tuple[tuple[bool, ...], bool, bool],
        dtypes: tuple[torch.dtype, ...],
        skip_below: float = 0.0,
    ) -> None:
        """need, dtypes: of each of `hiddens`, the weight and the bias: whether a gradient is wanted, and in which dtype
        it is given. (The tensors' own dtypes, but where autocast has cast them, or a loss scale is still to come.)

        skip_below: the words that together hold at most this share of a chunk's gradient are approximated
            (`sparse_vocab`).
        """
        self.head, self.skip_below = head, skip_below
        self.need_hiddens, self.need_weight, self.need_bias = need[0], need[1], need[2] and head.bias is not None
        self.dtype = statistics_dtype(*hiddens, head.weight, head.bias)
        *hidden_dtypes, self.weight_dtype, self.bias_dtype = dtypes
        self.hiddens = [
            hidden.new_zeros(hidden.shape, dtype=dtype) if needed else None
            for hidden, dtype, needed in zip(hiddens, hidden_dtypes, self.need_hiddens, strict=True)
        ]
        self.weight = self.bias = None  # made by the first chunk, which has nothing to add to
        self.skipped: list[tuple[torch.Tensor, torch.Tensor]] = []  # shares (V,) and d weight (H,) of words skipped
        self.rows: list[torch.Tensor] = []  # of d hidden that hold a shard's part of a sum over ranks

    def wanted(self) -> bool:
        return any(self.need_hiddens) or self.need_weight or self.need_bias

    def add(
        self,
        rows: torch.Tensor,
        hidden: torch.Tensor,
        matrix: torch.Tensor,
        factor: torch.Tensor | None,
        *,
        only_chunk: bool = False,
    ) -> None:
        """Add a chunk, d raw (n, V) = factor (n, 1) * matrix (n, V).

        Args:
            rows: (m,) where its rows stand in each of the hidden states, n = m * len(hiddens).
            hidden: (n, H) those rows, one of the hidden states after the other.
            factor: (n,) in the statistics dtype, or None for 1. Rows of factor 0 give nothing, whatever their hidden
                states are.
            only_chunk: no other chunk comes: on CUDA d weight is then made in its own dtype, without an accumulator
                whose writing, reading and rounding would take as long as a third of the product (at 3000 rows).
        """
        sparse = sparse_vocab.split(matrix, factor, self.skip_below) if self.skip_below > 0.0 else None
        if any(self.need_hiddens):
            grads = gemm.d_hidden(matrix, self.head.weight) if sparse is None else sparse.d_hidden(self.head.weight)
            if factor is not None and sparse is None:
                grads.mul_(factor[:, None])
            for total, part in zip(self.hiddens, grads.chunk(len(self.hiddens)), strict=True):
                if total is not None:
                    total.index_copy_(0, rows, part.to(total.dtype))
            self.rows.append(rows)
        if self.need_weight and sparse is None:
            self._add_weight(hidden, matrix, factor, only_chunk)
        elif self.need_weight:
            if self.weight is None:
                self.weight = matrix.new_zeros(self.head.weight.shape, dtype=self.dtype)
            self.skipped.append((sparse.shares, sparse.add_d_weight(hidden, self.weight)))
        if self.need_bias:
            summed = gemm.column_sums(matrix, factor, self.dtype)
            self.bias = summed if self.bias is None else self.bias.add_(summed)

    def _add_weight(self, hidden, matrix, factor: torch.Tensor | None, only_chunk: bool) -> None:
        rest = None
        if factor is not None:
            hidden, rest = gemm.scaled_rows(hidden, factor, matrix.dtype)
        on_gpu = device_type(matrix.device) == "cuda"
        if only_chunk and rest is None and on_gpu and matrix.dtype == hidden.dtype == self.weight_dtype:
            self.weight = matrix.t() @ hidden  # sums in float32, rounded once
            return
        fresh = self.weight is None
        if fresh:
            self.weight = matrix.new_empty(self.head.weight.shape, dtype=self.dtype)
        gemm.add_d_weight(matrix, hidden, self.weight, fresh=fresh, factor=rest)

    def result(self) -> tuple[list[torch.Tensor | None], torch.Tensor | None, torch.Tensor | None]:
        """d hidden of each of the hidden states, d weight, d bias in their dtypes, None where not wanted; once.

        d hidden is the sum over a shard's ranks, whose parts were rounded to its dtype and are added in float32.
        """
        if self.head.shard is not None and self.rows:
            rows = torch.cat(self.rows)
            for total in self.hiddens:
                if total is not None:
                    total.index_copy_(0, rows, self.head.shard.add_up(total[rows]))
        if self.skipped:
            shares, common = (torch.stack(parts) for parts in zip(*self.skipped, strict=True))
            self.weight.addmm_(shares.t(), common)
        weight = bias = None
        if self.need_weight:
            weight = _rounded(self.weight, self.head.weight, self.weight_dtype)
        if self.need_bias:
            bias = _rounded(self.bias, self.head.bias, self.bias_dtype)
        return self.hiddens, weight, bias


def _rounded(total: torch.Tensor | None, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum in `dtype`; zeros where no chunk came."""
    return like.new_zeros(like.shape, dtype=dtype) if total is None else total.to(dtype)


def unit_slopes(slopes: Slopes, vocab: int, options: HeadOptions) -> tuple[Slopes, torch.Tensor]:
    """slopes of rows as multiples of a factor (n,), such that the rows' gradients fit float16; 0 stays 0.

    A word's d z is at most |d_logps| + |d_entropy| (log V + 1/e), as p_j |log p_j| <= 1/e and entropy <= log V; its
    d raw at most logit_scale / temperature times that.
    """
    d_logps, d_entropy = slopes
    size = d_logps.abs()
    if d_entropy is not None:
        size = size + d_entropy.abs() * (math.log(vocab) + math.exp(-1.0))
    factor = size * (abs(options.slope) / HALF_UNIT)
    units = tuple(None if t is None else torch.where(t == 0, 0.0, t / factor) for t in slopes)
    return units, factor
