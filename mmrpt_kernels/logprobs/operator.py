"""`linear_logprobs` as a custom operator with its backward, over the row kernels of any backend.

The backward recomputes the logits of the rows that have an incoming gradient, and of no others: a trainer whose loss
filters tokens pays for the tokens it keeps.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.common.autocast import cast_to, dtypes_of, without_autocast
from mmrpt_kernels.common.head import HeadOptions, statistics_dtype
from mmrpt_kernels.common.shards import find_shard
from mmrpt_kernels.logprobs.gradients import Gradients, Head
from mmrpt_kernels.logprobs.places import choose, put
from mmrpt_kernels.logprobs.rows import has_slope, row_kernels
from mmrpt_kernels.logprobs.stream import check_targets, visit

__all__ = ["linear_logprobs", "linear_logprobs_backward"]


@torch.library.custom_op("mmrpt_kernels::linear_logprobs", mutates_args=())
@without_autocast
def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool,
    chunk_size: int | None,
    most: int,
    rows: str,
    skip_below: float,
    vocab_group: str | None = None,
    cast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logps (N,) and entropy (N,), or (0,) when it is not wanted; 0 at ignored rows.

    Args:
        hidden: (N, H). weight: (V, H). bias: (V,) or None. targets: (N,) int64.
        most: how many rows are wanted at most (`places.most_places`).
        rows: whose row kernels, a registered name.
        skip_below: for the backward (`columns.leave_out`).
        vocab_group: name of the process group over which the vocabulary is cut; weight and bias are this rank's part.
        cast: what autocast casts hidden, weight and bias to, for this pass alone; None: nothing.
    """
    hidden, weight, bias = cast_to(cast, hidden, weight, bias)
    options = HeadOptions(temperature, softcap, logit_scale)
    mask = targets != ignore_index
    alike = (chunk_size, most, return_entropy, options)
    shard = None if vocab_group is None else find_shard(vocab_group, hidden, weight, targets, mask, alike)
    head = Head(weight, bias, options, shard)
    places = choose(mask, most)
    check_targets(targets, places, head.vocab)
    dtype = statistics_dtype(hidden, weight, bias)
    logps = hidden.new_zeros(targets.shape, dtype=dtype)
    entropy = hidden.new_zeros(targets.shape if return_entropy else (0,), dtype=dtype)
    seen, uncertain = visit(
        row_kernels(rows), hidden, head, targets, places, want_entropy=return_entropy, chunk_size=chunk_size
    )
    return put(logps, places, seen), put(entropy, places, uncertain) if return_entropy else entropy


@linear_logprobs.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, logit_scale, ignore_index, return_entropy, *how):
    dtype = statistics_dtype(hidden, weight, bias)
    logps = hidden.new_empty(targets.shape, dtype=dtype)
    return logps, hidden.new_empty(targets.shape if return_entropy else (0,), dtype=dtype)


@torch.library.custom_op("mmrpt_kernels::linear_logprobs_backward", mutates_args=())
@without_autocast
def linear_logprobs_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    d_logps: torch.Tensor,
    d_entropy: torch.Tensor | None,
    scalars: list[float],
    ignore_index: int,
    need: list[bool],
    chunk_size: int | None,
    most: int,
    rows: str,
    skip_below: float,
    vocab_group: str | None = None,
    cast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d hidden (N, H), d weight (V, H), d bias (V,), in their tensors' dtypes; each empty where `need` is False.

    With a vocab_group, whose ranks all have the same d_logps and d_entropy: d hidden is the sum over its ranks.

    Without an autograd formula of its own: a second derivative raises instead of being silently zero.
    """
    dtypes = dtypes_of(hidden, weight, bias)
    hidden, weight, bias = cast_to(cast, hidden, weight, bias)
    active = has_slope((d_logps, d_entropy)) & (targets != ignore_index)
    alike = (chunk_size, most, skip_below, need, d_entropy is not None, scalars)
    shard = None if vocab_group is None else find_shard(vocab_group, hidden, weight, targets, active, alike)
    head = Head(weight, bias, HeadOptions(*scalars), shard)
    gradients = Gradients(hidden, head, need=tuple(need), skip_below=skip_below, dtypes=dtypes)

    def incoming(_logps, _entropy, taken):
        return d_logps[taken], None if d_entropy is None else d_entropy[taken]

    visit(
        row_kernels(rows),
        hidden,
        head,
        targets,
        choose(active, most),
        want_entropy=d_entropy is not None,
        entropy_learns=d_entropy is not None,
        chunk_size=chunk_size,
        coefficients=incoming,
        gradients=gradients,
    )
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in gradients.result())


@linear_logprobs_backward.register_fake
def _(hidden, weight, bias, targets, d_logps, d_entropy, scalars, ignore_index, need, *how):
    shaped = (hidden, weight, bias)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else hidden.new_empty(0)
        for tensor, wanted in zip(shaped, need, strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, temperature, softcap, logit_scale, ignore_index, return_entropy, *how = inputs
    ctx.save_for_backward(hidden, weight, bias, targets)
    ctx.scalars = [temperature, softcap, logit_scale]
    ctx.ignore_index, ctx.return_entropy = ignore_index, return_entropy
    ctx.how = how  # chunk_size, most, rows, skip_below, vocab_group, cast
    ctx.set_materialize_grads(False)  # an entropy that no loss reads must not cost its gradient


def _backward(ctx, d_logps, d_entropy):
    hidden, weight, bias, targets = ctx.saved_tensors
    none = (None,) * 12
    if not ctx.return_entropy:
        d_entropy = None
    if d_logps is None and d_entropy is None:
        return (None, None, None, *none)
    if d_logps is None:
        d_logps = torch.zeros_like(d_entropy)
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
    grads = torch.ops.mmrpt_kernels.linear_logprobs_backward(
        hidden, weight, bias, targets, d_logps, d_entropy, ctx.scalars, ctx.ignore_index, need, *ctx.how
    )
    return (*(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)), *none)


linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
