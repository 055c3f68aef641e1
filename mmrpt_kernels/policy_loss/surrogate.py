"""The policy loss of single tokens: n numbers in, n numbers out. All that the fused loss knows of PPO stands here.

From log-probs and entropies come the losses and their derivatives by both, in closed form: two coefficients a token are
what the chunk loop needs. `reference.py` is the same by autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.policy_loss.options import MAX_LOG_RATIO, PolicyOptions, PolicyTokens


def policy_rows(tokens: PolicyTokens) -> torch.Tensor:
    """bool, as the tensors of `tokens`: where the clipped surrogate counts. A zero advantage has no policy term."""
    rows = tokens.response & tokens.perception & (tokens.advantages != 0)
    return rows if tokens.sampler_weights is None else rows & (tokens.sampler_weights != 0)


def learning_rows(tokens: PolicyTokens, options: PolicyOptions, policy: torch.Tensor) -> torch.Tensor:
    """bool, as the tensors of `tokens`: where the loss can be other than zero, known before any logit is. policy:
    `policy_rows`."""
    if options.kl_coef != 0.0:
        return tokens.response
    if options.entropy_coef != 0.0:
        return tokens.response if options.entropy_scope == "response" else tokens.response & tokens.perception
    return policy


def sequence_log_ratio(logps: torch.Tensor, tokens: PolicyTokens, shape: tuple[int, int]) -> torch.Tensor:
    """(N,) the mean over its response of log pi / pi_old, for every token; logps (N,) with N = B * T."""
    gaps = torch.where(tokens.response, logps - tokens.old_logps, 0.0).view(shape)
    lengths = tokens.response.view(shape).sum(1, keepdim=True).clamp_min(1)
    return (gaps.sum(1, keepdim=True) / lengths).expand(shape).reshape(-1)


class PolicyTokenLoss(NamedTuple):
    """The chunk loop's `TokenLoss`: aggregated losses of rows of the batch, and their slopes."""

    tokens: PolicyTokens  # (N,) each
    weights: torch.Tensor  # (N,) what a token's loss is multiplied by in the aggregate
    options: PolicyOptions
    policy: torch.Tensor  # (N,) `policy_rows`
    learning: torch.Tensor  # (N,) `learning_rows`
    sequence_ratio: torch.Tensor | None = None  # (N,) `sequence_log_ratio`; None: ratios of single tokens

    @classmethod
    def of(cls, tokens: PolicyTokens, weights: torch.Tensor, options: PolicyOptions) -> PolicyTokenLoss:
        policy = policy_rows(tokens)
        return cls(tokens, weights, options, policy, learning_rows(tokens, options, policy))

    def __call__(self, logps: torch.Tensor, entropy: torch.Tensor | None, rows: torch.Tensor):
        learning, weights = self.learning[rows], self.weights[rows]
        policy = learning if self.policy is self.learning else self.policy[rows]
        ratio = None if self.sequence_ratio is None else self.sequence_ratio[rows]
        found = token_losses(logps, entropy, self.tokens.at(rows), policy, self.options, ratio)
        # Not 0 * NaN from a row that only statistics look at.
        return tuple(None if t is None else torch.where(learning, t * weights, 0.0) for t in found)


def token_losses(
    logps: torch.Tensor,
    entropy: torch.Tensor | None,
    tokens: PolicyTokens,
    policy: torch.Tensor,
    options: PolicyOptions,
    sequence_ratio: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses (n,) of learning rows before aggregation, d loss / d logps (n,), d loss / d entropy (n,) or None.

    Args:
        logps: (n,). entropy: (n,), read only for an exact entropy term.
        tokens: entries at the same n rows, all inside the response. policy: their `policy_rows`.
        sequence_ratio: (n,) at these rows. Its gradient is each token's own (GSPO-token's stop-gradient form).
    """
    advantages = torch.where(policy, tokens.advantages, 0.0)
    if tokens.old_logps is None:
        log_ratio = torch.zeros_like(logps)
    else:
        log_ratio = torch.where(policy, logps - tokens.old_logps if sequence_ratio is None else sequence_ratio, 0.0)
    term = cispo_surrogate if options.surrogate == "cispo" else clipped_surrogate
    surrogate, slope = term(logps, log_ratio, advantages, options)
    if tokens.sampler_weights is not None:
        weights = torch.where(policy, tokens.sampler_weights, 0.0)
        surrogate, slope = surrogate * weights, slope * weights
    losses, d_logps, d_entropy = -surrogate, -slope, None
    if options.kl_coef != 0.0:
        kl, slope = kl_divergence(logps, tokens.ref_logps, options.kl_estimator)
        losses, d_logps = losses + options.kl_coef * kl, d_logps + options.kl_coef * slope
    if options.entropy_coef != 0.0:
        in_scope = tokens.response if options.entropy_scope == "response" else tokens.perception
        coef = in_scope.to(logps.dtype) * options.entropy_coef
        if options.entropy_kind == "exact":
            losses, d_entropy = losses - torch.where(in_scope, entropy, 0.0) * coef, -coef
        else:  # -logp in the entropy's place
            losses, d_logps = losses + torch.where(in_scope, logps, 0.0) * coef, d_logps + coef
    return losses, d_logps, d_entropy


def clipped_surrogate(
    logps: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, options: PolicyOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r A, clip(r) A), for A < 0 at least dual_clip * A, and its derivative by the log-ratio. Args (n,)."""
    saturated = log_ratio > MAX_LOG_RATIO
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    rises = advantages > 0
    # The minimum takes the clipped branch above for A > 0 and below for A < 0, and nowhere else.
    clips = torch.where(rises, ratio > high, ratio < low)
    unclipped = ratio * advantages
    surrogate = torch.where(clips, ratio.clamp(low, high) * advantages, unclipped)
    slope = torch.where(clips | saturated, 0.0, unclipped)
    if options.dual_clip is None:
        return surrogate, slope
    floor = options.dual_clip * advantages
    below = ~rises & (surrogate < floor)
    return torch.where(below, floor, surrogate), torch.where(below, 0.0, slope)


def cispo_surrogate(
    logps: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, options: PolicyOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped ratio, a constant, times A logp, whose derivative by logp no clip takes away. Args (n,)."""
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    slope = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high) * advantages
    return slope * logps, slope


def kl_divergence(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An estimate of KL(policy || reference) from sampled tokens, and its derivative by logps. Args (n,)."""
    gap = ref_logps - logps
    saturated = gap > MAX_LOG_RATIO
    gap = torch.where(saturated, MAX_LOG_RATIO, gap)
    if estimator == "k1":
        kl, slope = -gap, torch.ones_like(gap)
    elif estimator == "k2":
        kl, slope = gap.square() / 2, -gap
    else:
        rise = gap.expm1()
        kl, slope = rise - gap, -rise
    return kl, torch.where(saturated, 0.0, slope)
