"""The stream over two views' logits: rows of tokens in chunks, forward and backward; the backward projects again.

The loop knows no divergence: the row arithmetic comes as functions (`rows.RowKernels`), so that faster ones can take
their place. Runs outside autograd: its callers are custom operators.

Learning in both views and the head takes eight products of 2 n H V FLOPs, where kept logits would take six: d weight is
a sum over rows, each times a gradient that only the backward knows, so it cannot be made before; and without it, d
hidden made in the forward would be lost on the rows that a loss leaves out. In exchange both views' rows are projected
together where they share a weight, one product of twice the height in the place of two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.common.head import (
    HeadOptions,
    chunk_rows,
    even_rows,
    gpu_chunk_rows,
    project,
    project_backward_hidden,
    project_backward_weight,
    statistics_dtype,
)
from mmrpt_kernels.common.shards import Shard
from mmrpt_kernels.divergence.rows import RowKernels, RowValues, Wanted, slopes, statistics, values

__all__ = ["Problem", "active_rows", "backward", "forward"]

VIEWS = 2  # a chunk of rows holds the logits of both views
# On a GPU a chunk is sized by what its products move. Scoring, n rows do 2 n H V FLOPs a view and read the 2 H V bytes
# of a bfloat16 head: n FLOPs a byte, where an H100 needs about 300 (990 TFLOP/s, 3.35 TB/s). Learning, d weight's
# product reads and writes 8 H V bytes of float32 accumulator: n / 4. The row kernels' second sweep does not decide:
# logits of 152k words leave the L2 cache (50 MB) at 40 rows. A word takes two logits, and two gradients of half their
# size or in their place.
GPU_SCORE_ROWS = 1024
GPU_LEARN_ROWS = 4096
# On a CPU the row kernels' passes go over a chunk some rows at a time: what a view's rows may take of a core's cache.
BLOCK_BYTES = 2**20


class Problem(NamedTuple):
    """One call's tensors and what is asked of them. With a shard the heads and the bias are this rank's words."""

    hidden_p: torch.Tensor  # (N, H)
    hidden_q: torch.Tensor  # (N, H_q)
    weight: torch.Tensor  # (V, H)
    weight_q: torch.Tensor | None  # (V, H_q); None: weight serves both views
    bias: torch.Tensor | None  # (V,)
    targets: torch.Tensor | None  # (N,) int64, negative: no target
    options: HeadOptions
    kinds: tuple[str, ...]
    chunk_size: int | None
    shard: Shard | None = None

    def head_q(self) -> torch.Tensor:
        """The second view's weight (V, H_q)."""
        return self.weight if self.weight_q is None else self.weight_q

    def vocab(self) -> int:
        """Words of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab

    def dtype(self) -> torch.dtype:
        """Of statistics and accumulators."""
        return statistics_dtype(self.hidden_p, self.hidden_q, self.weight)

    def chunk(self, num_rows: int, gpu_rows: int) -> int:
        """Rows to hold at once: `chunk_size`, or by a memory budget, the same on all ranks; all chunks alike."""
        vocab = self.weight.shape[0] if self.shard is None else self.shard.largest
        if self.chunk_size is not None:
            return max(1, min(self.chunk_size, num_rows))
        if self.weight.is_cuda:
            return even_rows(num_rows, gpu_chunk_rows(vocab, gpu_rows, 3 * self.dtype().itemsize))
        return even_rows(num_rows, chunk_rows(num_rows, vocab, None, self.dtype()))

    def blocks(self, num_rows: int) -> list[slice]:
        """The rows of a chunk that row kernels take at a time: on a CPU few; all where ranks wait for each other."""
        step = num_rows
        if self.shard is None and self.weight.device.type == "cpu":
            itemsize = 8 if self.dtype() == torch.float64 else 4
            step = max(1, BLOCK_BYTES // (self.weight.shape[0] * itemsize)) * torch.get_num_threads()
        return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


class _Projector:
    """Makes both views' logits of chunk after chunk, on a CPU in the same memory: fresh memory is slow there.

    Views of one head are projected as one matrix; the head may come twice, as where a caller holds the second view
    fixed (weight_q = weight.detach()).
    """

    def __init__(self, problem: Problem, most_rows: int) -> None:
        self.problem, self.memory = problem, None
        self.together = problem.hidden_p.dtype == problem.hidden_q.dtype and _same(problem.weight, problem.head_q())
        if problem.weight.device.type == "cpu":
            shape = (VIEWS * most_rows, problem.weight.shape[0])
            self.memory = problem.weight.new_empty(shape, dtype=problem.dtype())

    def __call__(self, rows: slice | torch.Tensor) -> _Chunk:
        problem = self.problem
        hidden_p, hidden_q = problem.hidden_p[rows], problem.hidden_q[rows]
        if self.together:
            hidden = torch.cat((hidden_p, hidden_q))
            raw = self._project(hidden, problem.weight, slice(0, hidden.shape[0]))
            return _Chunk(hidden.chunk(VIEWS), raw.chunk(VIEWS), hidden, raw)
        count = hidden_p.shape[0]
        raw_p = self._project(hidden_p, problem.weight, slice(0, count))
        raw_q = self._project(hidden_q, problem.head_q(), slice(count, 2 * count))
        return _Chunk((hidden_p, hidden_q), (raw_p, raw_q), None, None)

    def _project(self, hidden: torch.Tensor, weight: torch.Tensor, place: slice) -> torch.Tensor:
        problem, into = self.problem, None
        if self.memory is not None and statistics_dtype(hidden, weight, problem.bias) == self.memory.dtype:
            into = self.memory[place]
        return project(hidden, weight, problem.bias, out=into).to(problem.dtype())


class _Chunk(NamedTuple):
    """Hidden rows (n, H) and raw logits (n, V) of views p and q; and both as one (2 n, ..), where they are one."""

    hidden: tuple[torch.Tensor, torch.Tensor]
    raw: tuple[torch.Tensor, torch.Tensor]
    all_hidden: torch.Tensor | None
    all_raw: torch.Tensor | None


def _same(weight: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one matrix in memory."""
    alike = weight.dtype == other.dtype and weight.shape == other.shape and weight.stride() == other.stride()
    return alike and weight.data_ptr() == other.data_ptr()


