"""The surrogate: n numbers in, n numbers out, plain PyTorch. All that the fused loss knows of PPO stands here.

`token_losses` gives the per-token loss from log-probs and entropies; `differentiate` gives the two coefficients per
token that the stream back over the vocabulary needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmrpt_kernels.policy_loss.options import MAX_LOG_RATIO, PolicyOptions, PolicyTokens

__all__ = ["differentiate", "learning_rows", "policy_rows", "sequence_log_ratio", "token_losses"]

TokenLoss = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]

# A custom operator's body runs with these keys switched off, torch.enable_grad or not.
AUTOGRAD_KEYS = ("AutogradOther", "AutogradCPU", "AutogradCUDA", "AutogradXPU", "AutogradMPS", "ADInplaceOrView")


def policy_rows(tokens: PolicyTokens) -> torch.Tensor:
    """bool, as the tensors of `tokens`: where the clipped surrogate counts. A zero advantage has no policy term."""
    rows = tokens.response & tokens.perception & (tokens.advantages != 0)
    return rows if tokens.sampler_weights is None else rows & (tokens.sampler_weights != 0)


def learning_rows(tokens: PolicyTokens, options: PolicyOptions) -> torch.Tensor:
    """bool, as the tensors of `tokens`: where the loss can be other than zero, known before any logit is."""
    if options.kl_coef != 0.0:
        return tokens.response
    if options.entropy_coef != 0.0:
        return tokens.response if options.entropy_scope == "response" else tokens.response & tokens.perception
    return policy_rows(tokens)


def sequence_log_ratio(logps: torch.Tensor, tokens: PolicyTokens, shape: tuple[int, int]) -> torch.Tensor:
    """(N,) the mean over its response of log pi / pi_old, for every token; logps (N,) with N = B * T."""
    gaps = torch.where(tokens.response, logps - tokens.old_logps, 0.0).view(shape)
    lengths = tokens.response.view(shape).sum(1, keepdim=True).clamp_min(1)
    return (gaps.sum(1, keepdim=True) / lengths).expand(shape).reshape(-1)


def saturate(log_ratio: torch.Tensor) -> torch.Tensor:
    """At most MAX_LOG_RATIO, with gradient zero there; unlike clamp's, a NaN's gradient stays NaN and is seen."""
    return torch.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)


def clipped_surrogate(log_ratio: torch.Tensor, advantages: torch.Tensor, options: PolicyOptions) -> torch.Tensor:
    """min(r A, clip(r) A), and for A < 0 at least dual_clip * A. Args (n,)."""
    ratio = saturate(log_ratio).exp()
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    rises = advantages > 0
    # The minimum takes the clipped branch above for A > 0 and below for A < 0, and nowhere else.
    clips = torch.where(rises, ratio > high, ratio < low)
    surrogate = torch.where(clips, ratio.clamp(low, high), ratio) * advantages
    if options.dual_clip is None:
        return surrogate
    floor = options.dual_clip * advantages
    return torch.where(~rises & (surrogate < floor), floor, surrogate)


def cispo_surrogate(
    logps: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, options: PolicyOptions
) -> torch.Tensor:
    """The clipped ratio, a constant, times A logp: every token keeps a gradient. Args (n,)."""
    ratio = saturate(log_ratio.detach()).exp().clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    return ratio * advantages * logps


def token_losses(
    logps: torch.Tensor,
    entropy: torch.Tensor | None,
    tokens: PolicyTokens,
    options: PolicyOptions,
    sequence_ratio: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per-token losses (n,) of learning rows, before aggregation; differentiable in logps and entropy.

    Args:
        logps: (n,). entropy: (n,), read only for an exact entropy term.
        tokens: entries at the same n rows, all inside the response.
        sequence_ratio: (n,) `sequence_log_ratio` at these rows; None: ratios of single tokens.
    """
    policy = policy_rows(tokens)
    if tokens.old_logps is None:
        log_ratio = logps - logps.detach()
    elif sequence_ratio is None:
        log_ratio = logps - torch.where(policy, tokens.old_logps, logps.detach())
    else:
        log_ratio = logps - logps.detach() + torch.where(policy, sequence_ratio, 0.0)
    advantages = torch.where(policy, tokens.advantages, 0.0)
    if options.surrogate == "cispo":
        surrogate = cispo_surrogate(logps, log_ratio, advantages, options)
    else:
        surrogate = clipped_surrogate(log_ratio, advantages, options)
    if tokens.sampler_weights is not None:
        surrogate = torch.where(policy, tokens.sampler_weights, 0.0) * surrogate
    losses = -surrogate
    if options.kl_coef != 0.0:
        gap = saturate(tokens.ref_logps - logps)
        kl = {"k1": lambda: -gap, "k2": lambda: gap.square() / 2, "k3": lambda: gap.expm1() - gap}
        losses = losses + options.kl_coef * kl[options.kl_estimator]()
    if options.entropy_coef != 0.0:
        term = entropy if options.entropy_kind == "exact" else -logps
        in_scope = tokens.response if options.entropy_scope == "response" else tokens.perception
        losses = losses - options.entropy_coef * torch.where(in_scope, term, 0.0)
    return losses


def differentiate(
    function: TokenLoss, logps: torch.Tensor, entropy: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """function(logps, entropy) (n,) and the derivatives of its sum, d logps (n,) and d entropy (n,) or None.

    Works inside a custom operator, whose body torch runs below autograd: the keys are switched on again around these
    few numbers. A row-local function's derivative is each row's own.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in AUTOGRAD_KEYS:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        leaves = [logps.detach().requires_grad_()]
        if entropy is not None:
            leaves.append(entropy.detach().requires_grad_())
        losses = function(leaves[0], leaves[1] if len(leaves) > 1 else None)
        if not losses.requires_grad:
            return losses, torch.zeros_like(logps), None
        grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    d_logps = torch.zeros_like(logps) if grads[0] is None else grads[0]
    return losses.detach(), d_logps, grads[1] if len(grads) > 1 else None
