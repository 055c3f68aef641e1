"""The loop of every operator of the lm head, and the two ways in which it reads a softmax.

Logits never exist for all rows at once: they are made for some rows, read by row kernels, and turned into the matrix of
their gradient. Logits are float32 and short-lived, the matrix is in the dtype of the products that follow and taller:
one d hidden and one d weight product per tall matrix.

Runs outside autograd: its callers are custom operators and autograd functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.lm_head.chunk_sizes import ChunkRows, chunk_rows, device_type
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

# (logps (n,), entropy (n,) or None, rows (n,) int64) -> losses (n,) or None, d loss / d logps (n,), d loss / d entropy
# (n,) or None
TokenLoss = Callable[..., tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]]


def chunk_loop(projections: Sequence[Projection], selection: RowSelection, sweep: Sweep, size: ChunkRows) -> None:
    """Visit the rows of `selection` once: logits -> `sweep` -> matrix -> d hidden, d weight, d bias."""
    if len(selection) == 0:
        return
    for projection in projections:
        projection.allocate(len(selection), size)
    for tall in selection.split(size.products):
        for projection in projections:
            projection.gather(tall)
        for part in tall.split(size.logits):
            logits = [view for projection in projections for view in projection.logits(part)]
            matrix = [view for projection in projections for view in projection.matrix_rows(part)]
            sweep.read(part, logits, matrix)
            logits = matrix = None  # the next chunk's logits take their memory
        factor = sweep.finish(tall)
        for projection in projections:
            projection.add_gradients(tall, factor, only_chunk=len(tall) == len(selection))


class Projection:
    """Hidden states, the head that projects them, and a chunk's memory; several of one head share its products."""

    def __init__(
        self,
        hiddens: tuple[torch.Tensor, ...],
        head: Head,
        gradients: HeadGradients | None = None,
        matrix_dtype: torch.dtype | None = None,
        learning: range | None = None,
    ) -> None:
        """hiddens: (N, H) each. matrix_dtype: of the logits' gradient; None: there is none. learning: of which views
        `gradients` are; None: of all."""
        self.hiddens, self.head, self.gradients, self.matrix_dtype = hiddens, head, gradients, matrix_dtype
        self.views = len(hiddens)
        self.learning = range(self.views) if learning is None else learning
        self.dtype = statistics_dtype(*hiddens, head.weight)  # of the logits
        self.matrix = self.scratch = None  # (views * rows, V) of a tall chunk's gradient and of one of logits
        self.padded_rows = 0  # that every product of logits has; 0: as many as there are
        self.tall: RowSelection | None = None  # the rows whose hidden states are
        self.hidden: torch.Tensor | None = None  # (views, n, H)

    def allocate(self, count: int, size: ChunkRows) -> None:
        """Memory for chunks of up to `count` rows.

        Logits take the memory of their matrix where both have one dtype and stand in the same rows. Elsewhere they have
        their own: one piece for all chunks on a CPU, where fresh memory is slow.
        """
        weight, rows = self.head.weight, min(size.products, count)
        self.padded_rows = size.logits if size.padded else 0
        together = self.views == 1 or size.logits >= rows
        self.in_place = self.matrix_dtype == self.dtype and together and not size.padded
        # On a GPU rows start at multiples of 32 bytes, as tensor cores want them.
        padding = -weight.shape[0] % 16 if weight.is_cuda else 0
        if self.matrix_dtype is not None:
            views = self.views if self.in_place else len(self.learning)
            shape = (views * rows, weight.shape[0] + padding)
            self.matrix = weight.new_empty(shape, dtype=self.matrix_dtype)[:, : weight.shape[0]]
        if device_type(weight.device) == "cpu" and not self.in_place:
            shape = (self.views * max(self.padded_rows, min(size.logits, count)), weight.shape[0])
            self.scratch = weight.new_empty(shape, dtype=self.dtype)

    def gather(self, tall: RowSelection) -> None:
        """Take the hidden states of these rows; padding rows are 0: 0 * NaN would reach d weight."""
        views = [hidden[tall.rows] for hidden in self.hiddens]
        self.tall, self.hidden = tall, torch.stack(views) if self.views > 1 else views[0][None]
        if tall.valid is not None:
            self.hidden.masked_fill_(~tall.valid[:, None], 0.0)

    def logits(self, part: RowSelection) -> list[torch.Tensor]:
        """(n, V) of each view."""
        hidden = self.hidden[:, self.rows(part)]
        if self.padded_rows:
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, self.padded_rows - len(part)))
        hidden = hidden.flatten(0, 1)
        memory = self.scratch
        if self.in_place:
            memory = self.matrix[self.rows(part)] if self.views == 1 else self.matrix
        out = None if memory is None else memory[: hidden.shape[0]]
        views = gemm.logits(hidden, self.head.weight, out=out).chunk(self.views)
        return [view[: len(part)] for view in views]

    def matrix_rows(self, part: RowSelection) -> list[torch.Tensor | None]:
        """Where the gradient of each view's logits goes, (n, V) each, None where it is not wanted."""
        if self.matrix is None:
            return [None] * self.views
        learning = zip(self.learning, self.tall_matrix().chunk(len(self.learning)), strict=True)
        places = {view: matrix[self.rows(part)] for view, matrix in learning}
        return [places.get(view) for view in range(self.views)]

    def add_gradients(self, tall: RowSelection, factor: torch.Tensor | None, *, only_chunk: bool) -> None:
        """Carry the logits' gradient, factor (n, 1) * matrix, into those of the hidden states and the head."""
        if self.gradients is not None:
            hidden = self.hidden[self.learning.start : self.learning.stop].flatten(0, 1)
            self.gradients.add(tall.rows, hidden, self.tall_matrix(), factor, only_chunk=only_chunk)

    def tall_matrix(self) -> torch.Tensor:
        """(views * n, V) of the tall chunk's rows, of those views that learn."""
        return self.matrix[: len(self.learning) * len(self.tall)]

    def rows(self, part: RowSelection) -> slice:
        """Where a part of the tall chunk stands in it."""
        start = part.start - self.tall.start
        return slice(start, start + len(part))


class Sweep(Protocol):
    """How an operator reads logits: some rows at a time, then what all rows of a tall chunk have in common."""

    def read(self, part: RowSelection, logits: list[torch.Tensor], out: list[torch.Tensor | None]) -> None:
        """logits: (n, V) of each view, to be overwritten at will; out: where the matrix of their gradient goes."""

    def finish(self, tall: RowSelection) -> torch.Tensor | None:
        """(n,) what each row's matrix is to be multiplied by, or None for 1."""


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
        return torch.where(slopes[0] == 0, 0.0, slopes[0] * -self.head.options.slope / self.total)


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
