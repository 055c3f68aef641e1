"""Group-relative advantages: how much better a rollout did than the others of its prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    accuracy: Tensor | None = None,
    *,
    min_accuracy: float = 0.01,
    max_accuracy: float = 0.99,
    kind: Literal["grpo", "dr_grpo"] = "grpo",
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """(advantages (P, n) float32, has_signal (P,) bool) of rewards (P, n): P prompts, n rollouts each.

    "grpo": (r - mean) / (std + eps) with the group's unbiased deviation (DeepSeekMath, eq. 3); "dr_grpo": r - mean, no
    division, so that easy and hard prompts keep their weight (arXiv 2503.20783).

    A group has a signal where its rewards differ and its share of right answers, `accuracy` (P,), lies in
    [`min_accuracy`, `max_accuracy`] (DAPO's dynamic sampling). Among wrong answers alone rewards differ by form or near
    misses, which the division would blow up to a full-sized advantage. None, or limits of 0 and 1: any difference is a
    signal. Without one, advantages are exactly zero.

    Raises ValueError for a group of one or rewards that are not finite.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: expected (prompts, n) with n of at least 2.")
    if accuracy is not None and accuracy.shape != rewards.shape[:1]:
        raise ValueError(
            f"accuracy has shape {tuple(accuracy.shape)} beside rewards of {tuple(rewards.shape)}: expected one share "
            "of right answers for each prompt."
        )
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards hold NaN or inf: a reward function must give finite numbers; check its output.")
    rewards = rewards.float()
    has_signal = (rewards != rewards[:, :1]).any(-1)
    if accuracy is not None:
        has_signal = has_signal & (accuracy >= min_accuracy) & (accuracy <= max_accuracy)
    centred = rewards - rewards.mean(-1, keepdim=True)
    if kind == "grpo":
        centred = centred / (rewards.std(-1, keepdim=True) + eps)
    return torch.where(has_signal[:, None], centred, torch.zeros_like(centred)), has_signal
