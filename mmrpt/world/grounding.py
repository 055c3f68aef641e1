"""The grounding loss of the demo's warm-up: a word that names a thing attends to where the thing is.

A real model brings this from its own pre-training, which has boxes and regions. The tiny one, from scratch, soon reads
off an image which words a caption may hold, but for thousands of steps not which of several cards a word belongs to;
with the attention of half of the heads of two layers shown where to look, it does within a few hundred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmrpt.batching import split_rows
from mmrpt.objective import supervised_loss_with_masses
from mmrpt.policy import QwenVLPolicy
from mmrpt.types import Batch, Example
from mmrpt.world.captions import Boxes
from mmrpt.world.world import WorldPairs

LAYERS = (1, 2)  # early enough for later layers to use what was read
NAMES = ("object", "colour", "material", "position")  # kinds of words that say which thing is meant
FLOOR = 1e-6  # of a mass, whose logarithm is taken


def names_of(source: WorldPairs, example: Example) -> dict[str, Boxes]:
    """The words of an example that name things, each with the boxes of what it names, in shares of the image's side.

    A word said of different things has the boxes of all.
    """
    size = source.world.config.image_size
    found: dict[str, Boxes] = {}
    for word, boxes in zip(example.words, source.word_boxes(example.id), strict=True):
        if boxes and word.kind in NAMES:
            text = example.caption[word.start : word.end]
            found[text] = found.get(text, ()) + tuple(tuple(edge / size for edge in box) for box in boxes)
    return found


def grounded_backward(
    policy: QwenVLPolicy, batch: Batch, names: Sequence[Mapping[str, Boxes]], batch_tokens: int, weight: float
) -> float:
    """Adds the gradients of the supervised loss and of `weight` times the grounding loss; the supervised loss.

    `names` of each row (`names_of`). The grounding loss is the mean, over the last tokens of names, heads and layers,
    of -log(attention mass on what is named / mass on the image).
    """
    total, first = 0.0, 0
    for part in split_rows(batch, batch_tokens):
        rows = len(part.input_ids)
        share = rows / len(batch.input_ids)
        tokens, keys = _named_tokens(policy, part, names[first : first + rows])
        loss, masses = supervised_loss_with_masses(policy, part, keys, _layers(policy))
        grounding = _mass_missed(masses, tokens) if tokens else 0.0
        (share * (loss + weight * grounding)).backward()
        total, first = total + share * loss.item(), first + rows
    return total


def _layers(policy: QwenVLPolicy) -> list[int]:
    depth = policy.model.config.get_text_config().num_hidden_layers
    return [layer for layer in LAYERS if layer < depth] or [0]


def _mass_missed(masses: Tensor, tokens: Sequence[tuple[int, int, int]]) -> Tensor:
    """`masses` (L, R, Hq, T, G), the last group all of the image; `tokens` (row, token, group) of each name."""
    row, token, thing = torch.tensor(tokens, device=masses.device).T
    heads = masses[:, :, : max(1, masses.shape[2] // 2)]  # the others are free
    seen = heads[:, row, :, token]  # (N, L, H, G)
    hit = seen.gather(-1, thing[:, None, None, None].expand(*seen.shape[:-1], 1))[..., 0]
    return (seen[..., -1].clamp_min(FLOOR).log() - hit.clamp_min(FLOOR).log()).mean()


def _named_tokens(
    policy: QwenVLPolicy, batch: Batch, names: Sequence[Mapping[str, Boxes]]
) -> tuple[list[tuple[int, int, int]], Tensor]:
    """(row, last token, group) of each place where a row says a name, and the key weights (R, T, G) float32: a group of
    patches for each name of a row, and the last of all of the image."""
    is_image = batch.input_ids == policy.image_token_id
    groups = 1 + max(len(row) for row in names)
    keys = torch.zeros(*is_image.shape, groups, device=is_image.device)
    keys[..., -1] = is_image.float()
    tokens: list[tuple[int, int, int]] = []
    for row, (ids, named) in enumerate(zip(batch.input_ids.tolist(), names, strict=True)):
        _, height, width = (batch.pixels.grid_thw[batch.image_index[row]] // policy.merge_size).tolist()
        for group, (text, boxes) in enumerate(named.items()):
            patches = torch.stack([_patches(box, height, width) for box in boxes]).any(0)
            keys[row, is_image[row], group] = patches.flatten().to(keys)
            wanted = policy.encode_text(" " + text)
            for start in range(len(ids) - len(wanted) + 1):
                if ids[start] == wanted[0] and ids[start : start + len(wanted)] == wanted:
                    tokens.append((row, start + len(wanted) - 1, group))
    return tokens, keys


def _patches(box: tuple[float, float, float, float], height: int, width: int) -> Tensor:
    """(height, width) bool: patches whose middle lies in the box, or else the one that holds the box's middle."""
    left, top, right, bottom = box
    rows, columns = (torch.arange(n).add(0.5).div(n) for n in (height, width))
    inside = ((rows > top) & (rows < bottom))[:, None] & ((columns > left) & (columns < right))
    if not inside.any():
        inside[int((top + bottom) / 2 * height), int((left + right) / 2 * width)] = True
    return inside
