"""How much each sampled token depends on the image (VPPO, steps 1 to 4).

A perturbed view of the image, a score for each token, then the trajectories' weights and the token filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmrpt.batching import response_slices
from mmrpt.policy import Policy
from mmrpt.settings import PerceptionSettings
from mmrpt.types import Batch, Pixels
from mmrpt_kernels import PerceptionWeights, linear_token_divergence, perception_weights
from mmrpt_kernels.integrations.transformers import record_visual_mass

__all__ = ["TokenPerception", "image_share", "score_tokens", "shape_and_filter", "token_mass", "token_perception"]


class TokenPerception(NamedTuple):
    """Both (N, T) float32, 0 past a row's end."""

    scores: Tensor  # >= 0
    gains: Tensor  # log pi(o_t | q, o_<t, I) - log pi(o_t | q, o_<t, I') of the sampled token, in nats; 0 with "mass"


def score_tokens(
    policy: Policy,
    batch: Batch,
    clean_hidden: Tensor | None,
    seeds: Sequence[int],
    options: PerceptionSettings,
    temperature: float,
) -> TokenPerception:
    """What the settings ask of every response token; the patches of each of the batch's images have their own seed."""
    if options.kind == "mass":
        mass = token_mass(policy, batch)
        return TokenPerception(mass, torch.zeros_like(mass))
    patches = {"patch_size": options.patch_size, "probability": options.probability}
    perturbed = policy.perturbed(batch.pixels, seeds, **patches)
    return token_perception(policy, batch, perturbed, clean_hidden, kind=options.kind, temperature=temperature)


@torch.no_grad()
def token_mass(policy: Policy, batch: Batch) -> Tensor:
    """In the place of a divergence, how much the position that predicts each response token attends to the image,
    averaged over heads and the upper half of the layers: (N, T) float32 in [0, 1], 0 past a row's end."""
    depth = policy.model.config.get_text_config().num_hidden_layers
    on_image = batch.input_ids == policy.image_token_id
    with record_visual_mass(policy.model, key_weights=on_image, layers=range(depth // 2, depth)) as record:
        policy.hidden(batch, padded=True)
    mass, _, mask = response_slices(record.stacked().float().mean(0)[..., None], batch)
    return mass[..., 0].masked_fill(~mask, 0.0)


@torch.no_grad()
def token_perception(
    policy: Policy,
    batch: Batch,
    perturbed: Pixels,
    clean_hidden: Tensor | None = None,
    *,
    kind: Literal["kl", "k3", "js"] = "kl",
    temperature: float = 1.0,
) -> TokenPerception:
    """S(s_t) = KL( pi(. | q, o_<t, I) || pi(. | q, o_<t, I') ) for every response token, and what the image adds to the
    log-prob of the token itself.

    N counts the responses of the batch, which shows the true images; `perturbed` are the same ones with patches.
    `clean_hidden` (N, T, H), where it was kept, is what the rollout saw with the true image: then only the perturbed
    view is computed here.
    """
    view = replace(batch, pixels=perturbed)
    hidden, targets, mask = response_slices(policy.hidden(view), view)
    if clean_hidden is None:
        clean_hidden, *_ = response_slices(policy.hidden(batch), batch)
    clean = clean_hidden[:, : hidden.shape[1]]
    scores, gains = torch.zeros(2, *mask.shape, device=hidden.device)
    with policy.autocast():
        result = linear_token_divergence(
            clean[mask],
            hidden[mask],
            policy.head_weight,
            targets=targets[mask],
            kind=kind,
            bias=policy.sampling_bias(),
            temperature=temperature,
        )
    scores[mask] = result.divergence.float()
    gains[mask] = (result.logps_p - result.logps_q).float()
    return TokenPerception(scores, gains)


def image_share(gains: Tensor) -> Tensor:
    """(N,) in [0, 1): the share of a response's probability that is owed to the image, of its tokens' gains (N, T).

    max(0, 1 - pi(o | q, I') / pi(o | q, I)): 0 where the response is as likely with the image perturbed, near 1 where
    it is hardly possible without. Long responses tend to 1, as their gains add up.
    """
    return -torch.expm1(-gains.sum(-1).clamp_min(0.0))


def shape_and_filter(
    scores: Tensor, response_mask: Tensor, *, keep_ratio: float, min_weight: float, max_weight: float | None = None
) -> PerceptionWeights:
    """Which tokens carry gradient and how a trajectory's advantage is scaled, over the whole batch."""
    return perception_weights(
        scores, response_mask, keep_ratio=keep_ratio, min_weight=min_weight, max_weight=max_weight
    )
