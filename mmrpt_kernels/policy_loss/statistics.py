"""Numbers to log and to check a fused head by, from the log-probs it gave; plain PyTorch without gradient."""

from __future__ import annotations

import torch

from mmrpt_kernels.policy_loss.options import MAX_LOG_RATIO
from mmrpt_kernels.policy_loss.surrogate import PolicyTokenLoss, sequence_log_ratio


@torch.no_grad()
def policy_statistics(
    logps: torch.Tensor,
    entropy: torch.Tensor | None,
    token_loss: PolicyTokenLoss,
    rows: torch.Tensor,
    shape: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """0-d tensors; meanings stand at `linear_policy_loss`.

    logps, entropy and the tensors of `token_loss`: (N,), N = B * T of `shape`. rows: (N,) bool, the tokens whose
    log-probs are known and that means are taken over.
    """
    tokens, options, policy = token_loss.tokens, token_loss.options, token_loss.policy
    if tokens.old_logps is None:
        gap = level = torch.zeros_like(logps)
    else:
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
    counts = masks.sum(1, dtype=logps.dtype)  # of the first mask, the response: its tokens
    found = torch.where(masks, values, 0.0).sum(1) / counts.clamp_min(1)
    statistics = {"tokens": counts[0], **dict(zip(means, found, strict=True))}
    largest = {"max_logp": logps, "ratio_max": ratio}
    if logps.numel() == 0:
        return statistics | dict.fromkeys(largest, counts[0])
    found = torch.where(rows, torch.stack(list(largest.values())), -torch.inf).amax(1)
    return statistics | dict(zip(largest, torch.where(found == -torch.inf, 0.0, found), strict=True))
