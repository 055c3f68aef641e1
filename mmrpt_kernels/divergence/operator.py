"""`linear_token_divergence` and its backward as custom operators, which take tensors and options one by one."""

from __future__ import annotations

import torch

from mmrpt_kernels.common.autocast import without_autocast
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.divergence import fused
from mmrpt_kernels.divergence.pair_softmax import RowValues
from mmrpt_kernels.lm_head.options import OPTIONS_SCHEMA, option_records

_TENSORS = (
    "Tensor hidden_p, Tensor hidden_q, Tensor weight, Tensor? weight_q, Tensor? bias, Tensor? targets, str kinds, "
    + OPTIONS_SCHEMA
)
_GRADS = (
    "Tensor? grad_divergence, Tensor? grad_logps_p, Tensor? grad_logps_q, Tensor? grad_entropy_p, "
    "Tensor? grad_entropy_q"
)
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _pair(hidden_p, hidden_q, weight, weight_q, bias, targets, kinds: str, *options) -> fused.Pair:
    tensors = (hidden_p, hidden_q, weight, weight_q, bias, targets)
    return fused.Pair(*tensors, tuple(kinds.split(",")), *option_records(options))


@without_autocast
def _forward(*call):
    """`fused.forward` of (N, H) rows; kinds: joined by commas."""
    return tuple(fused.forward(_pair(*call)))


@without_autocast
def _backward(*grads_and_call):
    """Gradients of hidden_p, hidden_q, weight, weight_q and bias, each empty where the last argument says False."""
    (divergence, logps_p, logps_q, *entropies), (*call, need) = grads_and_call[:5], grads_and_call[5:]
    pair = _pair(*call)
    on_targets = (None, None) if pair.targets is None else (logps_p, logps_q)
    made = fused.backward(pair, RowValues(divergence, *on_targets, *entropies), tuple(need))
    return tuple(pair.hidden_p.new_empty(0) if grad is None else grad for grad in made)


linear_token_divergence = torch.library.custom_op(
    "mmrpt_kernels::linear_token_divergence", _forward, mutates_args=(), schema=f"({_TENSORS}) -> {_FIVE}"
)
linear_token_divergence_backward = torch.library.custom_op(
    "mmrpt_kernels::linear_token_divergence_backward",
    _backward,
    mutates_args=(),
    schema=f"({_GRADS}, {_TENSORS}, bool[] need) -> {_FIVE}",
)


@linear_token_divergence.register_fake
def _(hidden_p, hidden_q, weight, weight_q, bias, targets, kinds, *_options):
    rows, dtype = hidden_p.shape[0], statistics_dtype(hidden_p, hidden_q, weight)
    with_targets = 0 if targets is None else rows
    divergence = hidden_p.new_empty(rows, len(kinds.split(",")), dtype=dtype)
    return divergence, *(divergence.new_empty(size) for size in (with_targets, with_targets, rows, rows))


@linear_token_divergence_backward.register_fake
def _(gd, glp, glq, gep, geq, hidden_p, hidden_q, weight, weight_q, bias, *rest):
    sources = zip((hidden_p, hidden_q, weight, weight_q, bias), rest[-1], strict=True)
    return tuple(source.new_empty(source.shape) if need else hidden_p.new_empty(0) for source, need in sources)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]
    ctx.set_materialize_grads(False)  # an entropy that no loss reads must not cost its gradient


def _differentiate(ctx, *grads):
    need = [bool(one) for one in ctx.needs_input_grad[:5]]
    none = (None,) * (1 + len(ctx.options))
    if all(grad is None for grad in grads):
        return *(None for _ in need), *none
    made = linear_token_divergence_backward(*grads, *ctx.saved_tensors, *ctx.options, need)
    return *(grad if wanted else None for grad, wanted in zip(made, need, strict=True)), *none


linear_token_divergence.register_autograd(_differentiate, setup_context=_setup_context)
