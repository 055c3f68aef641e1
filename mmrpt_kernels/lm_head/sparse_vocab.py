"""`skip_below`: products with a logit gradient that approximate the words with too little probability to matter.

A trained model gives most words of its vocabulary next to no probability. Their columns of the logits' gradient G
(n, V) may leave both products, d hidden = G @ weight and d weight = G.T @ hidden: those with the least mass, sum |G|
over the rows, as many as together hold no more than a given share of all of it. The bound is on their sum because that
is what the error follows, at any vocabulary: a bound on each word's own share lets the sum over 152,000 flat words grow
to half of everything, with an error of 11 % of the largest entry.

Dropping them is wrong by far more than half precision: many small probabilities add up, and rare words' weights share
a direction. So they are replaced by a matrix of rank one that has the same row sums and whose columns have the same
proportions in all rows:

    G_iv  ~  r_i q_v        r_i = sum over the words skipped of G_iv,    q_v = their share of those words' mass

It adds r (q @ weight) to d hidden and q (r @ hidden) to d weight, two matrix-vector products. A row unlike the others
(a sentence in another language) may hold much more than its share of the words skipped: such rows are computed whole,
so that every row's error is bounded, whatever the rest of its chunk is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.common import checks
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head import gemm

# Compaction costs a copy of the kept columns, of their weights and of their gradients: beyond this share of the words
# it takes longer than it saves (measured on a CPU, 256 rows, hidden size 512 and 1024: even at about a half).
MOST_KEPT = 0.45
# A row is computed whole when it lost more than this many times what a row of average mass may lose. At most one row in
# WHOLE is (all rows together lost no more than the share), so at worst an eighth of the products comes back.
WHOLE = 8.0
# Tensor cores want rows that start at multiples of 16 bytes: a few columns more than the share asks for.
MULTIPLE = 8
# Masses are added up as integer parts of the whole: a running sum of integers is the same on every run of a GPU.
PARTS = 2**40


class SparseColumns(NamedTuple):
    """A chunk's logit gradient as some of its columns, a rank-one approximation of the others, and a few rows whole."""

    kept: torch.Tensor  # (k,) int64, ascending
    grad: torch.Tensor  # (n, k) kept columns of the matrix, in its dtype; 0 in the rows that are whole
    factor: torch.Tensor  # (n,) what matrix rows are multiplied by
    rest: torch.Tensor  # (n,) sum of the other columns of the gradient; 0 in the rows that are whole
    shares: torch.Tensor  # (V,) their shares of the others' mass, 0 at `kept`
    whole: torch.Tensor  # (m,) int64, rows of which no column is skipped
    whole_grad: torch.Tensor  # (m, V) of the matrix

    def d_hidden(self, weight: torch.Tensor) -> torch.Tensor:
        """d loss / d hidden (n, H) in the statistics dtype; weight (V, H)."""
        grads = gemm.d_hidden(self.grad, weight[self.kept]).mul_(self.factor[:, None])
        common = gemm.d_hidden(self.shares.to(self.grad.dtype)[None], weight)
        grads.addr_(self.rest, common[0])
        if self.whole.shape[0]:
            whole = gemm.d_hidden(self.whole_grad, weight).mul_(self.factor[self.whole, None])
            grads.index_copy_(0, self.whole, whole)
        return grads

    def add_d_weight(self, hidden: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """Add d loss / d weight of what is not skipped to the accumulator (V, H). The rest is shares (V, 1) times what
        this gives, (H,): the caller adds those of all chunks at once, as each would be a pass over the accumulator."""
        rows, rest = gemm.scaled_rows(hidden, self.factor, self.grad.dtype)
        grads = into.new_empty(self.kept.shape[0], into.shape[1])
        gemm.add_d_weight(self.grad, rows, grads, fresh=True, factor=rest)
        into.index_add_(0, self.kept, grads)
        if self.whole.shape[0]:
            gemm.add_d_weight(self.whole_grad, rows[self.whole], into, factor=rest)
        return self.rest @ hidden.to(self.rest.dtype).masked_fill((self.factor == 0)[:, None], 0.0)


def skip_threshold(skip_below: float | str | None, dtypes: tuple[torch.dtype, ...], compact: bool) -> float:
    """The share of a chunk's gradient mass that the words skipped may hold together; 0 = none may.

    "auto" for half-precision `dtypes` of hidden and weight is half their eps, what rounding alone takes from a number:
    2^-8 for bfloat16.
    Raises ValueError for anything but None, "auto" and numbers in [0, 1), and where nothing may wait for the device.
    """
    if skip_below is None:
        return 0.0
    checks.check(
        compact is True,
        f"skip_below: counts words, which waits for the device; compact={compact} asks that nothing does: drop one",
    )
    if skip_below == "auto":
        kinds = [torch.finfo(dtype) for dtype in dtypes]
        return min(kind.eps for kind in kinds) / 2 if all(kind.bits == 16 for kind in kinds) else 0.0
    checks.check(
        isinstance(skip_below, (int, float)) and 0.0 <= skip_below < 1.0,
        f"skip_below: got {skip_below!r}, expected None (exact), 'auto', or a share of the gradient in [0, 1)",
    )
    return float(skip_below)


def split(matrix: torch.Tensor, factor: torch.Tensor | None, share: float) -> SparseColumns | None:
    """factor (n, 1) * matrix (n, V) without the words that together hold at most `share` of its mass, the smallest
    first (up to 7 of them stay), or None where what stays is too much for it to pay.

    Waits for the device twice, as counts decide. NaN or infinity in any row keeps all: they must not reach other rows
    by way of the rest or of the sum.
    """
    dtype = statistics_dtype(matrix)
    factor = matrix.new_ones(matrix.shape[0], dtype=dtype) if factor is None else factor
    sizes = factor.abs()
    mass = gemm.column_sums(matrix, sizes, dtype, absolute=True)
    total, vocab = mass.sum(), mass.shape[0]
    order = mass.argsort(stable=True)
    sums = (mass[order] / total * PARTS).to(torch.int64).cumsum(0)
    small = (sums <= int(share * PARTS)) & (total > 0) & total.isfinite()
    count = max(1, vocab - int(small.sum()))  # products want some
    count += -count % MULTIPLE
    if count > MOST_KEPT * vocab:
        return None
    kept = order[vocab - count :].sort().values
    grad = matrix.index_select(1, kept)
    all_mass, kept_mass = (torch.linalg.vector_norm(g, 1, dim=1, dtype=dtype) for g in (matrix, grad))
    lost = (all_mass - kept_mass) * sizes
    whole = (lost > WHOLE * share * total / lost.shape[0]).nonzero().squeeze(1)
    whole_grad = matrix[whole]
    rest = (matrix.sum(1, dtype=dtype) - grad.sum(1, dtype=dtype)) * factor
    rest = rest.index_fill_(0, whole, 0.0)
    # The rows computed whole must not shape the approximation of the others.
    whole_mass = gemm.column_sums(whole_grad, sizes[whole], dtype, absolute=True)
    others = (mass - whole_mass).clamp_min_(0.0)
    others.index_fill_(0, kept, 0.0)
    shares = others / others.sum().clamp_min(torch.finfo(dtype).tiny)
    return SparseColumns(kept, grad.index_fill_(0, whole, 0.0), factor, rest, shares, whole, whole_grad)
