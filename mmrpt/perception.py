"""How much each sampled token depends on the image (VPPO, steps 1 to 4): score, then weights and the token filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmrpt.batching import response_slices
from mmrpt.policy import Policy
from mmrpt.types import PixelBatch
from mmrpt_kernels import PerceptionWeights, linear_token_divergence, perception_weights

__all__ = ["PerceptionWeights", "shape_and_filter", "token_perception"]


@torch.no_grad()
def token_perception(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sequence[int]]],
    perturbed: PixelBatch,
    image_index: Sequence[int],
    clean_hidden: Tensor,
    *,
    kind: Literal["kl", "k3", "js"] = "kl",
    temperature: float = 1.0,
) -> Tensor:
    """S(s_t) = KL( pi(. | q, o_<t, I) || pi(. | q, o_<t, I') ) for every response token: (N, T) float32 >= 0.

    `groups[i]` are the responses to prompt i, `image_index[i]` its image among the perturbed ones; N counts all
    responses, a prompt's beside each other. `clean_hidden` (N, T, H) is what the rollout saw with the true image, so
    only the perturbed view is computed here. Tokens past a row's end score 0.
    """
    batch = policy.group_batch(prompts, groups, perturbed, image_index)
    hidden, targets, mask = response_slices(policy.hidden(batch), batch)
    clean = clean_hidden[:, : hidden.shape[1]]
    scores = torch.zeros(mask.shape, device=hidden.device)
    result = linear_token_divergence(
        clean[mask],
        hidden[mask],
        policy.head_weight,
        targets=targets[mask] if kind == "k3" else None,
        kind=kind,
        bias=policy.sampling_bias(),
        temperature=temperature,
    )
    scores[mask] = result.divergence.float()
    return scores


def shape_and_filter(
    scores: Tensor, response_mask: Tensor, *, keep_ratio: float, min_weight: float
) -> PerceptionWeights:
    """Which tokens carry gradient and how a trajectory's advantage is scaled, over the whole batch."""
    return perception_weights(scores, response_mask, keep_ratio=keep_ratio, min_weight=min_weight)
