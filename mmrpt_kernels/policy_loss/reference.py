"""The definition of `linear_policy_loss`: full logits, plain PyTorch, autograd, (B, T) tensors throughout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmrpt_kernels.lm_head.options import HeadOptions
from mmrpt_kernels.logprobs import reference as logprobs_reference
from mmrpt_kernels.policy_loss.options import MAX_LOG_RATIO, PolicyOptions, PolicyTokens

IGNORED = -1  # never a word


def log_ratio(logps: torch.Tensor, tokens: PolicyTokens, options: PolicyOptions) -> torch.Tensor:
    """log r (B, T). "sequence" (GSPO): the response's mean log-ratio as a value, each token's own as a gradient."""
    if tokens.old_logps is None:
        return logps - logps.detach()
    by_sequence = options.ratio_level == "sequence"
    read = tokens.response if by_sequence else has_policy_term(tokens)
    own = torch.where(read, logps - tokens.old_logps, 0.0)
    if by_sequence:
        length = tokens.response.sum(-1, keepdim=True).clamp(min=1)
        # Not own - own.detach(): a token that the old policy ruled out has an infinite one.
        own = logps - logps.detach() + own.detach().sum(-1, keepdim=True) / length
    return torch.where(own > MAX_LOG_RATIO, MAX_LOG_RATIO, own)


def kl_to_reference(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: str) -> torch.Tensor:
    """Schulman's estimators of KL(policy || reference) from sampled tokens (B, T)."""
    gap = ref_logps - logps
    gap = torch.where(gap > MAX_LOG_RATIO, MAX_LOG_RATIO, gap)
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return gap**2 / 2
    return torch.exp(gap) - gap - 1


def loss_per_token(
    logps: torch.Tensor, entropy: torch.Tensor, tokens: PolicyTokens, options: PolicyOptions
) -> torch.Tensor:
    """-perception * surrogate + kl_coef * kl - entropy_coef * entropy, (B, T), 0 outside the response.

    A token whose advantage is zero has no policy term. All arguments (B, T).
    """
    ratio = log_ratio(logps, tokens, options).exp()
    advantages = torch.where(has_policy_term(tokens), tokens.advantages, 0.0)
    clipped_ratio = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    if options.surrogate == "cispo":
        surrogate = clipped_ratio.detach() * advantages * logps
    else:
        surrogate = torch.min(ratio * advantages, clipped_ratio * advantages)
    if options.dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.max(surrogate, options.dual_clip * advantages), surrogate)
    if tokens.sampler_weights is not None:
        surrogate = tokens.sampler_weights * surrogate
    loss = -torch.where(has_policy_term(tokens), surrogate, 0.0)
    if options.kl_coef != 0:
        loss = loss + options.kl_coef * kl_to_reference(logps, tokens.ref_logps, options.kl_estimator)
    if options.entropy_coef != 0:
        term = entropy if options.entropy_kind == "exact" else -logps
        scope = tokens.perception if options.entropy_scope == "kept" else tokens.response
        loss = loss - options.entropy_coef * torch.where(scope, term, 0.0)
    return torch.where(tokens.response, loss, 0.0)


def has_policy_term(tokens: PolicyTokens) -> torch.Tensor:
    """(B, T) bool."""
    has = tokens.response & tokens.perception & (tokens.advantages != 0)
    return has if tokens.sampler_weights is None else has & (tokens.sampler_weights != 0)


def has_gradient(tokens: PolicyTokens, options: PolicyOptions) -> torch.Tensor:
    """(B, T) bool: tokens whose loss can depend on the model; the others' hidden states must not matter at all."""
    has = has_policy_term(tokens)
    if options.kl_coef != 0 or (options.entropy_coef != 0 and options.entropy_scope == "response"):
        has = tokens.response
    elif options.entropy_coef != 0:
        has = has | (tokens.response & tokens.perception)
    return has


def aggregate(
    losses: torch.Tensor, response: torch.Tensor, aggregation: str, normalizer: torch.Tensor | float | None
) -> torch.Tensor:
    """Scalar from per-token losses (B, T): token_mean, sequence_mean (sequences without tokens left out) or sum."""
    lengths = response.sum(-1)
    if aggregation == "token_mean":
        total, count = losses.sum(), lengths.sum()
    elif aggregation == "sequence_mean":
        total, count = (losses.sum(-1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
    else:
        total, count = losses.sum(), torch.ones_like(lengths.sum())
    return total / (count.clamp(min=1) if normalizer is None else normalizer)


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    head: HeadOptions,
    tokens: PolicyTokens,
    options: PolicyOptions,
    aggregation: str,
    normalizer: torch.Tensor | float | None,
    return_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss (scalar), logps (B, T), entropy (B, T); hidden (B, T, H), the tensors of `tokens` (B, T)."""

    def log_probs(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.where(wanted, targets, IGNORED)
        return logprobs_reference.linear_logprobs(hidden, weight, chosen, bias, head, IGNORED, True)

    learns = has_gradient(tokens, options)
    logps, entropy = log_probs(learns)
    if return_statistics or options.ratio_level == "sequence":
        with torch.no_grad():
            seen_logps, seen_entropy = log_probs(tokens.response & ~learns)
        logps, entropy = logps + seen_logps, entropy + seen_entropy
    losses = torch.where(learns, loss_per_token(logps, entropy, tokens, options), 0.0)
    return aggregate(losses, tokens.response, aggregation, normalizer), logps, entropy


def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    head: HeadOptions,
    rows: torch.Tensor,
    token_loss: Callable,
    want_entropy: bool,
) -> torch.Tensor:
    """Sum of token_loss(logps, entropy, rows) over rows (n,); hidden (N, H), targets (N,)."""
    logps, entropy = logprobs_reference.linear_logprobs(
        hidden[rows], weight, targets[rows], bias, head, IGNORED, want_entropy
    )
    return token_loss(logps, entropy, rows).sum()
