"""How much each sampled token depends on the image (VPPO, steps 1 to 4).

A perturbed view of the image, a score for each token, then the trajectories' weights and the token filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mmrpt.batching import response_slices
from mmrpt.perturbation import black_patches, blacken_patches
from mmrpt.policy import Policy
from mmrpt.types import Batch, PixelBatch
from mmrpt_kernels import PerceptionWeights, linear_token_divergence, perception_weights

__all__ = ["PerceptionWeights", "blacken_pixels", "perturbed_picture", "shape_and_filter", "token_perception"]


@torch.no_grad()
def token_perception(
    policy: Policy,
    batch: Batch,
    perturbed: PixelBatch,
    clean_hidden: Tensor | None = None,
    *,
    kind: Literal["kl", "k3", "js"] = "kl",
    temperature: float = 1.0,
) -> Tensor:
    """S(s_t) = KL( pi(. | q, o_<t, I) || pi(. | q, o_<t, I') ) for every response token: (N, T) float32 >= 0.

    N counts the responses of the batch, which shows the true images; `perturbed` are the same ones with patches.
    `clean_hidden` (N, T, H), where it was kept, is what the rollout saw with the true image: then only the perturbed
    view is computed here. Tokens past a row's end score 0.
    """
    view = replace(batch, pixel_values=perturbed.pixel_values)
    hidden, targets, mask = response_slices(policy.hidden(view), view)
    if clean_hidden is None:
        clean_hidden, *_ = response_slices(policy.hidden(batch), batch)
    clean = clean_hidden[:, : hidden.shape[1]]
    scores = torch.zeros(mask.shape, device=hidden.device)
    with policy.autocast():
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


def blacken_pixels(
    pixels: PixelBatch, image_processor: Any, seeds: Sequence[int], *, patch_size: int = 14, probability: float = 0.5
) -> PixelBatch:
    """Processed images with black patches (VPPO's perturbation), each drawn from its seed.

    `patch_size` counts pixels of the resized images, as the model sees them. For an image that the processor does not
    resize this is the same as processing `mmrpt.perturbation.blacken_patches` of it. Raises ValueError where the pixels
    are not rows of patches that `image_processor` made.
    """
    side, merge = image_processor.patch_size, image_processor.merge_size
    unit = side * merge
    # Any black image gives the processor's own value for black.
    black = image_processor(images=[Image.new("RGB", (unit, unit))], return_tensors="pt")["pixel_values"][0]
    expected = (int(pixels.grid_thw.prod(-1).sum()), len(black))
    if pixels.pixel_values.shape != expected:
        raise ValueError(
            f"pixel_values have shape {tuple(pixels.pixel_values.shape)}: expected {expected}, a row of this image "
            "processor for each patch of the grid; give the processor that made them."
        )
    black = black.to(pixels.pixel_values)
    masks = []
    for (frames, rows, columns), seed in zip(pixels.grid_thw.tolist(), seeds, strict=True):
        options = {"seed": seed, "patch_size": patch_size, "probability": probability}
        mask = torch.from_numpy(black_patches(rows * side, columns * side, **options))
        # The processor's order: blocks of merge x merge patches, row by row; within a patch, channel before row.
        mask = mask.view(rows // merge, merge, side, columns // merge, merge, side).permute(0, 3, 1, 4, 2, 5)
        masks.append(mask.reshape(rows * columns, 1, side * side).repeat(frames, 1, 1))
    mask = torch.cat(masks).to(black.device)
    per_pixel = pixels.pixel_values.unflatten(-1, (-1, side * side))  # (patches, channels * temporal, pixels)
    values = torch.where(mask, black.unflatten(-1, (-1, side * side)), per_pixel)
    return PixelBatch(values.flatten(1), pixels.grid_thw)


def perturbed_picture(
    policy: Policy, image: Image.Image, seed: int, *, patch_size: int = 14, probability: float = 0.5
) -> Image.Image:
    """`blacken_pixels` for people: a picture in the size that the processor gives it, with black patches."""
    _, rows, columns = policy.pixels([image]).grid_thw[0].tolist()
    side = policy.image_processor.patch_size
    resized = image.resize((columns * side, rows * side))
    return blacken_patches(resized, seed=seed, patch_size=patch_size, probability=probability)


def shape_and_filter(
    scores: Tensor, response_mask: Tensor, *, keep_ratio: float, min_weight: float, max_weight: float | None = None
) -> PerceptionWeights:
    """Which tokens carry gradient and how a trajectory's advantage is scaled, over the whole batch."""
    return perception_weights(
        scores, response_mask, keep_ratio=keep_ratio, min_weight=min_weight, max_weight=max_weight
    )
