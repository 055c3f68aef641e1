"""How much each sentence leans on the image: MMRPT's D_vis, from one forward pass with recorded visual mass.

    D_vis(s_i) = 1 / (|s_i| |L|) * sum_{l in L} sum_{t in s_i} mass_l(t, V) / (mass_l(t, V) + mass_l(t, T))

V are the image's tokens and T the caption's; markers, instruction and template belong to neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from mmrpt.masking.sentences import sentence_spans
from mmrpt.policy import Policy
from mmrpt.types import Example, SentenceScore
from mmrpt_kernels.integrations.transformers import record_visual_mass


@torch.no_grad()
def score_sentences(
    policy: Policy,
    examples: Sequence[Example],
    images: Sequence[Image.Image],
    *,
    instruction: str,
    layers: Sequence[float] = (0.5, 1.0),
    attention_row: Literal["before", "own"] = "before",
) -> list[SentenceScore]:
    """One `SentenceScore` per sentence of the examples, which go through the model as one batch.

    `layers`: see `layer_indices`. `attention_row` "own" takes the attention of the token itself; "before" that of the
    position before it, which decides which token comes.
    """
    pixels = policy.pixels(images)
    tokens = pixels.tokens_per_image(policy.merge_size).tolist()
    prompts = [policy.encode_prompt(instruction, count) for count in tokens]
    encoded = [policy.encode_with_offsets(e.caption) for e in examples]
    batch = policy.batch(prompts, [ids for ids, _ in encoded], pixels, range(len(examples)))
    visual = batch.input_ids == policy.image_token_id
    groups = torch.stack((visual, batch.response_mask), -1)
    indices = layer_indices(policy.model.config.get_text_config().num_hidden_layers, layers)
    with record_visual_mass(policy.text_model, key_weights=groups, layers=indices, head_reduction="mean") as record:
        policy.hidden(batch, padded=True)
    ratio = _visual_share(record.stacked())
    scores: list[SentenceScore] = []
    for row, (example, (ids, offsets)) in enumerate(zip(examples, encoded, strict=True)):
        start = len(prompts[row]) - (attention_row == "before")
        masses = ratio[row, start : start + len(ids)].tolist()
        scores += _sentences_of(example, offsets, masses)
    return scores


def layer_indices(depth: int, layers: Sequence[float]) -> list[int]:
    """Indices of the layers that count: `layers` itself where all are integers, else those between two fractions of
    the depth, at least one: 0.5 to 1.0 of five layers is [2, 3, 4]."""
    if all(isinstance(layer, int) for layer in layers):
        if max(layers) >= depth:
            raise ValueError(f"masking.layers is {list(layers)}: the model has {depth} layers, 0 to {depth - 1}.")
        return sorted(layers)
    first, last = layers
    low, high = int(first * depth), max(int(first * depth) + 1, round(last * depth))
    return list(range(low, high))


def _visual_share(masses: Tensor) -> Tensor:
    """(B, T): mass(V) / (mass(V) + mass(T)), averaged over layers, of masses (L, B, T, 2)."""
    total = masses.sum(-1)
    return torch.where(total > 0, masses[..., 0] / total.clamp_min(1e-12), 0.0).mean(0)


def _sentences_of(example: Example, offsets: Sequence[tuple[int, int]], masses: Sequence[float]) -> list[SentenceScore]:
    scores = []
    for index, (start, end) in enumerate(sentence_spans(example.caption)):
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if not inside:
            continue
        truth = None
        if example.words:
            truth = any(w.needs_image for w in example.words if start <= w.start < end)
        own = [masses[i] for i in inside]
        spans = tuple(tuple(offsets[i]) for i in inside)
        scores.append(SentenceScore(example.id, index, start, end, sum(own) / len(own), spans, tuple(own), truth))
    return scores
