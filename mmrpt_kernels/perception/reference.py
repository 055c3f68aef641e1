"""The definition of the perception mask: every pair of tokens compared, nothing sorted."""

from __future__ import annotations

import torch


def perception_mask(
    scores: torch.Tensor,  # (B, T) float, no NaN
    response_mask: torch.Tensor,  # (B, T) bool
    numerator: int,
    denominator: int,
) -> torch.Tensor:
    """(B, T) bool: a token is kept when fewer than ceil(numerator / denominator * length) response tokens of its
    trajectory beat it: those of higher score, and those of equal score that come earlier."""
    position = torch.arange(scores.shape[1], device=scores.device)
    mine, theirs = scores[:, :, None], scores[:, None, :]  # (B, T, 1), (B, 1, T)
    earlier = position[None, None, :] < position[None, :, None]
    beats_me = (theirs > mine) | ((theirs == mine) & earlier)
    beaten_by = (beats_me & response_mask[:, None, :]).sum(-1)  # (B, T)
    length = response_mask.sum(-1)
    count = -((-length * numerator) // denominator)  # ceil, in integers
    return response_mask & (beaten_by < count[:, None])
