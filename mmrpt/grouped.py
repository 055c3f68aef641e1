"""A group's responses laid one after another behind their common prompt, so that the prompt is computed once.

    row:       prompt  response 1  response 2  ...  padding
    segments:  0 0 0   1 1 1 1     2 2 2            -1

A response sees the prompt and itself, and its positions go on from the prompt's end, as if it stood there alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sharing_saves(prompts: Sequence[int], groups: Sequence[Sequence[int]], hidden_size: int) -> bool:
    """Whether rows of a prompt and all its responses cost less than a row for each response.

    Arguments: the tokens of each prompt, the tokens of each of its responses, and H. Counted per decoder layer: about
    24 H^2 operations a token for the products, 4 H for each pair of tokens that attention visits. A shared row visits
    all pairs (its mask is no band), rows of their own only the causal half: long responses are better off alone.
    """
    shared = [prompt + sum(responses) for prompt, responses in zip(prompts, groups, strict=True)]
    alone = [prompt + length for prompt, responses in zip(prompts, groups, strict=True) for length in responses]

    def cost(rows: Sequence[int], share_of_pairs: float) -> float:
        return sum(24 * hidden_size**2 * n + 4 * hidden_size * share_of_pairs * n**2 for n in rows)

    return cost(shared, 1.0) < cost(alone, 0.5)


def shared_mask(segments: Tensor) -> Tensor:
    """(R, 1, T, T) bool of segments (R, T): True where a token may attend to another. Padding sees itself alone."""
    width = segments.shape[1]
    order = torch.arange(width, device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = ((key == 0) | (key == query)) & (query >= 0) & (order[:, None] >= order)
    return (allowed | torch.eye(width, dtype=torch.bool, device=segments.device))[:, None]


def shared_positions(positions: Tensor, segments: Tensor) -> Tensor:
    """Rotary positions (3, R, T) of shared rows, from those of the same rows read as one text."""
    order = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    start = torch.where(_starts(segments), order, 0).cummax(-1).values
    prompt = (segments == 0).sum(-1, keepdim=True)
    return positions - torch.where(segments > 0, start - prompt, 0)


def response_places(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row (N, 1), place (N, W), mask (N, W)) of the tokens of all N responses, row by row; W the longest."""
    row, start = (_starts(segments) & (segments > 0)).nonzero(as_tuple=True)
    length = (segments[row] == segments[row, start][:, None]).sum(-1)
    offset = torch.arange(int(length.max()), device=segments.device)
    place = (start[:, None] + offset).clamp_max(segments.shape[1] - 1)
    return row[:, None], place, offset < length[:, None]


def _starts(segments: Tensor) -> Tensor:
    before = torch.nn.functional.pad(segments[:, :-1], (1, 0), value=-2)
    return segments != before
