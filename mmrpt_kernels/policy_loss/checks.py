"""Argument checks of `linear_policy_loss`, and the caller's many shapes brought to (B, T)."""

from __future__ import annotations

import math

import torch

from mmrpt_kernels.common import checks
from mmrpt_kernels.policy_loss.options import (
    AGGREGATIONS,
    ENTROPY_KINDS,
    ENTROPY_SCOPES,
    KL_ESTIMATORS,
    RATIO_LEVELS,
    SURROGATES,
    PolicyOptions,
    PolicyTokens,
)


def _check_word(name: str, value: str, allowed: tuple[str, ...]) -> None:
    checks.check(value in allowed, f"{name}: got {value!r}, expected one of {', '.join(allowed)}; choose one of them")


def _check_finite(name: str, value: float) -> None:
    # Not math.isfinite: a coefficient that changes between compiled calls is symbolic, and it would break the graph.
    checks.check(abs(value) < math.inf, f"{name}: got {value}, expected a finite number; 0 switches the term off")


def check_options(
    options: PolicyOptions,
    aggregation: str,
    normalizer: torch.Tensor | float | None,
    ref_logps: torch.Tensor | None,
    like: torch.Tensor,
) -> None:
    """Raise ValueError for settings that cannot be meant. like: the hidden states, on whose device the loss is made."""
    _check_word("kl_estimator", options.kl_estimator, KL_ESTIMATORS)
    _check_word("entropy_scope", options.entropy_scope, ENTROPY_SCOPES)
    _check_word("entropy_kind", options.entropy_kind, ENTROPY_KINDS)
    _check_word("ratio_level", options.ratio_level, RATIO_LEVELS)
    _check_word("surrogate", options.surrogate, SURROGATES)
    _check_word("aggregation", aggregation, AGGREGATIONS)
    checks.check_range("clip_low", options.clip_low, 0.0, 1.0)
    checks.check_range("clip_high", options.clip_high, 0.0, math.inf)
    if options.dual_clip is not None:
        checks.check_range("dual_clip", options.dual_clip, 1.0, None, low_open=True)
        checks.check(
            options.surrogate == "clip",
            f"dual_clip: got {options.dual_clip} with surrogate {options.surrogate!r}, which bounds the ratio already; "
            "leave it None",
        )
    _check_finite("kl_coef", options.kl_coef)
    _check_finite("entropy_coef", options.entropy_coef)
    checks.check(
        options.kl_coef == 0.0 or ref_logps is not None,
        f"ref_logps: got None with kl_coef {options.kl_coef}, expected (B, T) log-probs of the reference model; "
        "pass them, or set kl_coef=0",
    )
    if isinstance(normalizer, torch.Tensor):
        checks.check_shape("normalizer", normalizer, (), "a scalar: what the summed loss is divided by")
        if normalizer.device.type != "cpu":  # torch takes a CPU's scalar as a number, on any device
            checks.check_same_device(hidden=like, normalizer=normalizer)
    elif normalizer is not None:
        checks.check_range("normalizer", normalizer, 0.0, None, low_open=True)


def _per_token(name: str, tensor: torch.Tensor | None, shape: torch.Size, like: torch.Tensor, dtype: torch.dtype):
    """A float (B, T) argument as a constant in the statistics dtype; None stays None."""
    if tensor is None:
        return None
    checks.check_shape(name, tensor, tuple(shape), "(B, T): one value per token")
    checks.check_same_device(hidden=like, **{name: tensor})
    return tensor.detach().to(dtype)


def _mask(name: str, mask: torch.Tensor, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    checks.check_shape(name, mask, tuple(shape), "(B, T): one bool per token")
    checks.check_dtype(name, mask, (torch.bool,))
    checks.check_same_device(hidden=like, **{name: mask})
    return mask


def _advantages(
    advantages: torch.Tensor, weights: torch.Tensor | None, shape: torch.Size, like: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(B, T) trajectory weight times advantage, from (B,) or (B, T) advantages."""
    checks.check(
        isinstance(advantages, torch.Tensor) and advantages.dim() in (1, 2),
        "advantages: expected (B,), one per trajectory, or (B, T), one per token; pass a tensor of one of these shapes",
    )
    if advantages.dim() == 1:
        checks.check_shape("advantages", advantages, (shape[0],), "(B,): one value per trajectory, or (B, T)")
        advantages = advantages[:, None].expand(shape)
    advantages = _per_token("advantages", advantages, shape, like, dtype)
    if weights is None:
        return advantages
    checks.check_shape("trajectory_weights", weights, (shape[0],), "(B,): one value per trajectory")
    checks.check_same_device(hidden=like, trajectory_weights=weights)
    return weights.detach().to(dtype)[:, None] * advantages


def gather_tokens(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    *,
    ignore_index: int,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    perception_mask: torch.Tensor | None,
    trajectory_weights: torch.Tensor | None,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    sampler_weights: torch.Tensor | None,
) -> PolicyTokens:
    """Check the per-token arguments and bring them to (B, T), detached, floats in `dtype`.

    The response loses tokens whose target is `ignore_index`; without a perception_mask every response token counts.
    """
    shape = hidden.shape[:2]
    response = _mask("response_mask", response_mask, shape, hidden) & (targets != ignore_index)
    if perception_mask is None:
        perception = response
    else:
        perception = response & _mask("perception_mask", perception_mask, shape, hidden)
    return PolicyTokens(
        response,
        perception,
        _advantages(advantages, trajectory_weights, shape, hidden, dtype),
        _per_token("old_logps", old_logps, shape, hidden, dtype),
        _per_token("ref_logps", ref_logps, shape, hidden, dtype),
        _per_token("sampler_weights", sampler_weights, shape, hidden, dtype),
    )


def loss_weights(
    response: torch.Tensor, aggregation: str, normalizer: torch.Tensor | float | None, dtype: torch.dtype
) -> torch.Tensor:
    """(B, T) what each token's loss is multiplied by so that the plain sum is the aggregate; 0 outside the response."""
    weights = response.to(dtype)
    lengths = weights.sum(1, keepdim=True)
    if aggregation == "token_mean":
        count = lengths.sum()
    elif aggregation == "sequence_mean":
        weights = weights / lengths.clamp_min(1.0)
        count = (lengths > 0).sum()
    else:
        count = None
    if normalizer is not None:
        return weights / normalizer
    return weights if count is None else weights / count.clamp_min(1)
