"""`linear_policy_loss` as a custom operator for compilers, whose schema takes tensors and options one by one."""

from __future__ import annotations

import torch

from mmrpt_kernels.common.autocast import dtypes_of
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.policy_loss import fused
from mmrpt_kernels.policy_loss.options import PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import PolicyTokenLoss

__all__ = ["linear_policy_loss"]


@torch.library.custom_op("mmrpt_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    response: torch.Tensor,
    perception: torch.Tensor,
    advantages: torch.Tensor,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    sampler_weights: torch.Tensor | None,
    loss_weights: torch.Tensor,
    see_all: bool,
    need: list[bool],
    temperature: float,
    softcap: float,
    logit_scale: float,
    kl_coef: float,
    kl_estimator: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    entropy_scope: str,
    entropy_kind: str,
    ratio_level: str,
    surrogate: str,
    backend: str,
    chunk_size: int | None,
    compact: bool,
    skip_below: float,
    vocab_group: str | None,
    cast: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`fused.policy_loss`: loss, logps (N,), entropy (N,), d hidden, d weight, d bias; empty where there is none.

    The tensors from response to loss_weights: (N,), N = B * T.
    """
    options = HeadOptions(temperature, softcap, logit_scale)
    clips = (clip_low, clip_high, dual_clip)
    terms = (entropy_coef, entropy_scope, entropy_kind, ratio_level, surrogate)
    policy = PolicyOptions(kl_coef, kl_estimator, *clips, *terms)
    loop = LoopOptions(backend, chunk_size, compact, skip_below, vocab_group, cast)
    tokens = PolicyTokens(response, perception, advantages, old_logps, ref_logps, sampler_weights)
    token_loss = PolicyTokenLoss.of(tokens, loss_weights, policy)
    found = fused.policy_loss(hidden, weight, bias, targets, token_loss, see_all, tuple(need), options, loop)
    loss, logps, entropy, gradients = found
    return loss, logps, *(hidden.new_empty(0) if t is None else t for t in (entropy, *gradients))


@linear_policy_loss.register_fake
def _(hidden, weight, bias, targets, *rest):
    dtype, count = statistics_dtype(hidden, weight, bias), targets.numel()
    see_all, need, coef, kind = rest[7], rest[8], rest[17], rest[19]
    with_entropy = see_all or (coef != 0.0 and kind == "exact")
    statistics = [hidden.new_empty(shape, dtype=dtype) for shape in ((), (count,), (count if with_entropy else 0,))]

    def grad(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
        return torch.empty_like(tensor, dtype=wide, memory_format=torch.contiguous_format)

    needed = zip((hidden, weight, bias), need, strict=True)
    return *statistics, *(grad(tensor) if wanted else hidden.new_empty(0) for tensor, wanted in needed)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.need, ctx.dtypes, ctx.count = inputs[12], dtypes_of(*inputs[:3]), len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_loss, *_constants):
    """What compilers trace: nothing overwritten, they plan the memory. The public function detaches other outputs."""
    none = (None,) * ctx.count
    if d_loss is None:
        return none
    grads = zip(ctx.saved_tensors, ctx.need, ctx.dtypes, strict=True)
    factor = d_loss.reshape(1)  # with a dimension it takes part in choosing the dtype: not rounded before the product
    return *((grad * factor).to(dtype) if needed else None for grad, needed, dtype in grads), *none[3:]


linear_policy_loss.register_autograd(_backward, setup_context=_setup_context)
