"""`linear_logprobs` as a custom operator for compilers, whose schema takes options one by one."""

from __future__ import annotations

import torch

from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.logprobs import fused

__all__ = ["linear_logprobs", "linear_logprobs_backward"]


@torch.library.custom_op("mmrpt_kernels::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    return_entropy: bool,
    temperature: float,
    softcap: float,
    logit_scale: float,
    backend: str,
    chunk_size: int | None,
    compact: bool,
    skip_below: float,
    vocab_group: str | None,
    cast: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logps (N,) and entropy (N,), or (0,) when it is not wanted; arguments as in `fused.forward`."""
    options = HeadOptions(temperature, softcap, logit_scale)
    loop = LoopOptions(backend, chunk_size, compact, skip_below, vocab_group, cast)
    logps, entropy, _ = fused.forward(hidden, weight, bias, targets, ignore_index, return_entropy, options, loop)
    return logps, logps.new_empty(0) if entropy is None else entropy


@linear_logprobs.register_fake
def _(hidden, weight, bias, targets, ignore_index, return_entropy, *options):
    dtype = statistics_dtype(hidden, weight, bias)
    logps = hidden.new_empty(targets.shape, dtype=dtype)
    return logps, hidden.new_empty(targets.shape if return_entropy else (0,), dtype=dtype)


@torch.library.custom_op("mmrpt_kernels::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    d_logps: torch.Tensor,
    d_entropy: torch.Tensor | None,
    ignore_index: int,
    need: list[bool],
    temperature: float,
    softcap: float,
    logit_scale: float,
    backend: str,
    chunk_size: int | None,
    compact: bool,
    skip_below: float,
    vocab_group: str | None,
    cast: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`fused.backward`; empty where `need` is False. It has no autograd formula: a second derivative raises."""
    options = HeadOptions(temperature, softcap, logit_scale)
    loop = LoopOptions(backend, chunk_size, compact, skip_below, vocab_group, cast)
    tensors = (hidden, weight, bias, targets, d_logps, d_entropy)
    grads = fused.backward(*tensors, ignore_index, tuple(need), options, loop)
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


@linear_logprobs_backward.register_fake
def _(hidden, weight, bias, targets, d_logps, d_entropy, ignore_index, need, *options):
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else hidden.new_empty(0)
        for tensor, wanted in zip((hidden, weight, bias), need, strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, ctx.ignore_index, ctx.return_entropy, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, targets)
    ctx.set_materialize_grads(False)  # an entropy that no loss reads must not cost its gradient


def _backward(ctx, d_logps, d_entropy):
    none = (None,) * (6 + len(ctx.options))
    if not ctx.return_entropy:
        d_entropy = None
    if d_logps is None and d_entropy is None:
        return none
    d_logps = torch.zeros_like(d_entropy) if d_logps is None else d_logps
    hidden, weight, bias, targets = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
    grads = linear_logprobs_backward(
        hidden, weight, bias, targets, d_logps, d_entropy, ctx.ignore_index, need, *ctx.options
    )
    return *(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)), *none[3:]


linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
