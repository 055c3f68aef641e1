"""Products with a logit gradient that leave out the words too small to matter.

A trained model gives most words of its vocabulary next to no probability. Their columns of the logits' gradient G
(n, V) may leave both products, d hidden = G @ weight and d weight = G.T @ hidden: columns are chosen by their share of
the chunk's mass, sum |G|, and what stays is compacted. Just dropping the rest is wrong by far more than half precision:
many small probabilities add up, and rare words' weights share a direction (measured on the logits of a small trained
model: 15 % of the largest entry of d hidden, where bfloat16's own error is 0.7 %). So the rest is replaced by a cheap
likeness, a matrix of rank one that has the same row sums and whose columns have the same proportions in all rows:

    G_iv  ~  r_i q_v        r_i = sum over the words left out of G_iv,    q_v = their share of those words' mass

It adds r (q @ weight) to d hidden and q (r @ hidden) to d weight, for two matrix-vector products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.common import checks
from mmrpt_kernels.common.head import project_backward_hidden, project_backward_weight, statistics_dtype

__all__ = ["Columns", "leave_out", "skip_threshold"]

# "auto" for half-precision inputs. On the logits of a small trained model (entropy 3 nats, 8,192 words, 256 and 1,024
# rows) d hidden then errs by 0.7 % of its largest entry, as eager does in bfloat16, with 40 % of the words kept; twice
# the threshold keeps a quarter and errs by 1.7 %.
AUTO = 2.0**-17
# Compaction costs a copy of the kept columns, of their weights and of their gradients: beyond this share of the words
# it takes longer than it saves (measured on a CPU, 256 rows, hidden size 512 and 1024: even at about a half).
MOST_KEPT = 0.45
# Tensor cores want rows that start at multiples of 16 bytes: a few columns more than the threshold asks for.
MULTIPLE = 8


class Columns(NamedTuple):
    """A chunk's logit gradient (n, V) as some of its columns and a likeness of the others."""

    kept: torch.Tensor  # (k,) int64, ascending
    grad: torch.Tensor  # (n, k), in the gradient's dtype
    rest: torch.Tensor  # (n,) sum of the other columns, float32 (float64)
    shares: torch.Tensor  # (V,) their shares of the others' mass, 0 at `kept`, the dtype of rest

    def backward_hidden(self, weight: torch.Tensor) -> torch.Tensor:
        """d loss / d hidden (n, H) in the statistics dtype; weight (V, H)."""
        grads = project_backward_hidden(self.grad, weight[self.kept])
        common = project_backward_hidden(self.shares.to(self.grad.dtype)[None], weight)
        return grads.addr_(self.rest, common[0])

    def backward_weight(self, hidden_rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """Add the kept words' d loss / d weight to the accumulator (V, H). The others' is shares (V, 1) times what this
        gives, (H,): the caller adds those of all chunks at once, as each would be a visit of the whole accumulator."""
        grads = into.new_empty(self.kept.shape[0], into.shape[1])
        project_backward_weight(self.grad, hidden_rows, grads, fresh=True)
        into.index_add_(0, self.kept, grads)
        return self.rest @ hidden_rows.to(self.rest.dtype)


def skip_threshold(skip_below: float | str | None, hidden: torch.Tensor, weight: torch.Tensor, compact: bool) -> float:
    """The share of a chunk's gradient mass below which a word's column may leave the products; 0 = none may.

    Raises ValueError for anything but None, "auto" and numbers in [0, 1), and where nothing may wait for the device.
    """
    if skip_below is None:
        return 0.0
    checks.check(
        compact, "skip_below: counts words, which waits for the device; compact=False asks that nothing does: drop one"
    )
    if skip_below == "auto":
        half = all(torch.finfo(t.dtype).bits == 16 for t in (hidden, weight))
        return AUTO if half else 0.0
    checks.check(
        isinstance(skip_below, (int, float)) and 0.0 <= skip_below < 1.0,
        f"skip_below: got {skip_below!r}, expected None (exact), 'auto', or a share of the gradient in [0, 1)",
    )
    return float(skip_below)


def leave_out(grad_raw: torch.Tensor, skip_below: float) -> Columns | None:
    """The columns of grad_raw (n, V) that hold at least `skip_below` of its mass each (up to 7 more; never none), or
    None where they are too many for it to pay.

    Waits for the device, as the count decides. NaN or infinity in any row keeps all: they must not reach other rows by
    way of the rest or of the threshold.
    """
    dtype = statistics_dtype(grad_raw)
    mass = torch.linalg.vector_norm(grad_raw, 1, dim=0, dtype=dtype)
    total = mass.sum()
    threshold = skip_below * total + 0.0 * total  # NaN where the total is infinite: then no word is below it
    count = max(1, int((mass < threshold).logical_not().sum()))  # products want some
    count += -count % MULTIPLE
    if count > MOST_KEPT * mass.shape[0]:
        return None
    kept = mass.argsort(descending=True, stable=True)[:count].sort().values
    grad = grad_raw.index_select(1, kept)
    rest = grad_raw.sum(1, dtype=dtype) - grad.sum(1, dtype=dtype)
    shares = mass.index_fill_(0, kept, 0.0)
    return Columns(kept, grad, rest, shares / shares.sum().clamp_min(torch.finfo(dtype).tiny))
