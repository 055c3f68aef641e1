"""Group-relative advantages: how much better a rollout did than the others of its prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor, *, kind: Literal["grpo", "dr_grpo"] = "grpo", eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """(advantages (P, n) float32, has_signal (P,) bool) of rewards (P, n): P prompts, n rollouts each.

    "grpo": (r - mean) / (std + eps) with the group's unbiased deviation (DeepSeekMath, eq. 3); "dr_grpo": r - mean, no
    division, so that easy and hard prompts keep their weight (arXiv 2503.20783). A group whose rewards are all equal
    teaches nothing: `has_signal` is false and its advantages are exactly zero.

    Raises ValueError for a group of one or rewards that are not finite.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: expected (prompts, n) with n of at least 2.")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards hold NaN or inf: a reward function must give finite numbers; check its output.")
    rewards = rewards.float()
    has_signal = (rewards != rewards[:, :1]).any(-1)
    centred = rewards - rewards.mean(-1, keepdim=True)
    if kind == "grpo":
        centred = centred / (rewards.std(-1, keepdim=True) + eps)
    return torch.where(has_signal[:, None], centred, torch.zeros_like(centred)), has_signal
