"""Pre-training of a vision tower from scratch: it classifies the words of the caption from the image alone.

This stands in for the vision pre-training that a real model's tower brings along (SuperClass, arXiv 2411.03313: the
caption's tokens are the labels, weighted by how rare they are). The classifier is the lm head itself, so the features
are in the decoder's own space of words from the start.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmrpt.policy import QwenVLPolicy
from mmrpt.types import PixelBatch

SHARPNESS = 20.0  # of the softmax over cosines in [-1, 1]


def label_weights(policy: QwenVLPolicy, captions: Iterable[str]) -> Tensor:
    """(V,) float32 weight of each token as a label: log(captions / (1 + captions that hold it)), at least 0.

    Words of nearly every caption weigh nothing.
    """
    held: Counter[int] = Counter()
    total = 0
    for caption in captions:
        held.update(label_ids(policy, caption))
        total += 1
    counts = torch.zeros(policy.head_weight.shape[0])
    for token, count in held.items():
        counts[token] = count
    return (math.log(max(total, 1)) - torch.log1p(counts)).clamp_min(0.0).to(policy.device)


def label_ids(policy: QwenVLPolicy, caption: str) -> list[int]:
    """The distinct token ids of a caption, each word as it stands inside a text."""
    return sorted(set(policy.encode_text(" " + caption)))


def vision_loss(policy: QwenVLPolicy, pixels: PixelBatch, captions: Sequence[str], weights: Tensor) -> Tensor:
    """Cross-entropy between an image's classes and its caption's words, mean over images: a scalar, >= 0.

    Differentiable in the vision tower and the head. `weights` (V,) of `label_weights`; a caption whose words all
    weigh 0 adds nothing. Classes are a softmax over the cosine between each word's row of the head and the image's
    mean feature.
    """
    (features,) = policy.image_features(pixels)
    per_image = pixels.tokens_per_image(policy.merge_size).tolist()
    pooled = torch.stack([part.mean(0) for part in features.split(per_image)])
    logits = SHARPNESS * normalize(pooled.float(), dim=-1) @ normalize(policy.head_weight.float(), dim=-1).T
    labels = torch.zeros_like(logits)
    for row, caption in enumerate(captions):
        ids = label_ids(policy, caption)
        labels[row, ids] = weights[ids]
    labels = labels / labels.sum(-1, keepdim=True).clamp_min(1e-9)
    return -(labels * logits.log_softmax(-1)).sum(-1).mean()
