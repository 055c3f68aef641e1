"""Perception mask by one stable sort a trajectory, on any device."""

from __future__ import annotations

import torch


def perception_mask(
    scores: torch.Tensor,  # (B, T) float, no NaN
    response_mask: torch.Tensor,  # (B, T) bool
    numerator: int,
    denominator: int,
) -> torch.Tensor:
    """(B, T) bool: per trajectory the ceil(numerator / denominator * length) response tokens of highest score."""
    length = response_mask.sum(-1, keepdim=True)
    count = (length * numerator + denominator - 1) // denominator
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices  # stable: earlier tokens win ties
    in_order = response_mask.gather(-1, order)
    # Counting response tokens along the order, instead of pushing the others to its end with a score of -inf, keeps
    # response tokens that score -inf themselves ahead of them.
    taken = in_order & (in_order.cumsum(-1) <= count)
    return torch.zeros_like(response_mask).scatter(-1, order, taken)
