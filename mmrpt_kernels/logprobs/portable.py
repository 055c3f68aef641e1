"""`linear_logprobs` in chunked PyTorch for any device: the row arithmetic, and the operator with its backward.

The backward recomputes the logits of the rows that have an incoming gradient, and of no others: a trainer whose loss
filters tokens pays for the tokens it keeps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mmrpt_kernels.common.autocast import without_autocast
from mmrpt_kernels.common.head import HeadOptions, statistics_dtype, transform_backward, transform_logits
from mmrpt_kernels.logprobs.stream import Gradients, Head, RowKernels, check_targets, visit

__all__ = ["ROW_KERNELS", "linear_logprobs"]

# A word this far below its row's maximum has probability exactly 0, in float64 too; clamping there keeps 0 * -inf out.
FAR_BELOW = -1e4
# Logits that a CPU takes through several elementwise passes at a time: 1 MiB of float32 stays in a level-2 cache.
CACHED_ELEMENTS = 2**18


class RowState(NamedTuple):
    """A chunk between its forward and its backward; exps and z own the chunk's memory."""

    logps: torch.Tensor  # (n,)
    entropy: torch.Tensor | None  # (n,)
    exps: torch.Tensor  # (n, V) exp(z - max z), not yet divided by its sum
    z: torch.Tensor | None  # (n, V) transformed logits, where they are kept for the gradient
    top: torch.Tensor  # (n, 1) max z
    total: torch.Tensor  # (n, 1) sum exp(z - max z) >= 1


def row_statistics(
    raw: torch.Tensor, targets: torch.Tensor, options: HeadOptions, want_entropy: bool, keep_logits: bool
) -> RowState:
    """Log-prob of the target and entropy of every row of raw logits (n, V), which is overwritten.

    logp = (z_t - max) - log(sum exp(z - max)): both parts have one sign, so logp <= 0 whatever the rounding, and logits
    of any size keep their precision. The sum is torch's pairwise one: torch.softmax's own running sum is off by 5e-6
    at 152,000 words.
    """
    z = transform_logits(raw, options, inplace=True)
    exps = torch.empty_like(z) if keep_logits else z
    blocks = zip(*(t.split(rows_in_cache(z)) for t in (z, exps, targets)), strict=True)
    parts = [block_statistics(*block, want_entropy) for block in blocks]
    top, chosen, total, dots = (torch.cat(part) for part in zip(*parts, strict=True))
    log_total = total.log()
    logps = (chosen - log_total).squeeze(-1)
    entropy = None
    if want_entropy:
        entropy = (log_total - dots / total).squeeze(-1).clamp_(0.0, math.log(z.shape[-1]))
    return RowState(logps, entropy, exps, z if keep_logits else None, top, total)


