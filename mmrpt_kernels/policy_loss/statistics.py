"""Numbers to log and to check a fused head by, from the log-probs it gave; plain PyTorch without gradient."""

from __future__ import annotations

import torch

from mmrpt_kernels.policy_loss.options import MAX_LOG_RATIO, PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import policy_rows, sequence_log_ratio

__all__ = ["policy_statistics"]


@torch.no_grad()
def policy_statistics(
    logps: torch.Tensor,
    entropy: torch.Tensor | None,
    tokens: PolicyTokens,
    options: PolicyOptions,
    rows: torch.Tensor,
    shape: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """0-d tensors; meanings stand at `linear_policy_loss`.

    logps, entropy and the tensors of `tokens`: (N,), N = B * T of `shape`. rows: (N,) bool, the tokens whose log-probs
    are known and that means are taken over.
    """
    policy, zero = policy_rows(tokens), torch.zeros_like(logps)
    gap = level = zero
    if tokens.old_logps is not None:
        gap = level = torch.where(rows, logps - tokens.old_logps, 0.0).clamp(max=MAX_LOG_RATIO)
        if options.ratio_level == "sequence":
            level = sequence_log_ratio(logps, tokens, shape).clamp(max=MAX_LOG_RATIO)
    ratio = level.exp()
    low, high = ratio < 1.0 - options.clip_low, ratio > 1.0 + options.clip_high
    if options.surrogate == "clip":  # the minimum takes the clipped branch on one side alone
        low, high = low & (tokens.advantages < 0), high & (tokens.advantages > 0)
    means = {
        "kept_fraction": (tokens.perception, tokens.response),
        "logp_mean": (logps, rows),
        "ratio_mean": (ratio, rows),
        "approx_kl": (gap.expm1() - gap, rows),
        "clip_fraction_low": (low, policy),
        "clip_fraction_high": (high, policy),
    }
    if entropy is not None:
        means["entropy_mean"] = (entropy, rows)
    if tokens.ref_logps is not None:
        gap = torch.where(rows, tokens.ref_logps - logps, 0.0).clamp(max=MAX_LOG_RATIO)
        means["ref_kl"] = (gap.expm1() - gap, rows)
    values = torch.stack([value.to(logps.dtype) for value, _ in means.values()])  # (K, N)
    masks = torch.stack([mask for _, mask in means.values()])
    # What values outside a mask hold does not matter; no token: 0.
    means = dict(zip(means, torch.where(masks, values, 0.0).sum(1) / masks.sum(1).clamp_min(1), strict=True))
    statistics = {"tokens": tokens.response.sum().to(logps.dtype), **means}
    if logps.numel() == 0:
        return statistics | {"max_logp": zero.sum(), "ratio_max": zero.sum()}
    largest = torch.where(rows, logps, -torch.inf).amax()
    return statistics | {
        "max_logp": torch.where(largest == -torch.inf, 0.0, largest),
        "ratio_max": torch.where(rows, ratio, 0.0).amax(),
    }
