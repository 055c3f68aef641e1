"""The definition of linear_token_divergence: all logits in memory, plain autograd, float64 for float64 inputs."""

from __future__ import annotations

import math

import torch

from mmrpt_kernels.common.autocast import without_autocast
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.options import HeadOptions, transform_logits


@without_autocast
def token_divergence(
    hidden_p: torch.Tensor,  # (N, H)
    hidden_q: torch.Tensor,  # (N, H_q)
    weight: torch.Tensor,  # (V, H)
    weight_q: torch.Tensor | None,  # (V, H_q); None: weight
    bias: torch.Tensor | None,  # (V,), for both views
    targets: torch.Tensor | None,  # (N,) int64, -100: no target
    kinds: tuple[str, ...],
    options: HeadOptions,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """divergence (N, len(kinds)), logps_p (N,), logps_q (N,), entropy_p (N,), entropy_q (N,)."""
    dtype = statistics_dtype(hidden_p, hidden_q, weight)
    logp = _log_softmax(hidden_p.to(dtype), weight.to(dtype), bias, options)
    logq = _log_softmax(hidden_q.to(dtype), (weight if weight_q is None else weight_q).to(dtype), bias, options)
    target_p = target_q = None
    if targets is not None:
        target_p, target_q = _at_targets(logp, targets), _at_targets(logq, targets)
    columns = [_divergence(kind, logp, logq, target_p, target_q) for kind in kinds]
    return torch.stack(columns, dim=-1), target_p, target_q, _entropy(logp), _entropy(logq)


def _log_softmax(hidden, weight, bias, options):
    raw = hidden @ weight.T
    if bias is not None:
        raw = raw + bias.to(raw.dtype)
    return torch.log_softmax(transform_logits(raw, options), dim=-1)


def _at_targets(logp, targets):
    picked = logp.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets >= 0, picked, 0.0).clamp_max(0.0)


def _expectation(logp, values):
    """sum_v p_v * values_v with 0 * anything = 0, so that a word of probability zero (logit -inf) adds nothing."""
    p = logp.exp()
    return (p * torch.where(p == 0, 0.0, values)).sum(-1)


def _entropy(logp):
    return -_expectation(logp, logp).clamp_max(0.0)


def _divergence(kind, logp, logq, target_p, target_q):
    if kind == "kl":
        return _expectation(logp, logp - logq).clamp_min(0.0)
    if kind == "reverse_kl":
        return _expectation(logq, logq - logp).clamp_min(0.0)
    if kind == "js":
        mean = 0.5 * (logp.exp() + logq.exp())
        log_mean = torch.where(mean == 0, 1.0, mean).log()
        return (0.5 * (_expectation(logp, logp - log_mean) + _expectation(logq, logq - log_mean))).clamp(
            0.0, math.log(2)
        )
    if kind == "k3":
        d = (target_q - target_p).clamp(-20.0, 20.0)
        return (torch.expm1(d) - d).clamp(0.0, 10.0)
    raise AssertionError(kind)
