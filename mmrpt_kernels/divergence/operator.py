"""`linear_token_divergence` and its backward as custom operators, whose schemas take options one by one."""

from __future__ import annotations

import torch

from mmrpt_kernels.common.autocast import without_autocast
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.divergence import fused
from mmrpt_kernels.divergence.pair_softmax import RowValues
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions

__all__ = ["linear_token_divergence", "linear_token_divergence_backward"]


def _pair(tensors: tuple, kinds: str, *options) -> fused.Pair:
    return fused.Pair(*tensors, tuple(kinds.split(",")), HeadOptions(*options[:3]), LoopOptions(*options[3:]))


@torch.library.custom_op("mmrpt_kernels::linear_token_divergence", mutates_args=())
@without_autocast
def linear_token_divergence(
    hidden_p: torch.Tensor,
    hidden_q: torch.Tensor,
    weight: torch.Tensor,
    weight_q: torch.Tensor | None,
    bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    kinds: str,
    temperature: float,
    softcap: float,
    logit_scale: float,
    backend: str,
    chunk_size: int | None,
    compact: bool,
    skip_below: float,
    vocab_group: str | None,
    cast: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`fused.forward` of (N, H) rows; kinds: joined by commas."""
    options = (temperature, softcap, logit_scale, backend, chunk_size, compact, skip_below, vocab_group, cast)
    return fused.forward(_pair((hidden_p, hidden_q, weight, weight_q, bias, targets), kinds, *options))


@linear_token_divergence.register_fake
def _(hidden_p, hidden_q, weight, weight_q, bias, targets, kinds, *_options):
    rows, dtype = hidden_p.shape[0], statistics_dtype(hidden_p, hidden_q, weight)
    with_targets = 0 if targets is None else rows
    divergence = hidden_p.new_empty(rows, len(kinds.split(",")), dtype=dtype)
    sizes = (with_targets, with_targets, rows, rows)
    return (divergence, *(hidden_p.new_empty(size, dtype=dtype) for size in sizes))


@torch.library.custom_op("mmrpt_kernels::linear_token_divergence_backward", mutates_args=())
@without_autocast
def linear_token_divergence_backward(
    grad_divergence: torch.Tensor | None,
    grad_logps_p: torch.Tensor | None,
    grad_logps_q: torch.Tensor | None,
    grad_entropy_p: torch.Tensor | None,
    grad_entropy_q: torch.Tensor | None,
    hidden_p: torch.Tensor,
    hidden_q: torch.Tensor,
    weight: torch.Tensor,
    weight_q: torch.Tensor | None,
    bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    kinds: str,
    temperature: float,
    softcap: float,
    logit_scale: float,
    backend: str,
    chunk_size: int | None,
    compact: bool,
    skip_below: float,
    vocab_group: str | None,
    cast: torch.dtype | None,
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden_p, hidden_q, weight, weight_q and bias, each empty where `need` is False."""
    options = (temperature, softcap, logit_scale, backend, chunk_size, compact, skip_below, vocab_group, cast)
    pair = _pair((hidden_p, hidden_q, weight, weight_q, bias, targets), kinds, *options)
    on_targets = (None, None) if targets is None else (grad_logps_p, grad_logps_q)
    grads = RowValues(grad_divergence, *on_targets, grad_entropy_p, grad_entropy_q)
    made = fused.backward(pair, grads, tuple(need))
    return tuple(hidden_p.new_empty(0) if grad is None else grad for grad in made)


@linear_token_divergence_backward.register_fake
def _(gd, glp, glq, gep, geq, hidden_p, hidden_q, weight, weight_q, bias, *targets_options_and_need):
    sources = zip((hidden_p, hidden_q, weight, weight_q, bias), targets_options_and_need[-1], strict=True)
    return tuple(source.new_empty(source.shape) if need else hidden_p.new_empty(0) for source, need in sources)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]
    ctx.set_materialize_grads(False)  # an entropy that no loss reads must not cost its gradient


def _backward(ctx, *grads):
    need = [bool(one) for one in ctx.needs_input_grad[:5]]
    none = (None,) * (1 + len(ctx.options))
    if all(grad is None for grad in grads):
        return *(None for _ in need), *none
    made = linear_token_divergence_backward(*grads, *ctx.saved_tensors, *ctx.options, need)
    return *(grad if wanted else None for grad, wanted in zip(made, need, strict=True)), *none


linear_token_divergence.register_autograd(_backward, setup_context=_setup_context)