def forward(kernels: RowKernels, problem: Problem) -> RowValues:
    """divergence (N, K), logps_p, logps_q (N,) or (0,) without targets, entropy_p, entropy_q (N,)."""
    hidden, targets, kinds = problem.hidden_p, problem.targets, problem.kinds
    num_rows, dtype = hidden.shape[0], problem.dtype()
    with_targets = num_rows if targets is not None else 0
    vectors = (hidden.new_empty(n, dtype=dtype) for n in (with_targets, with_targets, num_rows, num_rows))
    out = RowValues(hidden.new_empty(num_rows, len(kinds), dtype=dtype), *vectors)
    step = problem.chunk(num_rows, GPU_SCORE_ROWS)
    projector = _Projector(problem, step)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        raw_p, raw_q = projector(slice(start, stop)).raw
        for block in problem.blocks(stop - start):
            rows = slice(start + block.start, start + block.stop)
            some = None if targets is None else targets[rows]
            views = (raw_p[block], raw_q[block])
            found, _ = statistics(kernels, views, some, Wanted(kinds), problem.vocab(), problem.shard)
            for whole, part in zip(out, values(found, kinds, targets is not None), strict=True):
                if part is not None:
                    whole[rows] = part
        raw_p = raw_q = views = found = _ = None  # the next chunk's logits take this one's memory
    return out


