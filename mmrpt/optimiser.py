"""AdamW with a learning rate that is a function of the step alone, and the guard around a step that is not finite."""

from __future__ import annotations

import math

import torch
from torch import nn

from mmrpt.config import OptimiserSettings


def make_optimiser(model: nn.Module, settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on norms and biases."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), foreach=True)


def learning_rate(settings: OptimiserSettings, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the peak to `final_fraction` of it at the last step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    low = settings.final_fraction
    return settings.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def apply_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, settings: OptimiserSettings, step: int, steps: int
) -> dict[str, float | bool]:
    """Clips, steps and clears the gradients. A gradient that is not finite is skipped, counted, and changes nothing."""
    lr = learning_rate(settings, step, steps)
    for group in optimiser.param_groups:
        group["lr"] = lr
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm) if parameters else torch.zeros(())
    finite = bool(torch.isfinite(norm))
    if finite:
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {"lr": lr, "grad_norm": float(norm), "skipped": not finite}
