"""Numbers to log and to check a fused head by, from the log-probs it gave; plain PyTorch without gradient."""

from __future__ import annotations

import torch

from mmrpt_kernels.policy_loss.options import MAX_LOG_RATIO, PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import policy_rows, sequence_log_ratio

__all__ = ["policy_statistics"]


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the entries under `mask`, 0 where there are none; what the others hold does not matter."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


@torch.no_grad()
def policy_statistics(
    logps: torch.Tensor, entropy: torch.Tensor, tokens: PolicyTokens, options: PolicyOptions
) -> dict[str, torch.Tensor]:
    """0-d tensors; logps, entropy and the tensors of `tokens` (B, T). Meanings stand at `linear_policy_loss`."""
    response = tokens.response
    policy = policy_rows(tokens)
    gaps = torch.zeros_like(logps)
    if tokens.old_logps is not None:
        gaps = torch.where(response, logps - tokens.old_logps, 0.0).clamp(max=MAX_LOG_RATIO)
    level = gaps
    if tokens.old_logps is not None and options.ratio_level == "sequence":
        flat = PolicyTokens(*(None if t is None else t.reshape(-1) for t in tokens))
        level = sequence_log_ratio(logps.reshape(-1), flat, tuple(logps.shape)).view(logps.shape)
        level = level.clamp(max=MAX_LOG_RATIO)
    ratio = level.exp()
    low, high = ratio < 1.0 - options.clip_low, ratio > 1.0 + options.clip_high
    if options.surrogate == "clip":  # the minimum takes the clipped branch on one side alone
        low, high = low & (tokens.advantages < 0), high & (tokens.advantages > 0)
    count = response.sum().to(logps.dtype)
    largest = torch.where(response, logps, -torch.inf).amax() if logps.numel() else logps.new_zeros(())
    statistics = {
        "tokens": count,
        "kept_fraction": _mean(tokens.perception.to(logps.dtype), response),
        "logp_mean": _mean(logps, response),
        "max_logp": torch.where(count > 0, largest, 0.0),
        "entropy_mean": _mean(entropy, response),
        "ratio_mean": _mean(ratio, response),
        "ratio_max": torch.where(response, ratio, 0.0).amax() if ratio.numel() else ratio.new_zeros(()),
        "approx_kl": _mean(gaps.expm1() - gaps, response),
        "clip_fraction_low": _mean(low.to(logps.dtype), policy),
        "clip_fraction_high": _mean(high.to(logps.dtype), policy),
    }
    if tokens.ref_logps is not None:
        gap = torch.where(response, tokens.ref_logps - logps, 0.0).clamp(max=MAX_LOG_RATIO)
        statistics["ref_kl"] = _mean(gap.expm1() - gap, response)
    return statistics