class _HeadGradient:
    """d weight (V, H) under way, in the statistics dtype; no memory is touched before the first chunk has come."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype, self.total = weight, dtype, None

    def add(self, d_raw: torch.Tensor, hidden_rows: torch.Tensor) -> None:
        fresh = self.total is None
        if fresh:
            self.total = self.weight.new_empty(self.weight.shape, dtype=self.dtype)
        project_backward_weight(d_raw, hidden_rows, self.total, fresh=fresh)

    def result(self) -> torch.Tensor:
        return torch.zeros_like(self.weight, dtype=self.dtype) if self.total is None else self.total


class _Gradients(NamedTuple):
    """Gradients under way; None where not needed."""

    hidden_p: torch.Tensor | None
    hidden_q: torch.Tensor | None
    weight: _HeadGradient | None
    weight_q: _HeadGradient | None  # None also where one weight serves both views
    bias: torch.Tensor | None

    def head_q(self, problem: Problem) -> _HeadGradient | None:
        return self.weight if problem.weight_q is None else self.weight_q

    def wanted(self, problem: Problem) -> tuple[bool, bool]:
        """Whether the logits of view p, and those of q, need their gradient."""
        pairs = ((self.hidden_p, self.weight), (self.hidden_q, self.head_q(problem)))
        return tuple(hidden is not None or head is not None or self.bias is not None for hidden, head in pairs)

    def result(self) -> list[torch.Tensor | None]:
        return [one.result() if isinstance(one, _HeadGradient) else one for one in self]


def active_rows(grads: RowValues) -> torch.Tensor:
    """(N,) bool: the rows with a gradient other than exactly zero; others cost nothing and spread no NaN."""
    given = [grad for grad in grads if grad is not None]
    return torch.stack([(grad != 0) if grad.dim() == 1 else (grad != 0).any(-1) for grad in given]).any(0)


def backward(
    kernels: RowKernels,
    problem: Problem,
    grads: RowValues,
    active: torch.Tensor,
    needs: list[bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> list[torch.Tensor | None]:
    """Gradients of (hidden_p, hidden_q, weight, weight_q, bias), None where not needed: five booleans in that order.

    Where one weight serves both views its gradient is the sum over them. With a shard, those of the hidden states are
    sums over its ranks.

    Args:
        active: (n,) int64, the rows that have a gradient.
        dtypes: of d hidden_p and d hidden_q; the others come in the statistics dtype.
    """
    dtype = problem.dtype()
    views = zip(problem[:2], dtypes, needs, strict=False)
    hiddens = [h.new_zeros(h.shape, dtype=own) if need else None for h, own, need in views]
    heads = [_HeadGradient(w, dtype) if need else None for w, need in zip(problem[2:4], needs[2:4], strict=True)]
    bias = problem.bias.new_zeros(problem.bias.shape, dtype=dtype) if needs[4] else None
    out = _Gradients(*hiddens, *heads, bias)
    if active.numel() == 0:
        return out.result()
    step = problem.chunk(active.numel(), GPU_LEARN_ROWS)
    projector = _Projector(problem, step)
    for rows in active.split(step):
        _learn(kernels, problem, rows, projector(rows), grads, out)
    if problem.shard is not None:
        for hidden in hiddens:
            if hidden is not None:
                hidden[active] = problem.shard.add_up(hidden[active])
    return out.result()


def _learn(kernels: RowKernels, problem: Problem, rows: torch.Tensor, chunk: _Chunk, grads: RowValues, out) -> None:
    """Turn a chunk's logits into their gradient, and carry it into those of the hidden states and the head."""
    wanted, hiddens, heads = out.wanted(problem), (out.hidden_p, out.hidden_q), (out.weight, out.head_q(problem))

    def room(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return raw if dtype == raw.dtype else torch.empty_like(raw, dtype=dtype)

    if chunk.all_raw is not None and all(wanted) and problem.weight_q is None:
        d_all = room(chunk.all_raw, kernels.dtypes[0])
        _differentiate(kernels, problem, rows, chunk.raw, grads, d_all.chunk(VIEWS))
        _spread(d_all, chunk.all_hidden, problem.weight, rows, hiddens, (out.weight, out.bias))
        return
    pairs = zip(chunk.raw, kernels.dtypes, wanted, strict=True)
    outs = [room(raw, dtype) if want else None for raw, dtype, want in pairs]
    _differentiate(kernels, problem, rows, chunk.raw, grads, outs)
    for view, weight in enumerate((problem.weight, problem.head_q())):
        if outs[view] is not None:
            _spread(outs[view], chunk.hidden[view], weight, rows, hiddens[view : view + 1], (heads[view], out.bias))


def _spread(d_raw, hidden_rows, weight, rows, hiddens, head_and_bias) -> None:
    """Carry d loss / d raw of one product into the gradients of its hidden rows, its weight and the bias.

    Args:
        d_raw: (n, V) of one view, or (2 n, V) of both. hidden_rows, weight: what the product was of.
        hiddens: d hidden (N, H) of the views, None where not needed; head_and_bias likewise.
    """
    head, bias = head_and_bias
    if any(hidden is not None for hidden in hiddens):
        for hidden, part in zip(hiddens, project_backward_hidden(d_raw, weight).chunk(len(hiddens)), strict=True):
            if hidden is not None:
                hidden[rows] = part.to(hidden.dtype)
    if head is not None:
        head.add(d_raw, hidden_rows)
    if bias is not None:
        bias.add_(d_raw.sum(0, dtype=bias.dtype))


def _differentiate(kernels: RowKernels, problem: Problem, rows, raw, grads: RowValues, outs) -> None:
    """Write d loss / d raw (n, V) of both views to `outs`, those that are not None."""
    targets, shard = problem.targets, problem.shard
    entropy = grads.entropy_p is not None or grads.entropy_q is not None
    wanted = Wanted(problem.kinds if grads.divergence is not None else (), entropy, learns=True)
    for block in problem.blocks(rows.numel()):
        places = rows[block]
        some = RowValues(*(None if grad is None else grad[places] for grad in grads))
        named = None if targets is None else targets[places]
        found, state = statistics(kernels, tuple(r[block] for r in raw), named, wanted, problem.vocab(), shard)
        slope = slopes(some, found, named, wanted.kinds)
        own = named if named is None or shard is None else named - shard.start
        kernels.gradients(state, own, found, slope, tuple(None if o is None else o[block] for o in outs))
