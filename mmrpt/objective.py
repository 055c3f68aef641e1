"""The two losses: next-token loss for the warm-up, and the perception-filtered clipped loss of the RL phase."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrpt.batching import response_slices, split_rows
from mmrpt.policy import Policy
from mmrpt.settings import RLSettings
from mmrpt.types import Batch, PolicyTargets
from mmrpt_kernels import PolicyLoss, linear_logprobs, linear_policy_loss, linear_token_loss
from mmrpt_kernels.common.autocast import cast_for_autocast
from mmrpt_kernels.integrations.transformers import record_visual_mass
from mmrpt_kernels.lm_head import gemm

# rl.loss: the operator's surrogate and the level of its ratio.
SURROGATES = {"clip": ("clip", "token"), "gspo": ("clip", "sequence"), "cispo": ("cispo", "token")}


def supervised_loss(policy: Policy, batch: Batch, *, padded: bool = False) -> Tensor:
    """Negative log-probability of the response tokens through the fused head: mean over rows of their token means.

    A caption has five times the tokens of a restored span; with a plain token mean the spans would hardly count.
    `padded` as in `Policy.hidden`.
    """
    hidden, targets, mask = response_slices(policy.hidden(batch, padded=padded), batch)
    shares = (mask / mask.sum(-1, keepdim=True) / mask.shape[0]).flatten()
    with policy.autocast():
        return linear_token_loss(
            hidden,
            policy.head_weight,
            targets,
            lambda logps, entropy, rows: -logps * shares[rows],
            active_mask=mask,
            bias=policy.head_bias,
        )


def supervised_loss_with_masses(
    policy: Policy, batch: Batch, key_weights: Tensor, layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The supervised loss, and the attention masses (L, R, Hq, T, G) of layers on groups of keys, `key_weights`
    (R, T, G) float32. Both are differentiable."""
    record = record_visual_mass(
        policy.model, key_weights=key_weights, layers=layers, head_reduction="none", differentiable=True
    )
    with record as found:
        loss = supervised_loss(policy, batch, padded=True)
    return loss, found.stacked()


def supervised_backward(policy: Policy, batch: Batch, batch_tokens: int, weight: float = 1.0) -> float:
    """Adds the gradients of `weight` times the supervised loss, at most `batch_tokens` tokens at a time; the loss."""
    total = 0.0
    for part in split_rows(batch, batch_tokens):
        loss, share = supervised_loss(policy, part), len(part.input_ids) / len(batch.input_ids)
        (weight * share * loss).backward()
        total += share * loss.item()
    return total


def policy_loss(
    policy: Policy,
    batch: Batch,
    targets: PolicyTargets,
    settings: RLSettings,
    *,
    normalizer: float,
    temperature: float,
    statistics: bool = False,
) -> PolicyLoss:
    """The clipped surrogate of a micro-batch, divided by the whole step's normaliser so that micro-batches add up.

    statistics: of all response tokens, also those without a gradient.
    """
    hidden, ids, mask = response_slices(policy.hidden(batch), batch)
    surrogate, ratio_level = SURROGATES[settings.loss]

    def cut(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows[:, : mask.shape[1]]

    with policy.autocast():
        return linear_policy_loss(
            hidden,
            policy.head_weight,
            ids,
            targets.advantages,
            response_mask=mask,
            perception_mask=cut(targets.perception_mask),
            trajectory_weights=targets.trajectory_weights,
            old_logps=cut(targets.old_logps),
            ref_logps=cut(targets.ref_logps),
            kl_coef=settings.kl_coef,
            sampler_weights=cut(targets.sampler_weights),
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            entropy_coef=settings.entropy_coef,
            # VPPO penalises the whole response. An exact entropy of tokens without a gradient would cost their product.
            entropy_scope="response" if settings.entropy_kind == "sampled" else "kept",
            entropy_kind=settings.entropy_kind,
            ratio_level=ratio_level,
            surrogate=surrogate,
            aggregation="sequence_mean" if settings.aggregation == "sequence_mean" else "sum",
            normalizer=normalizer,
            bias=policy.sampling_bias(),
            temperature=temperature,
            return_statistics=statistics,
        )


def loss_normalizer(settings: RLSettings, *, tokens: int, responses: int, max_new_tokens: int) -> float:
    """What a step's summed loss is divided by. Dr.GRPO's is the same at any length of the responses (arXiv 2503.20783,
    which divides by the generation budget): it takes the place of the token mean."""
    if settings.advantage == "dr_grpo":
        return float(responses * max_new_tokens)
    return float({"token_mean": tokens, "sequence_mean": responses, "sum": 1}[settings.aggregation])


@torch.no_grad()
def response_logps(policy: Policy, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """(N, T) float32 log-probs of the batch's responses as a training step computes them, 0 past a row's end."""
    hidden, targets, mask = response_slices(policy.hidden(batch), batch)
    logps = torch.zeros(mask.shape, device=hidden.device)
    with policy.autocast():
        found = linear_logprobs(
            hidden[mask], policy.head_weight, targets[mask], bias=policy.sampling_bias(), temperature=temperature
        )
    logps[mask] = found.logps.float()
    return logps


@torch.no_grad()
def sampling_logits(policy: Policy, hidden: Tensor, bias: Tensor) -> Tensor:
    """(R, V) float32 of hidden states (R, H): the product that the losses make, never rounded to half precision, and
    the policy's `sampling_bias`."""
    with policy.autocast():
        hidden, weight = cast_for_autocast(hidden, policy.head_weight)
    return gemm.logits(hidden, weight).add_(bias)


def importance_weights(trainer_logps: Tensor, sampler_logps: Tensor, largest: float) -> Tensor:
    """Truncated importance weights min(pi_trainer / pi_sampler, `largest`) of the tokens that were sampled."""
    return (trainer_logps - sampler_logps).exp().clamp(max=largest)
