"""The loop of every operator of the lm head, and the two ways in which it reads a softmax.

Logits never exist for all rows at once: they are made for some rows, read by row kernels, and turned into the matrix of
their gradient. Logits are float32 and short-lived, the matrix is in the dtype of the products that follow and taller:
one d hidden and one d weight product per tall matrix.

Runs outside autograd: its callers are custom operators and autograd functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.lm_head.chunk_sizes import ChunkRows, chunk_rows
from mmrpt_kernels.lm_head.head_gradients import HeadGradients, unit_slopes
from mmrpt_kernels.lm_head.options import Head, LoopOptions
from mmrpt_kernels.lm_head.row_selection import RowSelection
from mmrpt_kernels.lm_head.row_softmax import (
    Exponentials,
    Slopes,
    finish_exponentials,
    finish_partials,
    has_slope,
    row_kernels,
)
from mmrpt_kernels.lm_head.vocab_parallel import merge_partials

__all__ = [
    "OneSweep",
    "Projection",
    "TokenLoss",
    "TokenValues",
    "TwoSweeps",
    "chunk_loop",
    "matrix_dtype",
    "softmax_loop",
]

# (logps (n,), entropy (n,) or None, rows (n,) int64) -> losses (n,) or None, d loss / d logps (n,), d loss / d entropy
# (n,) or None
TokenLoss = Callable[..., tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]]


class Projection(NamedTuple):
    """Hidden states and the head that projects them; several of one head share its products, their rows stacked."""

    hiddens: tuple[torch.Tensor, ...]  # (N, H) each
    head: Head
    gradients: HeadGradients | None
    matrix_dtype: torch.dtype | None  # of the logits' gradient; None: no matrix

    def gather(self, selection: RowSelection) -> torch.Tensor:
        """(views, n, H); padding rows are 0: 0 * NaN would reach d weight."""
        views = [hidden[selection.rows] for hidden in self.hiddens]
        hidden = torch.stack(views) if len(views) > 1 else views[0][None]
        return hidden if selection.valid is None else hidden.masked_fill_(~selection.valid[:, None], 0.0)

    def new_matrix(self, rows: int) -> torch.Tensor | None:
        """(views * rows, V), uninitialised. On a GPU its rows start at multiples of 32 bytes, as tensor cores want."""
        if self.matrix_dtype is None:
            return None
        weight = self.head.weight
        vocab, padding = weight.shape[0], -weight.shape[0] % 16 if weight.is_cuda else 0
        return weight.new_empty(len(self.hiddens) * rows, vocab + padding, dtype=self.matrix_dtype)[:, :vocab]

    def shares_memory(self, size: ChunkRows) -> bool:
        """Whether logits are made in the memory of their matrix: of one dtype, and the rows of a chunk in one piece."""
        return self.matrix_dtype == self.logits_dtype() and (len(self.hiddens) == 1 or size.logits >= size.products)

    def new_logits(self, rows: int) -> torch.Tensor | None:
        """(views * rows, V) for every chunk's logits on a CPU, where fresh memory is slow; None on a GPU."""
        weight = self.head.weight
        if weight.device.type != "cpu":
            return None
        return weight.new_empty(len(self.hiddens) * rows, weight.shape[0], dtype=self.logits_dtype())

    def logits_dtype(self) -> torch.dtype:
        return statistics_dtype(*self.hiddens, self.head.weight)

    def logits(self, hidden: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        """(views * n, V) of hidden (views, n, H), in the first rows of `memory`; None: in fresh memory."""
        hidden = hidden.flatten(0, 1)
        return gemm.logits(hidden, self.head.weight, out=None if memory is None else memory[: hidden.shape[0]])


class Sweep(Protocol):
    """How an operator reads logits: some rows at a time, then what all rows of a tall chunk have in common."""

    def read(self, part: RowSelection, logits: list[torch.Tensor], out: list[torch.Tensor | None]) -> None:
        """logits: (n, V) of each view, to be overwritten at will; out: where the matrix of their gradient goes."""

    def finish(self, tall: RowSelection) -> torch.Tensor | None:
        """(n,) what each row's matrix is to be multiplied by, or None for 1."""


def chunk_loop(
    projections: Sequence[Projection],
    selection: RowSelection,
    sweep: Sweep,
    size: ChunkRows,
    *,
    matrices: list[torch.Tensor | None] | None = None,
) -> None:
    """Visit the rows of `selection` once: logits -> `sweep` -> matrix -> d hidden, d weight, d bias.

    matrices: (views * size.products, V) of each projection to use; None: made here.
    """
    if len(selection) == 0:
        return
    if matrices is None:
        matrices = [p.new_matrix(min(size.products, len(selection))) for p in projections]
    shares = [p.shares_memory(size) for p in projections]
    short = min(size.logits, len(selection))
    scratch = [None if shared else p.new_logits(short) for p, shared in zip(projections, shares, strict=True)]
    for tall in selection.split(size.products):
        hiddens = [p.gather(tall) for p in projections]
        used = [None if m is None else m[: h.shape[0] * h.shape[1]] for m, h in zip(matrices, hiddens, strict=True)]
        for start in range(0, len(tall), size.logits):
            part = tall.slice(start, start + size.logits)
            rows = slice(start, start + len(part))
            logits, out = [], []
            for p, hidden, matrix, memory, shared in zip(projections, hiddens, used, scratch, shares, strict=True):
                views = len(p.hiddens)
                # One view's rows stand together; those of several do where the chunk is the whole matrix.
                memory = (matrix[rows] if views == 1 else matrix) if shared else memory
                logits += p.logits(hidden[:, rows], memory).chunk(views)
                out += [None] * views if matrix is None else [m[rows] for m in matrix.chunk(views)]
            sweep.read(part, logits, out)
            logits = out = None  # the next chunk's logits take their memory
        factor = sweep.finish(tall)
        for p, hidden, matrix in zip(projections, hiddens, used, strict=True):
            if p.gradients is not None:
                only = len(tall) == len(selection)
                p.gradients.add(tall.rows, hidden.flatten(0, 1), matrix, factor, only_chunk=only)


class TokenValues:
    """What the loop learns of every row, (N,) each, and the loss that is made of it."""

    def __init__(self, targets: torch.Tensor, dtype: torch.dtype, want_entropy: bool, loss: TokenLoss | None) -> None:
        """targets: (N,) int64. loss: None where log-probs and entropies are all that is wanted."""
        self.targets, self.loss, self.want_entropy = targets, loss, want_entropy
        self.logps = torch.zeros_like(targets, dtype=dtype)
        self.entropy = torch.zeros_like(targets, dtype=dtype) if want_entropy else None
        self.losses = torch.zeros_like(targets, dtype=dtype)

    def put(self, rows: RowSelection, logps: torch.Tensor, entropy: torch.Tensor | None) -> Slopes | None:
        """Store what was found of some rows (n,); gives their loss's slopes, 0 at padding."""
        logps, entropy = rows.masked(logps), rows.masked(entropy)
        rows.scatter(logps, self.logps)
        if entropy is not None:
            rows.scatter(entropy, self.entropy)
        if self.loss is None:
            return None
        losses, *slopes = self.loss(logps, entropy, rows.rows)
        if losses is not None:
            rows.scatter(losses.to(self.losses.dtype), self.losses)
        return tuple(rows.masked(slope) for slope in slopes)


class SoftmaxSweep:
    """What both ways to read a softmax have in common: the rows of `selection` in one view of a head."""

    def __init__(self, head: Head, backend: str, values: TokenValues, selection: RowSelection) -> None:
        self.head, self.kernels, self.values = head, row_kernels(backend), values
        self.bias = None if head.bias is None else head.bias.to(values.logps.dtype)
        self.targets = selection.masked(values.targets[selection.rows])  # (n,), words of this rank's part
        if head.shard is not None:
            self.targets = self.targets - head.shard.start

    def arguments(self, part: RowSelection) -> tuple:
        """bias, targets (n,), options and want_entropy, as row kernels take them."""
        targets = self.targets[part.start : part.start + len(part)]
        return self.bias, targets, self.head.options, self.values.want_entropy


class OneSweep(SoftmaxSweep):
    """Losses of log-probabilities alone: the logits become exponentials, which are their gradient up to a factor."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.sums: list[Exponentials] = []  # of the parts of a tall chunk
        self.total = None  # (n,) of the last tall chunk, what its matrix is divided by

    def read(self, part: RowSelection, logits: list[torch.Tensor], out: list[torch.Tensor]) -> None:
        self.sums.append(self.kernels.exponentials(logits[0], *self.arguments(part), out[0]))

    def finish(self, tall: RowSelection) -> torch.Tensor | None:
        sums = Exponentials(*(torch.cat(columns) for columns in zip(*self.sums, strict=True)))
        self.sums.clear()
        logps, entropy, self.total = finish_exponentials(sums, self.head.vocab, self.values.want_entropy)
        slopes = self.values.put(tall, logps, entropy)
        if slopes is None:
            return None
        # What the total of a row with NaN is does not matter where it has no slope.
        return torch.where(slopes[0] == 0, 0.0, slopes[0] * -self.head.slope / self.total)


class TwoSweeps(SoftmaxSweep):
    """Any loss, a vocabulary cut over ranks, float16: sums first, then the gradient from the loss's slopes."""

    def __init__(self, *arguments, keep_logits: bool) -> None:
        super().__init__(*arguments)
        self.keep_logits = keep_logits
        self.factors: list[torch.Tensor] = []  # of the parts of a tall chunk

    def read(self, part: RowSelection, logits: list[torch.Tensor], out: list[torch.Tensor | None]) -> None:
        head, (bias, targets, options, want_entropy) = self.head, self.arguments(part)
        partials, state = self.kernels.statistics(logits[0], bias, targets, options, want_entropy, self.keep_logits)
        if head.shard is not None:
            partials = merge_partials(partials, head.shard)
        logps, entropy, softmax = finish_partials(partials, head.vocab, want_entropy)
        slopes = self.values.put(part, logps, entropy)
        if out[0] is None:
            return
        if out[0].dtype == torch.float16:
            slopes, factor = unit_slopes(slopes, head.vocab, options)
        else:
            factor = has_slope(slopes).to(logps.dtype)  # others give nothing, whatever their hidden states are
        self.kernels.gradient(state, bias, targets, options, softmax, slopes, out[0])
        self.factors.append(factor)

    def finish(self, tall: RowSelection) -> torch.Tensor | None:
        factor = torch.cat(self.factors) if self.factors else None
        self.factors.clear()
        return factor


def matrix_dtype(hidden: torch.Tensor, head: Head, backend: str) -> torch.dtype:
    """The dtype of the logits' gradient, which its products are made in: a half precision where the device multiplies
    those faster (the kernels of GPUs write it on a CPU too, where tests run them)."""
    half = gemm.products_dtype(hidden, head.weight, scaled=True)
    fast = backend != "portable" or gemm.multiplies_halves(hidden.device, half)
    return half if fast else statistics_dtype(hidden, head.weight, head.bias)


def softmax_loop(
    hidden: torch.Tensor,
    head: Head,
    values: TokenValues,
    selection: RowSelection,
    options: LoopOptions,
    *,
    gradients: HeadGradients | None = None,
    entropy_learns: bool = False,
) -> None:
    """The loop over one view's softmax: fills `values`, and `gradients` with those of the loss in `values`.

    hidden: (N, H). entropy_learns: the loss may give slopes of entropies.
    """
    learns = gradients is not None and gradients.wanted()
    dtype = matrix_dtype(hidden, head, options.backend) if learns else None
    if learns and not (entropy_learns or head.shard is not None or dtype == torch.float16):
        sweep = OneSweep(head, options.backend, values, selection)
    else:
        keep_logits = learns and (entropy_learns or head.options.softcap > 0.0)
        sweep = TwoSweeps(head, options.backend, values, selection, keep_logits=keep_logits)
    projection = Projection((hidden,), head, gradients if learns else None, dtype)
    size = chunk_rows(
        len(selection),
        head.weight,
        statistics_dtype(hidden, head.weight),
        dtype,
        chunk_size=options.chunk_size,
        vocab=None if head.shard is None else head.shard.largest,
    )
    chunk_loop([projection], selection, sweep, size)
