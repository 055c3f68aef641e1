"""Muon for CPUs: torch.optim.Muon multiplies in bfloat16, which a CPU without instructions for it does a hundred times
slower than float32."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

LR_SCALE = 6.0  # learning rate of Muon's matrices over that of AdamW's parameters


class Muon(torch.optim.Muon):
    """torch.optim.Muon with nesterov momentum and updates of AdamW's size, float32 products on CPUs.

    Matrices of one shape are orthogonalised in one batch: those of a small model are too small to keep two cores busy.
    Options, state and checkpoints are those of torch's class.
    """

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, lr=lr, nesterov=True, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonalise(self._nesterov(parameters, group["momentum"]), group)
                rms = 0.2 * max(shape) ** 0.5  # of an update by AdamW, which the learning rates are made for
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * rms)

    def _nesterov(self, parameters: list[Tensor], momentum: float) -> Tensor:
        """(n, A, B): the parameters' gradients with momentum; the buffers are brought up to date."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch.stack(gradients).lerp_(torch.stack(buffers), momentum)


def orthogonalise(matrices: Tensor, options: dict) -> Tensor:
    """(n, A, B) -> (n, A, B) with the same singular vectors and singular values near 1, in the same dtype.

    The Newton-Schulz iteration of torch.optim.Muon, with its `ns_coefficients`, `ns_steps` and `eps`; float32 on a CPU,
    bfloat16 elsewhere.
    """
    a, b, c = options["ns_coefficients"]
    x = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(options["eps"])
    for _ in range(options["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
