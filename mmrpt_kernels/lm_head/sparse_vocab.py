"""Products with a logit gradient that leave out the words too small to matter.

A trained model gives most words of its vocabulary next to no probability. Their columns of the logits' gradient G
(n, V) may leave both products, d hidden = G @ weight and d weight = G.T @ hidden: those with the least mass, sum |G|
over the rows, as many as together hold no more than a given share of all of it; what stays is compacted. The bound is
on their sum because that is what the error follows, at any vocabulary: a bound on each word's own share lets 152,000
flat words go that sum to half of everything, with an error of 11 % of the largest entry.

Just dropping them is wrong by far more than half precision: many small probabilities add up, and rare words' weights
share a direction. So they are replaced by a cheap likeness, a matrix of rank one that has the same row sums and whose
columns have the same proportions in all rows:

    G_iv  ~  r_i q_v        r_i = sum over the words left out of G_iv,    q_v = their share of those words' mass

It adds r (q @ weight) to d hidden and q (r @ hidden) to d weight, for two matrix-vector products. A row unlike the
others (a sentence in another language) may hold much more than its share of the words left out: such rows are computed
whole, so that every row's error is bounded, whatever the rest of its chunk is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.common import checks
from mmrpt_kernels.common.head import project_backward_hidden, project_backward_weight, statistics_dtype

__all__ = ["Columns", "leave_out", "skip_threshold"]

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


class Columns(NamedTuple):
    """A chunk's logit gradient (n, V) as some of its columns and a likeness of the others, and a few rows whole."""

    kept: torch.Tensor  # (k,) int64, ascending
    grad: torch.Tensor  # (n, k), in the gradient's dtype; 0 in the rows that are whole
    rest: torch.Tensor  # (n,) sum of the other columns, float32 (float64); 0 in the rows that are whole
    shares: torch.Tensor  # (V,) their shares of the others' mass, 0 at `kept`, the dtype of rest
    whole: torch.Tensor  # (m,) int64, rows of which no column is left out
    whole_grad: torch.Tensor  # (m, V), in the gradient's dtype

    def backward_hidden(self, weight: torch.Tensor) -> torch.Tensor:
        """d loss / d hidden (n, H) in the statistics dtype; weight (V, H)."""
        grads = project_backward_hidden(self.grad, weight[self.kept])
        common = project_backward_hidden(self.shares.to(self.grad.dtype)[None], weight)
        grads.addr_(self.rest, common[0])
        if self.whole.shape[0]:
            grads.index_copy_(0, self.whole, project_backward_hidden(self.whole_grad, weight))
        return grads

    def backward_weight(self, hidden_rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """Add d loss / d weight of what is not left out to the accumulator (V, H). The rest is shares (V, 1) times what
        this gives, (H,): the caller adds those of all chunks at once, as each would be a visit of the accumulator."""
        grads = into.new_empty(self.kept.shape[0], into.shape[1])
        project_backward_weight(self.grad, hidden_rows, grads, fresh=True)
        into.index_add_(0, self.kept, grads)
        if self.whole.shape[0]:
            project_backward_weight(self.whole_grad, hidden_rows[self.whole], into)
        return self.rest @ hidden_rows.to(self.rest.dtype)


def skip_threshold(skip_below: float | str | None, dtypes: tuple[torch.dtype, ...], compact: bool | int) -> float:
    """The share of a chunk's gradient mass that the words left out may hold together; 0 = none may.

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


def leave_out(grad_raw: torch.Tensor, share: float) -> Columns | None:
    """grad_raw (n, V) without the words that together hold at most `share` of its mass, the smallest first (up to 7 of
    them stay), or None where what stays is too much for it to pay.

    Waits for the device twice, as counts decide. NaN or infinity in any row keeps all: they must not reach other rows
    by way of the rest or of the sum.
    """
    dtype = statistics_dtype(grad_raw)
    mass = torch.linalg.vector_norm(grad_raw, 1, dim=0, dtype=dtype)
    total, vocab = mass.sum(), mass.shape[0]
    order = mass.argsort(stable=True)
    sums = (mass[order] / total * PARTS).to(torch.int64).cumsum(0)
    small = (sums <= int(share * PARTS)) & (total > 0) & total.isfinite()
    count = max(1, vocab - int(small.sum()))  # products want some
    count += -count % MULTIPLE
    if count > MOST_KEPT * vocab:
        return None
    kept = order[vocab - count :].sort().values
    grad = grad_raw.index_select(1, kept)
    held, still = (torch.linalg.vector_norm(g, 1, dim=1, dtype=dtype) for g in (grad_raw, grad))
    whole = (held - still > WHOLE * share * total / held.shape[0]).nonzero().squeeze(1)
    whole_grad = grad_raw[whole]
    rest = (grad_raw.sum(1, dtype=dtype) - grad.sum(1, dtype=dtype)).index_fill_(0, whole, 0.0)
    # What the whole rows hold is accounted for; what they look like must not colour the likeness of the others.
    likeness = (mass - torch.linalg.vector_norm(whole_grad, 1, dim=0, dtype=dtype)).clamp_min_(0.0)
    likeness.index_fill_(0, kept, 0.0)
    shares = likeness / likeness.sum().clamp_min(torch.finfo(dtype).tiny)
    return Columns(kept, grad.index_fill_(0, whole, 0.0), rest, shares, whole, whole_grad)
