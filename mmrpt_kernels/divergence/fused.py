"""`linear_token_divergence` over the chunk loop, forward and backward; the backward projects again.

Learning in both views and the head takes eight products of 2 n H V FLOPs, where kept logits would take six: d weight is
a sum over rows, each times a gradient that only the backward knows, so it cannot be made before; and without it, d
hidden made in the forward would be lost on the rows that a loss leaves out. In exchange both views' rows are projected
together where they share a weight, one product of twice the height in the place of two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.common.autocast import cast_to, dtypes_of
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.divergence.pair_softmax import (
    PairHead,
    RowValues,
    Wanted,
    pair_kernels,
    row_values,
    slopes_of,
    statistics,
)
from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.lm_head.chunk_loop import Projection, chunk_loop
from mmrpt_kernels.lm_head.chunk_sizes import block_rows, chunk_rows
from mmrpt_kernels.lm_head.head_gradients import HeadGradients
from mmrpt_kernels.lm_head.options import Head, HeadOptions, LoopOptions, build_head, check_word_ids
from mmrpt_kernels.lm_head.row_selection import RowSelection, select_rows

# On a CPU the row kernels' passes go over a chunk some rows at a time: what a view's rows may take of a core's cache.
BLOCK_BYTES = 2**20


class Pair(NamedTuple):
    """One call's tensors and what is asked of them. Over a vocab_group heads and bias are this rank's words."""

    hidden_p: torch.Tensor  # (N, H)
    hidden_q: torch.Tensor  # (N, H_q)
    weight: torch.Tensor  # (V, H)
    weight_q: torch.Tensor | None  # (V, H_q); None: weight serves both views
    bias: torch.Tensor | None  # (V,)
    targets: torch.Tensor | None  # (N,) int64, negative: no target
    kinds: tuple[str, ...]
    options: HeadOptions
    loop: LoopOptions

    def cast(self) -> Pair:
        """As autocast would have it; what is one matrix in memory stays one."""
        tensors = cast_to(self.loop.cast, *self[:5])
        cast = self._replace(**dict(zip(self._fields, tensors, strict=False)))
        one = self.weight_q is not None and self.one_weight()
        return cast._replace(weight_q=cast.weight) if one else cast

    def one_weight(self) -> bool:
        """Whether one matrix projects both views; it may come twice, as weight_q = weight.detach()."""
        other = self.weight_q
        return other is None or (other.dtype == self.weight.dtype and other.is_set_to(self.weight))

    def head(self, work: torch.Tensor, same: tuple) -> Head:
        """That of the first view; over a vocab_group its ranks compare what they were asked for (work: (N,) bool)."""
        given = (self.hidden_q.shape, self.hidden_q.dtype, self.bias is None, self.targets is None, self.kinds)
        weight_q = None if self.weight_q is None else self.weight_q.dtype
        ids = torch.zeros_like(work, dtype=torch.int64) if self.targets is None else self.targets
        tensors = (self.hidden_p, self.weight, self.bias)
        return build_head(tensors, self.options, self.loop, ids, (work,), (*given, weight_q, *same))

    def weight_of(self, view: int) -> int:
        """Where the weight of view 0 (p) or 1 (q) stands in this record."""
        return 2 if view == 0 or self.weight_q is None else 3

    def dtype(self) -> torch.dtype:
        """Of statistics and accumulators."""
        return statistics_dtype(self.hidden_p, self.hidden_q, self.weight)


class PairSweep:
    """Reads both views' logits of the same rows: their values, and the logits' gradient from those of the values."""

    def __init__(self, pair: Pair, head: Head, values: RowValues | None, grads: RowValues | None) -> None:
        """values: (N, ..) to fill, or None; grads: (N, ..) incoming gradients, or None."""
        self.kernels, self.targets, self.kinds = pair_kernels(pair.loop.backend), pair.targets, pair.kinds
        bias = None if head.bias is None else head.bias.to(pair.dtype())
        self.head = PairHead(bias, head.options, head.vocab, head.shard)
        self.values, self.grads = values, grads
        self.wanted = Wanted(self.kinds)
        if grads is not None:
            entropy = grads.entropy_p is not None or grads.entropy_q is not None
            self.wanted = Wanted(self.kinds if grads.divergence is not None else (), entropy, learns=True)

    def read(self, part: RowSelection, logits: list[torch.Tensor], out: list[torch.Tensor | None]) -> None:
        for block in self.blocks(logits[0]):
            outs = [None if o is None else o[block] for o in out]
            self.read_block(part.rows[block], [raw[block] for raw in logits], outs)

    def read_block(self, rows: torch.Tensor, raw, outs) -> None:
        targets = None if self.targets is None else self.targets[rows]
        found, state = statistics(self.kernels, raw, targets, self.wanted, self.head)
        if self.values is not None:
            given = row_values(found, self.kinds, targets is not None)
            for whole, some in zip(self.values, given, strict=True):
                if some is not None:
                    whole[rows] = some.to(whole.dtype)
        if self.grads is not None:
            grads = RowValues(*(None if grad is None else grad[rows] for grad in self.grads))
            slopes, shard = slopes_of(grads, found, targets, self.wanted.kinds), self.head.shard
            own = targets if targets is None or shard is None else targets - shard.start
            self.kernels.gradients(state, own, found, slopes, self.head, outs)

    def blocks(self, raw: torch.Tensor) -> list[slice]:
        """Rows of a chunk that row kernels take at a time: on a CPU few; all where ranks wait for each other."""
        count, step = raw.shape[0], raw.shape[0]
        if self.head.shard is None and raw.device.type == "cpu":
            step = block_rows(BLOCK_BYTES // (raw.shape[1] * raw.element_size()), count) * torch.get_num_threads()
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def finish(self, tall: RowSelection) -> None:
        """The matrix is the gradient: no factor."""


def _loop(pair: Pair, head: Head, selection: RowSelection, sweep: PairSweep, projections: list[Projection]) -> None:
    weight, vocab = head.weight, None if head.shard is None else head.shard.largest
    dtypes = [p.matrix_dtype for p in projections if p.matrix_dtype is not None]
    matrix = max(dtypes, key=lambda dtype: dtype.itemsize) if dtypes else None
    size = chunk_rows(
        len(selection), weight, pair.dtype(), matrix, chunk_size=pair.loop.chunk_size, vocab=vocab, views=2
    )
    chunk_loop(projections, selection, sweep, size)


def forward(pair: Pair) -> RowValues:
    """divergence (N, K), logps_p, logps_q (N,) or (0,) without targets, entropy_p, entropy_q (N,)."""
    pair, count = pair.cast(), pair.hidden_p.shape[0]
    every = pair.hidden_p.new_ones(count, dtype=torch.bool)
    head = pair.head(every, ())
    check_word_ids(pair.targets, head.vocab)
    with_targets, dtype = count if pair.targets is not None else 0, pair.dtype()
    vectors = (pair.hidden_p.new_empty(n, dtype=dtype) for n in (with_targets, with_targets, count, count))
    values = RowValues(pair.hidden_p.new_empty(count, len(pair.kinds), dtype=dtype), *vectors)
    if pair.one_weight():
        projections = [Projection(pair[:2], head)]
    else:
        head_q = head._replace(weight=pair.weight_q)
        projections = [Projection((pair.hidden_p,), head), Projection((pair.hidden_q,), head_q)]
    every_row = RowSelection(torch.arange(count, device=every.device), None)
    _loop(pair, head, every_row, PairSweep(pair, head, values, None), projections)
    return values


def backward(pair: Pair, grads: RowValues, need: tuple[bool, ...]) -> list[torch.Tensor | None]:
    """Gradients of (hidden_p, hidden_q, weight, weight_q, bias), None where `need` is False.

    Where one weight serves both views its gradient is the sum over them. Over a vocab_group, those of the hidden states
    are sums over its ranks.
    """
    dtypes, pair = dtypes_of(*pair[:5]), pair.cast()
    active = active_rows(grads)
    head = pair.head(active, (need, [grad is None for grad in grads]))
    learns = [need[view] or need[pair.weight_of(view)] or need[4] for view in (0, 1)]
    # One product for both views, unless one matrix came twice to get a gradient for each of them.
    together = pair.one_weight() and (pair.weight_q is None or not all(learns))
    projections, learning = [], []
    for views in [(0, 1)] if together else [(0,), (1,)]:
        learning.append([view for view in views if learns[view]])
        projections.append(_projection(pair, head, views, learning[-1], need, dtypes))
    _loop(pair, head, select_rows(active, compact=True), PairSweep(pair, head, None, grads), projections)
    made: list[torch.Tensor | None] = [None] * 5
    for projection, views in zip(projections, learning, strict=True):
        if views:
            made[views[0] : views[-1] + 1], made[pair.weight_of(views[0])], bias = projection.gradients.result()
            made[4] = bias if made[4] is None else made[4] + bias
    return [*made[:4], None if made[4] is None else made[4].to(dtypes[4])]


def _projection(pair: Pair, head: Head, views: tuple[int, ...], learning: list[int], need, dtypes) -> Projection:
    """Of some views by the first one's weight; gradients go to those that are `learning`."""
    hiddens, head = tuple(pair[view] for view in views), head._replace(weight=pair[pair.weight_of(views[0])])
    if not learning:
        return Projection(hiddens, head)
    taught, at = tuple(pair[view] for view in learning), pair.weight_of(learning[0])
    needed = (tuple(need[view] for view in learning), need[at], need[4])
    made_in = (*(dtypes[view] for view in learning), dtypes[at], pair.dtype())
    gradients = HeadGradients(taught, head, need=needed, dtypes=made_in)
    matrix = pair.dtype() if pair.loop.backend == "portable" else gemm.products_dtype(taught[0], head.weight)
    first = learning[0] - views[0]
    return Projection(hiddens, head, gradients, matrix, range(first, first + len(learning)))


def active_rows(grads: RowValues) -> torch.Tensor:
    """(N,) bool: the rows with a gradient other than exactly zero; others cost nothing and spread no NaN."""
    given = [grad for grad in grads if grad is not None]
    return torch.stack([(grad != 0) if grad.dim() == 1 else (grad != 0).any(-1) for grad in given]).any(0)
