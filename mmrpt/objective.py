"""The two losses: next-token loss for the warm-up, and the perception-filtered clipped loss of the RL phase."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmrpt.batching import response_slices
from mmrpt.policy import Policy
from mmrpt.settings import RLSettings
from mmrpt.types import Batch
from mmrpt_kernels import PolicyLoss, linear_policy_loss, linear_token_loss


@dataclass(frozen=True)
class PolicyTargets:
    """What a step knows of its rollouts, all (R, T) unless said: written by the trainer from its group buffer."""

    advantages: Tensor  # (R,)
    old_logps: Tensor
    perception_mask: Tensor | None  # bool
    trajectory_weights: Tensor | None  # (R,)


def supervised_loss(policy: Policy, batch: Batch) -> Tensor:
    """Negative log-probability of the response tokens through the fused head: mean over rows of their token means.

    A caption has five times the tokens of a restored span; with a plain token mean the spans would hardly count.
    """
    hidden, targets, mask = response_slices(policy.hidden(batch), batch)
    shares = (mask / mask.sum(-1, keepdim=True) / mask.shape[0]).flatten()
    return linear_token_loss(
        hidden, policy.head_weight, targets, lambda logps, entropy, rows: -logps * shares[rows], active_mask=mask
    )


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
    width = mask.shape[1]
    kept = targets.perception_mask
    return linear_policy_loss(
        hidden,
        policy.head_weight,
        ids,
        targets.advantages,
        response_mask=mask,
        perception_mask=None if kept is None else kept[:, :width],
        trajectory_weights=targets.trajectory_weights,
        old_logps=targets.old_logps[:, :width],
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        entropy_coef=settings.entropy_coef,
        entropy_scope="kept",
        aggregation="sum" if settings.aggregation == "token_mean" else settings.aggregation,
        normalizer=normalizer,
        bias=policy.sampling_bias(),
        temperature=temperature,
        return_statistics=statistics,
    )
