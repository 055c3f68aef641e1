"""How much each sampled token depends on the image (VPPO, steps 1 to 4): score, then weights and the token filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmrpt.models import PixelBatch, Policy
from mmrpt_kernels import PerceptionWeights, linear_token_divergence, perception_weights

__all__ = ["PerceptionWeights", "response_slices", "shape_and_filter", "token_perception"]


@torch.no_grad()
def token_perception(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    perturbed: PixelBatch,
    image_index: Sequence[int],
    clean_hidden: Tensor,
    *,
    kind: Literal["kl", "k3", "js"] = "kl",
    temperature: float = 1.0,
) -> Tensor:
    """S(s_t) = KL( pi(. | q, o_<t, I) || pi(. | q, o_<t, I') ) for every response token: (R, T) float32 >= 0.

    `clean_hidden` (R, T, H) is what the rollout saw with the true image, so only the perturbed view is computed here.
    Tokens past a row's end score 0.
    """
    batch = policy.batch(prompts, responses, perturbed, image_index)
    hidden, targets, mask = response_slices(policy.hidden(batch), batch.input_ids, batch.response_mask)
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


def response_slices(hidden: Tensor, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The response alone, moved to the left: (hidden that predicts it (R, T', H), its ids (R, T'), mask (R, T')).

    The state at position t - 1 predicts the token at t. T' is the longest response.
    """
    lengths = response_mask.sum(-1)
    first = response_mask.int().argmax(-1)
    width = int(lengths.max())
    offsets = torch.arange(width, device=hidden.device)
    mask = offsets < lengths[:, None]
    at = (first[:, None] + offsets).clamp_max(input_ids.shape[1] - 1)
    targets = input_ids.gather(1, at).masked_fill(~mask, 0)
    index = (at - 1).clamp_min(0)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index), targets, mask
