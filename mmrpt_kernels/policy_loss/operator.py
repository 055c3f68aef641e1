"""`linear_policy_loss` as a custom operator for compilers, which takes tensors and options one by one."""

from __future__ import annotations

import torch

from mmrpt_kernels.common.autocast import dtypes_of
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.options import OPTIONS_SCHEMA, option_records
from mmrpt_kernels.policy_loss import fused
from mmrpt_kernels.policy_loss.options import PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import PolicyTokenLoss

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_TOKENS = (  # PolicyTokens, and what a token's loss is multiplied by; (N,) each
    "Tensor response, Tensor perception, Tensor advantages, Tensor? old_logps, Tensor? ref_logps, "
    "Tensor? sampler_weights, Tensor loss_weights"
)
_POLICY = (  # PolicyOptions
    "float kl_coef, str kl_estimator, float clip_low, float clip_high, float? dual_clip, float entropy_coef, "
    "str entropy_scope, str entropy_kind, str ratio_level, str surrogate"
)


def _split(rest: tuple) -> tuple[tuple, PolicyOptions, tuple]:
    """What follows the first four tensors: the tokens' tensors, the policy's options, and the others'."""
    tokens, count = len(PolicyTokens._fields) + 1, len(PolicyOptions._fields)
    return rest[:tokens], PolicyOptions(*rest[tokens : tokens + count]), rest[tokens + count :]


def _forward(hidden, weight, bias, targets, see_all, need, *rest):
    """`fused.policy_loss`: loss, logps (N,), entropy (N,), d hidden, d weight, d bias; empty where there is none."""
    (*tokens, loss_weights), policy, options = _split(rest)
    token_loss = PolicyTokenLoss.of(PolicyTokens(*tokens), loss_weights, policy)
    records = option_records(options)
    found = fused.policy_loss(hidden, weight, bias, targets, token_loss, see_all, tuple(need), *records)
    loss, logps, entropy, gradients = found
    return loss, logps, *(hidden.new_empty(0) if t is None else t for t in (entropy, *gradients))


linear_policy_loss = torch.library.custom_op(
    "mmrpt_kernels::linear_policy_loss",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, bool see_all, bool[] need, {_TOKENS}, {_POLICY}, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@linear_policy_loss.register_fake
def _(hidden, weight, bias, targets, see_all, need, *rest):
    dtype, count = statistics_dtype(hidden, weight, bias), targets.numel()
    entropies = count if see_all or _split(rest)[1].entropy_learns else 0

    def gradient(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
        return torch.empty_like(tensor, dtype=wide, memory_format=torch.contiguous_format)

    statistics = [hidden.new_empty(shape, dtype=dtype) for shape in ((), (count,), (entropies,))]
    needed = zip((hidden, weight, bias), need, strict=True)
    return *statistics, *(gradient(tensor) if wanted else hidden.new_empty(0) for tensor, wanted in needed)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.need, ctx.dtypes, ctx.count = inputs[5], dtypes_of(*inputs[:3]), len(inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_loss, *_constants):
    """What compilers trace: nothing overwritten, they plan the memory. The public function detaches other outputs."""
    none = (None,) * ctx.count
    if d_loss is None:
        return none
    grads = zip(ctx.saved_tensors, ctx.need, ctx.dtypes, strict=True)
    factor = d_loss.reshape(1)  # with a dimension it takes part in choosing the dtype: not rounded before the product
    return *((grad * factor).to(dtype) if needed else None for grad, needed, dtype in grads), *none[3:]


linear_policy_loss.register_autograd(_differentiate, setup_context=_setup_context)