def rows_in_cache(z: torch.Tensor) -> int:
    """Rows of z (n, V) that several elementwise passes may take together: few on a CPU, all elsewhere."""
    return max(1, CACHED_ELEMENTS // z.shape[-1]) if z.device.type == "cpu" else max(1, z.shape[0])


def block_statistics(
    z: torch.Tensor, exps: torch.Tensor, targets: torch.Tensor, want_entropy: bool
) -> tuple[torch.Tensor, ...]:
    """max z, z_t - max z, sum exps and sum exps (z - max z) of some rows, each (n, 1); writes exps (n, V).

    Plain pairwise sums: a batched matrix product errs by 1e-3 at 152,000 words. The last is zero where not wanted.
    """
    top = z.amax(-1, keepdim=True)
    chosen = z.gather(-1, targets[:, None]) - top
    shifted = torch.sub(z, top, out=exps)
    finite = shifted.clamp_min(FAR_BELOW) if want_entropy else None
    total = exps.exp_().sum(-1, keepdim=True)
    dots = finite.mul_(exps).sum(-1, keepdim=True) if want_entropy else torch.zeros_like(total)
    return top, chosen, total, dots


def row_gradient(
    state: RowState,
    targets: torch.Tensor,
    options: HeadOptions,
    d_logps: torch.Tensor,
    d_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """d loss / d raw logits (n, V) from two coefficients per row; written over exps.

        d logp / d z_j = [j = t] - p_j            d entropy / d z_j = -p_j (log p_j + entropy)

    A row whose coefficients are both zero gets exact zeros, also when its logits are not finite.
    """
    d_logps = d_logps[:, None]
    idle, slope, offset = d_logps == 0, None, -d_logps / state.total
    if d_entropy is not None:
        d_entropy = d_entropy[:, None]
        idle = idle & (d_entropy == 0)
        slope = -d_entropy / state.total
        offset = offset + d_entropy * (state.total.log() - state.entropy[:, None]) / state.total
    columns = (state.exps, state.z, state.top, targets[:, None], d_logps, idle, slope, offset)
    step = rows_in_cache(state.exps)
    for start in range(0, targets.shape[0], step):
        block_gradient(*(None if t is None else t[start : start + step] for t in columns), options)
    return state.exps


def block_gradient(grad, z, top, targets, d_logps, idle, slope, offset, options: HeadOptions) -> None:
    """exps (n, V) of some rows becomes exps * (slope * (z - max z) + offset) + d_logps at the target, then d raw.

    The per-row arguments are (n, 1); slope is None where no entropy has a gradient.
    """
    if slope is None:
        grad.mul_(offset)
    else:
        grad.mul_((z - top).clamp_min_(FAR_BELOW).mul_(slope).add_(offset))
    grad.scatter_add_(-1, targets, d_logps)
    transform_backward(grad, z, options, inplace=True)
    if idle.device.type != "cpu" or bool(idle.any()):  # looking is free on a CPU and waits for the queue elsewhere
        grad.masked_fill_(idle, 0.0)


ROW_KERNELS = RowKernels(row_statistics, row_gradient)


def _head(weight: torch.Tensor, bias: torch.Tensor | None, scalars: tuple[float, float, float]) -> Head:
    return Head(weight, bias, HeadOptions(*scalars))


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """logps (N,) and entropy (N,), or (0,) when it is not wanted; 0 at ignored rows. hidden (N, H), targets (N,)."""
    head = _head(weight, bias, (temperature, softcap, logit_scale))
    rows = (targets != ignore_index).nonzero().squeeze(-1)
    check_targets(targets, rows, weight.shape[0])
    dtype = statistics_dtype(hidden, weight, bias)
    logps = hidden.new_zeros(targets.shape, dtype=dtype)
    entropy = hidden.new_zeros(targets.shape if return_entropy else (0,), dtype=dtype)
    seen, uncertain = visit(
        ROW_KERNELS, hidden, head, targets, rows, want_entropy=return_entropy, chunk_size=chunk_size
    )
    logps[rows] = seen
    if return_entropy:
        entropy[rows] = uncertain
    return logps, entropy


@linear_logprobs.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, logit_scale, ignore_index, return_entropy, chunk_size):
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d hidden (N, H), d weight (V, H), d bias (V,), each empty where `need` is False.

    Without an autograd formula of its own: a second derivative raises instead of being silently zero.
    """
    head = _head(weight, bias, tuple(scalars))
    active = d_logps != 0 if d_entropy is None else (d_logps != 0) | (d_entropy != 0)
    rows = (active & (targets != ignore_index)).nonzero().squeeze(-1)
    gradients = Gradients(hidden, head, need=tuple(need))

    def incoming(_logps, _entropy, taken):
        return d_logps[taken], None if d_entropy is None else d_entropy[taken]

    visit(
        ROW_KERNELS,
        hidden,
        head,
        targets,
        rows,
        want_entropy=d_entropy is not None,
        entropy_learns=d_entropy is not None,
        chunk_size=chunk_size,
        coefficients=incoming,
        gradients=gradients,
    )
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in gradients.result())


@linear_logprobs_backward.register_fake
def _(hidden, weight, bias, targets, d_logps, d_entropy, scalars, ignore_index, need, chunk_size):
    shaped = (hidden, weight, bias)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else hidden.new_empty(0)
        for tensor, wanted in zip(shaped, need, strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, temperature, softcap, logit_scale, ignore_index, return_entropy, chunk_size = inputs
    ctx.save_for_backward(hidden, weight, bias, targets)
    ctx.scalars = [temperature, softcap, logit_scale]
    ctx.ignore_index, ctx.return_entropy, ctx.chunk_size = ignore_index, return_entropy, chunk_size
    ctx.set_materialize_grads(False)  # an entropy that no loss reads must not cost its gradient


def _backward(ctx, d_logps, d_entropy):
    hidden, weight, bias, targets = ctx.saved_tensors
    none = (None,) * 7
    if not ctx.return_entropy:
        d_entropy = None
    if d_logps is None and d_entropy is None:
        return (None, None, None, *none)
    if d_logps is None:
        d_logps = torch.zeros_like(d_entropy)
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
    grads = torch.ops.mmrpt_kernels.linear_logprobs_backward(
        hidden, weight, bias, targets, d_logps, d_entropy, ctx.scalars, ctx.ignore_index, need, ctx.chunk_size
    )
    return (*(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)), *none)


linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
