"""`linear_logprobs` over the chunk loop, and its backward.

The backward makes the gradient of the rows that have an incoming gradient, and of no others: a trainer whose loss
filters tokens pays for the tokens it keeps. It recomputes their logits (four products in all), or works from the
exponentials that the forward has kept where these fit a budget (three) and no entropy has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from mmrpt_kernels.common.autocast import cast_to, dtypes_of, without_autocast
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.chunk_loop import OneSweep, Projection, TokenValues, chunk_loop, matrix_dtype, softmax_loop
from mmrpt_kernels.lm_head.chunk_sizes import chunk_rows
from mmrpt_kernels.lm_head.head_gradients import HeadGradients
from mmrpt_kernels.lm_head.options import Head, HeadOptions, LoopOptions, build_head, check_targets
from mmrpt_kernels.lm_head.row_selection import RowSelection, select_rows
from mmrpt_kernels.lm_head.row_softmax import has_slope

# Exponentials that a forward pass may keep for its backward. On a GPU 1 GiB is 3,500 bfloat16 rows of 152k words; on a
# CPU 256 MiB are 2,000 float32 rows of 32k.
KEPT_BYTES = {"cuda": 2**30, "cpu": 2**28}


class GivenSlopes(NamedTuple):
    """A `TokenLoss` whose slopes are known before the loop: those that autograd brings."""

    d_logps: torch.Tensor  # (N,)
    d_entropy: torch.Tensor | None  # (N,)

    def __call__(self, logps, entropy, rows: torch.Tensor):
        return None, self.d_logps[rows], None if self.d_entropy is None else self.d_entropy[rows]


class Kept(NamedTuple):
    """A forward pass's exponentials: of which rows, their matrix (n, V), and what it is divided by (n,)."""

    rows: torch.Tensor
    matrix: torch.Tensor
    total: torch.Tensor


@without_autocast
def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    return_entropy: bool,
    options: HeadOptions,
    loop: LoopOptions,
    *,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, Kept | None]:
    """logps (N,), entropy (N,) or None, 0 at ignored rows, and with `keep` the exponentials where they fit the budget.

    hidden: (N, H). weight: (V, H). bias: (V,) or None. targets: (N,) int64.
    """
    hidden, weight, bias = cast_to(loop.cast, hidden, weight, bias)
    mask = targets != ignore_index
    head = build_head((hidden, weight, bias), options, loop, targets, (mask,), (return_entropy,))
    selection = select_rows(mask, loop.compact)
    check_targets(targets, selection, head.vocab)
    values = TokenValues(targets, statistics_dtype(hidden, weight, bias), return_entropy, None)
    kept = None
    if keep and head.shard is None and loop.skip_below == 0.0:
        kept = _keep_exponentials(hidden, head, values, selection, loop)
    if kept is None:
        softmax_loop(hidden, head, values, selection, loop)
    return values.logps, values.entropy, kept


def _keep_exponentials(
    hidden: torch.Tensor, head: Head, values: TokenValues, selection: RowSelection, loop: LoopOptions
) -> Kept | None:
    """Fill `values` and keep the exponentials, or do nothing where they do not fit the budget."""
    dtype, count = matrix_dtype(hidden, head, loop.backend), len(selection)
    fits = count * head.vocab * dtype.itemsize <= KEPT_BYTES.get(hidden.device.type, 0)
    if not fits or dtype == torch.float16 or count == 0 or selection.valid is not None:
        return None
    projection, sweep = Projection((hidden,), head, None, dtype), OneSweep(head, loop.backend, values, selection)
    logits_dtype = statistics_dtype(hidden, head.weight)
    size = chunk_rows(count, head.weight, logits_dtype, dtype, chunk_size=loop.chunk_size)
    chunk_loop([projection], selection, sweep, size._replace(products=count))
    return Kept(selection.rows, projection.matrix, sweep.total)


@without_autocast
def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    d_logps: torch.Tensor,
    d_entropy: torch.Tensor | None,
    ignore_index: int,
    need: tuple[bool, bool, bool],
    options: HeadOptions,
    loop: LoopOptions,
    *,
    kept: Kept | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """d hidden (N, H), d weight (V, H), d bias (V,), in their tensors' dtypes; None where `need` is False.

    With a vocab_group, whose ranks all have the same d_logps and d_entropy: d hidden is the sum over its ranks.
    """
    dtypes = dtypes_of(hidden, weight, bias)
    hidden, weight, bias = cast_to(loop.cast, hidden, weight, bias)
    active = has_slope((d_logps, d_entropy)) & (targets != ignore_index)
    same = (need, d_entropy is not None)
    head = build_head((hidden, weight, bias), options, loop, targets, (active,), same)
    gradients = HeadGradients((hidden,), head, need=((need[0],), *need[1:]), dtypes=dtypes, skip_below=loop.skip_below)
    if kept is not None and d_entropy is None:
        _add_kept(kept, hidden, head, d_logps, gradients)
    else:
        slopes = GivenSlopes(d_logps, d_entropy)
        values = TokenValues(targets, statistics_dtype(hidden, weight, bias), d_entropy is not None, slopes)
        selection = select_rows(active, loop.compact)
        learns = d_entropy is not None
        softmax_loop(hidden, head, values, selection, loop, gradients=gradients, entropy_learns=learns)
    (d_hidden,), d_weight, d_bias = gradients.result()
    return d_hidden, d_weight, d_bias


def _add_kept(kept: Kept, hidden: torch.Tensor, head: Head, d_logps: torch.Tensor, gradients: HeadGradients) -> None:
    """Two products from the exponentials of those rows that have a slope."""
    rows, matrix = kept.rows, kept.matrix
    slopes = d_logps[rows]
    factor = torch.where(slopes == 0, 0.0, slopes * (-head.options.slope / kept.total))
    active = (slopes != 0).nonzero().squeeze(-1)
    if active.shape[0] == 0:
        return
    if active.shape[0] < rows.shape[0]:
        rows, matrix, factor = rows[active], matrix[active], factor[active]
    gradients.add(rows, hidden[rows], matrix, factor, only_chunk=True)


class LogProbsFunction(torch.autograd.Function):
    """The eager route; compilers take `operator.linear_logprobs`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, ignore_index, return_entropy, need, options, loop):
        arguments = (hidden, weight, bias, targets, ignore_index, return_entropy, options, loop)
        logps, entropy, kept = forward(*arguments, keep=any(need))
        ctx.save_for_backward(hidden, weight, bias, targets, *(() if kept is None else kept))
        ctx.settings = (ignore_index, need, options, loop)
        ctx.set_materialize_grads(False)  # an entropy that no loss reads must not cost its gradient
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logps, d_entropy=None):
        none = (None,) * 9
        if d_logps is None and d_entropy is None:
            return none
        hidden, weight, bias, targets, *kept = ctx.saved_tensors  # read once: a checkpoint unpacks no tensor twice
        d_logps = torch.zeros_like(d_entropy) if d_logps is None else d_logps
        kept = Kept(*kept) if kept else None
        grads = backward(hidden, weight, bias, targets, d_logps, d_entropy, *ctx.settings, kept=kept)
        return *grads, *none[3:]
