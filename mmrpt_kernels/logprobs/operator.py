"""`linear_logprobs` as custom operators for compilers, which take tensors and options one by one."""

from __future__ import annotations

import torch

from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.options import OPTIONS_SCHEMA, option_records
from mmrpt_kernels.logprobs import fused

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"


def _forward(hidden, weight, bias, targets, ignore_index, return_entropy, *options):
    """logps (N,) and entropy (N,), or (0,) when it is not wanted; arguments as in `fused.forward`."""
    tensors = (hidden, weight, bias, targets)
    logps, entropy, _ = fused.forward(*tensors, ignore_index, return_entropy, *option_records(options))
    return logps, logps.new_empty(0) if entropy is None else entropy


def _backward(hidden, weight, bias, targets, d_logps, d_entropy, ignore_index, need, *options):
    """`fused.backward`; empty where `need` is False. It has no autograd formula: a second derivative raises."""
    tensors = (hidden, weight, bias, targets, d_logps, d_entropy)
    grads = fused.backward(*tensors, ignore_index, tuple(need), *option_records(options))
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


linear_logprobs = torch.library.custom_op(
    "mmrpt_kernels::linear_logprobs",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, int ignore_index, bool return_entropy, {OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
)
linear_logprobs_backward = torch.library.custom_op(
    "mmrpt_kernels::linear_logprobs_backward",
    _backward,
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor d_logps, Tensor? d_entropy, int ignore_index, bool[] need, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
)


@linear_logprobs.register_fake
def _(hidden, weight, bias, targets, ignore_index, return_entropy, *options):
    logps = hidden.new_empty(targets.shape, dtype=statistics_dtype(hidden, weight, bias))
    return logps, torch.empty_like(logps) if return_entropy else logps.new_empty(0)


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


def _differentiate(ctx, d_logps, d_entropy):
    none = (None,) * (6 + len(ctx.options))
    d_entropy = d_entropy if ctx.return_entropy else None
    if d_logps is None and d_entropy is None:
        return none
    d_logps = torch.zeros_like(d_entropy) if d_logps is None else d_logps
    tensors = ctx.saved_tensors
    need = [tensor is not None and wanted for tensor, wanted in zip(tensors, ctx.needs_input_grad[:3], strict=False)]
    grads = linear_logprobs_backward(*tensors, d_logps, d_entropy, ctx.ignore_index, need, *ctx.options)
    return *(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)), *none[3:]


linear_logprobs.register_autograd(_differentiate, setup_context=_setup_context)
