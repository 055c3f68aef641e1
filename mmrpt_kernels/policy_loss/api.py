"""The public functions `linear_policy_loss` and `linear_token_loss`."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from mmrpt_kernels.common import checks
from mmrpt_kernels.common.autocast import autocast_dtype, cast_to, dtypes_of
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions, as_wide, check_compact, check_head, select_backend
from mmrpt_kernels.lm_head.sparse_vocab import skip_threshold
from mmrpt_kernels.lm_head.vocab_parallel import group_name, local_head
from mmrpt_kernels.logprobs.api import linear_logprobs
from mmrpt_kernels.policy_loss import fused, operator, reference
from mmrpt_kernels.policy_loss.checks import check_options, gather_tokens, loss_weights
from mmrpt_kernels.policy_loss.options import PolicyOptions
from mmrpt_kernels.policy_loss.statistics import policy_statistics
from mmrpt_kernels.policy_loss.surrogate import PolicyTokenLoss
from mmrpt_kernels.policy_loss.token_loss import DifferentiatedTokenLoss, TokenLoss, check_losses


class PolicyLoss(NamedTuple):
    """loss: scalar, differentiable in hidden, weight and bias. The rest are constants for logging.

    logps (B, T) and entropy (B, T): 0 where not computed. With return_statistics=False they cover the tokens that can
    learn, and entropy is None unless an exact entropy term needs it.
    """

    loss: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor | None
    statistics: dict[str, torch.Tensor]


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    *,
    response_mask: torch.Tensor,
    perception_mask: torch.Tensor | None = None,
    trajectory_weights: torch.Tensor | None = None,
    old_logps: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    sampler_weights: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    entropy_scope: str = "response",
    entropy_kind: str = "exact",
    ratio_level: str = "token",
    surrogate: str = "clip",
    aggregation: str = "token_mean",
    normalizer: torch.Tensor | float | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_statistics: bool = False,
    chunk_size: int | None = None,
    compact: bool = True,
    skip_below: float | str | None = None,
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> PolicyLoss:
    """Clipped policy-gradient loss straight from hidden states: no (N, V) logits, no work for tokens without gradient.

        A' = trajectory_weight * advantage          r = exp(logp - old_logp)
        surrogate = min(r A', clip(r, 1 - clip_low, 1 + clip_high) A'),  and for A' < 0: max(surrogate, dual_clip A')
                    or, "cispo": constant(clip(r)) A' logp, whose gradient no clip takes away
        token = response * (-perception * sampler_weight * surrogate + kl_coef * kl - entropy_coef * entropy)
        loss = aggregate(token)

    The gradients of hidden, weight and bias are made in this call, chunk by chunk, each logit made once; `backward`
    multiplies them by the incoming number, in place, and can run once per call.

    The family by its settings: PPO, GRPO and DAPO as they stand (clip_high=0.28, "token_mean"); Dr.GRPO normalizer = B
    times the longest response, so that no length divides; GSPO ratio_level="sequence" with "sequence_mean" and clips of
    3e-4; CISPO surrogate="cispo"; REINFORCE old_logps=None. Supervised cross-entropy has the gradient of advantages = 1
    with old_logps=None; `linear_token_loss(..., lambda logps, entropy, rows: -logps)` gives its value as well.

    Args:
        hidden: (B, T, H) half, bfloat16, float32 or float64. weight: (V, H). bias: (V,) or None. These three get
            gradients (under autocast as in `linear_logprobs`); all other tensors are constants.
        targets: (B, T) int64. `ignore_index` takes a token out of the response.
        advantages: (B,) or (B, T). A token of advantage 0 has no policy term.
        response_mask: (B, T) bool, the tokens the loss averages over. What masked tokens hold, NaN included, never
            matters; their gradient is exactly zero.
        perception_mask: (B, T) bool, the tokens with a policy term (VPPO's filter); None: all of the response.
        trajectory_weights: (B,), VPPO's advantage shaping.
        old_logps: (B, T) of the policy that sampled; None: strictly on-policy, r = 1 with its gradient kept.
        ref_logps: (B, T) of the reference model, for kl_coef (over all response tokens) and its statistic.
        kl_estimator: "k1" logp - ref, "k2" (logp - ref)^2 / 2, "k3" exp(ref - logp) - (ref - logp) - 1.
        sampler_weights: (B, T) truncated importance weights for an engine whose log-probs differ; scale the surrogate.
        clip_low, clip_high: in [0, 1] and >= 0 (inf: no upper clip). dual_clip: > 1, or None.
        entropy_coef: > 0 rewards entropy, < 0 penalises it. entropy_scope: "response" or "kept" (perception_mask), so
            that other tokens cost nothing. entropy_kind: "exact", or "sampled" = -logp (VPPO's published code).
        ratio_level: "token", or "sequence" (GSPO): r is exp of the response's mean log-ratio as a value, each token
            pulling its own log-prob (GSPO-token's stop-gradient form), so that filtered tokens stay without gradient.
            Makes the logits twice of the tokens whose sequence is not clipped.
        surrogate: "clip", or "cispo" (arXiv 2506.13585), which takes no dual_clip; the ratio's level is ratio_level.
        aggregation: "token_mean" over response tokens, "sequence_mean" the mean over non-empty sequences of their token
            means, "sum".
        normalizer: number or 0-d tensor, on the CPU or where hidden is, that replaces the aggregation's own count
            (tokens, sequences, 1): across ranks and micro-batches the caller's number.
        temperature, softcap, logit_scale: of the logits, as in `linear_logprobs`.
        return_statistics: True: also log-probs and entropies of response tokens that get no gradient, at the price of
            their forward product. False: only tokens with a gradient are computed, and statistics cover them alone.
        chunk_size: rows of logits held at once; None: from a memory budget.
        compact: True: compute the rows that count and no others, after one wait for the device to count them (sequence
            ratios: two). False: compute all rows, without a wait, as CUDA graphs need it. Same results.
        skip_below: None (exact gradients), "auto" or a share of the gradient: as in `linear_logprobs`.
        backend: "cuda", "triton", "portable", "reference" or None for the table's choice.
        vocab_group: process group over which the vocabulary is cut, as in `linear_logprobs`: weight and bias are this
            rank's words, everything else the same on all ranks; d hidden, made in this call, is the sum over ranks.

    Log-ratios above 80 count as 80, with gradient zero, where float32's exp would overflow.

    Returns:
        PolicyLoss. statistics, means over response tokens, or without return_statistics over those that can learn:
        logp_mean, max_logp (a fused head that works gives <= 0), entropy_mean (where entropies are known), ratio_mean,
        ratio_max, approx_kl (k3 of old against new), ref_kl (k3, when ref_logps are given). tokens and kept_fraction
        are of the response, clip_fraction_low and _high shares of the tokens with a policy term.

    Raises:
        ValueError: a shape, dtype, device or setting that cannot be meant; on a CPU also a target outside [0, V).
        BackendError: `backend` cannot serve the call.
    """
    checks.check(
        isinstance(hidden, torch.Tensor) and hidden.dim() == 3,
        f"hidden: got shape {tuple(hidden.shape)}, expected (B, T, H); keep the batch dimension, hidden[None] for one",
    )
    head = HeadOptions(float(temperature), float(softcap), float(logit_scale))
    dual_clip = None if dual_clip is None else float(dual_clip)
    clips, terms = (float(clip_low), float(clip_high), dual_clip), (float(entropy_coef), entropy_scope, entropy_kind)
    options = PolicyOptions(float(kl_coef), kl_estimator, *clips, *terms, ratio_level, surrogate)
    weight, bias, vocab_group = local_head(hidden, targets, weight, bias, vocab_group)
    check_head(hidden, weight, bias, targets, head, chunk_size, part=vocab_group is not None)
    check_compact(compact)
    check_options(options, aggregation, normalizer, ref_logps, hidden)
    dtype = statistics_dtype(hidden, weight, bias)
    tokens = gather_tokens(
        hidden,
        targets,
        dtype,
        ignore_index=ignore_index,
        advantages=advantages,
        response_mask=response_mask,
        perception_mask=perception_mask,
        trajectory_weights=trajectory_weights,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampler_weights=sampler_weights,
    )
    weights = loss_weights(tokens.response, aggregation, normalizer, dtype)
    token_loss = PolicyTokenLoss.of(tokens.flat(), weights.reshape(-1), options)
    name = select_backend("policy_loss", hidden, weight, bias, backend, vocab_group)
    hidden, cast = as_wide(hidden, weight, bias), autocast_dtype(hidden)
    if name == "reference":
        hidden, weight, bias = cast_to(cast, hidden, weight, bias)
        loss, logps, entropy = reference.linear_policy_loss(
            hidden, weight, targets, bias, head, tokens, options, aggregation, normalizer, return_statistics
        )
    else:
        skipped = skip_threshold(skip_below, dtypes_of(hidden, weight, cast=cast), compact)
        loop = LoopOptions(name, chunk_size, compact, skipped, group_name(vocab_group), cast)
        loss, logps, entropy = _fused((hidden, weight, bias), targets, token_loss, return_statistics, head, loop)
    if not (return_statistics or options.entropy_learns):
        entropy = None
    logps, entropy = (None if t is None else t.detach().reshape(-1) for t in (logps, entropy))
    seen = token_loss.tokens.response if return_statistics else token_loss.learning
    statistics = policy_statistics(logps, entropy, token_loss, seen, tuple(targets.shape))
    logps, entropy = (None if t is None else t.view(targets.shape) for t in (logps, entropy))
    return PolicyLoss(loss, logps, entropy, statistics)


def _fused(tensors, targets, token_loss: PolicyTokenLoss, see_all: bool, head: HeadOptions, loop: LoopOptions):
    """loss, logps (N,), entropy (N,) or None. Compiled: a custom operator, whose backward saves a copy of d weight."""
    need = checks.gradients_wanted(*tensors)
    if not torch.compiler.is_compiling():
        settings = {"token_loss": token_loss, "see_all": see_all, "need": need, "options": head, "loop": loop}
        return fused.FusedLoss.apply(*tensors, partial(fused.policy_loss, targets=targets, **settings))
    tokens = (*token_loss.tokens, token_loss.weights)
    call = (*tensors, targets, see_all, list(need), *tokens, *token_loss.options, *head, *loop)
    loss, logps, entropy, *_ = operator.linear_policy_loss(*call)
    return loss, logps, entropy if entropy.shape == logps.shape else None


def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: TokenLoss,
    *,
    active_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    use_entropy: bool = True,
    chunk_size: int | None = None,
    compact: bool = True,
    skip_below: float | str | None = None,
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Sum over tokens of any loss of (log-prob, entropy), fused with the lm head: no (N, V) logits.

        loss = sum_i token_loss(logp_i, entropy_i, i)

    `token_loss(logps (n,), entropy (n,), rows (n,) int64) -> (n,)` is called once a chunk with rows, the tokens' flat
    indices into targets, by which it finds its own per-token tensors. It must be row-local (entry i depends on row i
    alone) and differentiable by autograd. Example, a focal cross-entropy:

        linear_token_loss(hidden, weight, targets, lambda logps, entropy, rows: -(1 - logps.exp()) ** 2 * logps)

    The gradients are made in this call, each logit made once; `backward` scales them and can run once per call.
    Under torch.compile, where a Python callable cannot enter an operator, the same sum is built as `linear_logprobs`
    followed by token_loss over all rows at once: one matrix product more, no graph break.

    Args:
        hidden: (..., H). weight: (V, H). bias: (V,) or None. These three get gradients; a tensor captured by
            token_loss that requires a gradient is refused, as it would get none.
        targets: (...) int64; rows of `ignore_index` are left out.
        active_mask: (...) bool; rows outside are not computed. None: all rows.
        temperature, softcap, logit_scale, chunk_size, skip_below, backend, vocab_group: as in `linear_logprobs`; over a
            group, token_loss must give the same on all ranks.
        compact: as there, counting active rows; unless it is True, token_loss also sees other rows, with log-prob and
            entropy 0, and what it makes of them does not count.
        use_entropy: False: token_loss gets None for the entropy, which is then not computed.

    Returns:
        Scalar, float32 (float64 for float64 inputs), differentiable in hidden, weight and bias.

    Raises:
        ValueError: arguments that cannot be meant; a token_loss that gives another shape than (n,) or whose result
            depends on a foreign tensor that requires a gradient.
        BackendError: `backend` cannot serve the call.
    """
    options = HeadOptions(float(temperature), float(softcap), float(logit_scale))
    weight, bias, vocab_group = local_head(hidden, targets, weight, bias, vocab_group)
    check_head(hidden, weight, bias, targets, options, chunk_size, part=vocab_group is not None)
    check_compact(compact)
    if active_mask is not None:
        checks.check_shape("active_mask", active_mask, tuple(targets.shape), "(...): one bool per token")
        checks.check_dtype("active_mask", active_mask, (torch.bool,))
    checks.check_same_device(hidden=hidden, active_mask=active_mask)
    name = select_backend("token_loss", hidden, weight, bias, backend, vocab_group)
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    active = ids != ignore_index
    if active_mask is not None:
        active = active & active_mask.reshape(-1)
    if torch.compiler.is_compiling():
        options_of_head = {"bias": bias, "vocab_group": vocab_group, **options._asdict()}
        options_of_loop = {"chunk_size": chunk_size, "compact": compact, "skip_below": skip_below, "backend": name}
        log_probs = partial(linear_logprobs, return_entropy=use_entropy, **options_of_head, **options_of_loop)
        return _token_loss_in_two_steps(flat, weight, ids, active, token_loss, log_probs)
    flat, cast = as_wide(flat, weight, bias), autocast_dtype(hidden)
    need = checks.gradients_wanted(flat, weight, bias)
    differentiated = DifferentiatedTokenLoss(token_loss, use_entropy, any(need))
    if name == "reference":
        flat, weight, bias = cast_to(cast, flat, weight, bias)
        rows = active.nonzero().squeeze(-1)
        arguments = (rows, differentiated.losses, use_entropy)
        return reference.linear_token_loss(flat, weight, ids, bias, options, *arguments)
    skipped = skip_threshold(skip_below, dtypes_of(flat, weight, cast=cast), compact)
    loop = LoopOptions(name, chunk_size, compact, skipped, group_name(vocab_group), cast)
    settings = {"token_loss": differentiated, "need": need, "options": options, "loop": loop}
    compute = partial(fused.token_loss, targets=ids, active=active, **settings)
    return fused.FusedLoss.apply(flat, weight, bias, compute)[0]


def _token_loss_in_two_steps(flat, weight, ids, active, token_loss, log_probs) -> torch.Tensor:
    """log-probs of all rows (N,), then the caller's function on them: what a compiler can trace without a break."""
    found = log_probs(flat, weight, torch.where(active, ids, -100), ignore_index=-100)
    losses = token_loss(found.logps, found.entropy, torch.arange(ids.shape[0], device=ids.device))
    check_losses(losses, found.logps)
    return torch.where(active, losses, 0.0).sum()
