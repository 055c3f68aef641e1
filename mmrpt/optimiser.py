"""The optimiser, its learning rate as a function of step and steps alone, and the guard around a step that is not
finite."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from mmrpt.families import decoder_of
from mmrpt.muon import LR_SCALE, Muon
from mmrpt.settings import OptimiserSettings

BETA1 = 0.9  # of AdamW


class Optimiser:
    """AdamW, or Muon for the decoder's matrices with AdamW for everything else, driven as one.

    Muon (torch.optim.Muon with updates of AdamW's size) needs about half the steps before a model from scratch looks at
    its image; a pretrained model is better left to AdamW. Weight decay is for matrices, not for norms and biases.
    """

    def __init__(self, model: nn.Module, settings: OptimiserSettings, *, vision_frozen_steps: int = 0) -> None:
        """The vision tower stands still for the first `vision_frozen_steps` of the steps."""
        self.model, self.settings, self.vision_frozen_steps = model, settings, vision_frozen_steps
        groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = defaultdict(list)
        words, vision_tower = _words_and_vision(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                vision = parameter in vision_tower
                hidden = parameter.ndim == 2 and not vision and parameter not in words
                kind = "muon" if settings.kind == "muon" and hidden else "adamw"
                groups[kind, vision, parameter.ndim >= 2].append(parameter)
        options = [
            {
                "params": parameters,
                "weight_decay": settings.weight_decay if decayed else 0.0,
                "kind": kind,
                "vision": vision,
            }
            for (kind, vision, decayed), parameters in groups.items()
        ]
        adamw = [o for o in options if o["kind"] == "adamw"]
        muon = [o for o in options if o["kind"] == "muon"]
        betas = (BETA1, settings.beta2)
        # Fused saves the temporaries of foreach, which are as large as the weights.
        way = "fused" if next(model.parameters()).is_cuda else "foreach"
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw, lr=settings.lr, betas=betas, **{way: True})]
        if muon:
            self.parts.append(Muon(muon, lr=settings.lr))

    def step(self, step: int, steps: float) -> dict[str, float | bool]:
        """Clips, steps and clears the gradients. A gradient that is not finite is skipped and changes nothing."""
        settings = self.settings
        lr = learning_rate(settings, step, steps)
        for part in self.parts:
            for group in part.param_groups:
                scale = LR_SCALE if group["kind"] == "muon" else 1.0
                if group["vision"]:
                    scale *= settings.vision_scale if step >= self.vision_frozen_steps else 0.0
                group["lr"] = lr * scale
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm) if parameters else torch.zeros(())
        finite = bool(torch.isfinite(norm))
        for part in self.parts:
            if finite:
                part.step()
            part.zero_grad(set_to_none=True)
        return {"lr": lr, "grad_norm": float(norm), "skipped": not finite}

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def _words_and_vision(model: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Parameters of embedding and head, and those of the vision tower: what is neither theirs nor the decoder's.

    Asked of the model and not read from parameter names, which a release may change: a name that no longer matches
    would train the vision tower as if it were the decoder.
    """
    words = {*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()}
    vision = set(model.parameters()) - set(decoder_of(model).parameters()) - words
    if not vision:
        raise ValueError(
            f"{type(model).__name__} has no parameters outside of its decoder, embedding and head: expected a vision "
            "tower, whose learning rate the setting vision_scale sets; install transformers 4.57 to "
            "5.24, or train a vision-language model."
        )
    return words, vision


def learning_rate(settings: OptimiserSettings, step: int, steps: float) -> float:
    """Linear warm-up, then a cosine from the peak to `final_fraction` of it at the last step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    low = settings.final_fraction
    return settings.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
