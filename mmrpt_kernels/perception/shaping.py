"""Trajectory weights from trajectory means, with statistics over this process or over a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist


def trajectory_means(scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(B,) mean score of each trajectory's response tokens in float64; NaN without response tokens."""
    wide = torch.float32 if scores.device.type == "mps" else torch.float64  # mps has no float64
    total = scores.to(wide).masked_fill(~response_mask, 0.0).sum(-1)
    return total / response_mask.sum(-1)


def _reduced(value: torch.Tensor, op: str, distributed: bool, group) -> torch.Tensor:
    """`value` reduced over the group; unchanged without one."""
    if distributed:
        dist.all_reduce(value, op=getattr(dist.ReduceOp, op), group=group)
    return value


def trajectory_weights(
    means: torch.Tensor,  # (B,) mean score of each trajectory, not finite where there is none
    min_weight: float,
    max_weight: float | None,
    distributed: bool,
    group,
) -> torch.Tensor:
    """(B,) weights min_weight + (top - min_weight) * (S - S_min) / span, 1 where S is not finite or nothing differs.

    With max_weight None, top = 1 and span = mean S - S_min: VPPO's equation with its maximum cancelled, mean weight 1.
    Otherwise top = max_weight and span = S_max - S_min.
    """
    valid = torch.isfinite(means)
    lowest = _reduced(means.masked_fill(~valid, torch.inf).min(), "MIN", distributed, group)
    excess = means - lowest
    # Equal scores of trajectories of different lengths have means that differ in the last bit: that is no difference.
    noise = 16 * torch.finfo(means.dtype).eps * means.abs()
    excess = excess.masked_fill(~valid | (excess <= noise), 0.0)
    if max_weight is None:
        # Summing the excess, not S, gives exactly 0 when all are equal.
        sums = _reduced(torch.stack([excess.sum(), valid.sum().to(excess.dtype)]), "SUM", distributed, group)
        span, top = sums[0] / sums[1], 1.0
    else:
        span, top = _reduced(excess.max(), "MAX", distributed, group), max_weight
    weights = min_weight + (top - min_weight) * excess / span
    return torch.where(valid & (span > 0), weights, 1.0)
