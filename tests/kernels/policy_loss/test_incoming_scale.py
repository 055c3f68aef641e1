"""The number that comes in from above the loss: half-precision gradients are multiplied by all of its bits."""

from __future__ import annotations

import pytest
import torch
from mmrpt_kernels.policy_loss.hand_out import as_factor

from mmrpt_kernels import linear_policy_loss, linear_token_loss

FACTOR = 1.0 / 12.0  # gradient accumulation over 12 batches; 0.2 % from the next bfloat16


def policy_loss(hidden, weight, bias, targets):
    shaped = (hidden[None], weight, targets[None], torch.ones(1))
    return linear_policy_loss(*shaped, bias=bias, response_mask=torch.ones_like(targets)[None].bool()).loss


def token_loss(hidden, weight, bias, targets):
    return linear_token_loss(hidden, weight, targets, lambda logps, entropy, rows: -logps, bias=bias)


def gradients(loss, factor: float, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((9, 16), (40, 16), (40,))
    wrt = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return list(torch.autograd.grad(loss(*wrt, torch.arange(9)), wrt, torch.tensor(factor)))


@pytest.mark.parametrize("route", (policy_loss, token_loss, "compiled"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_gradients_are_rounded_once_after_the_factor(route, dtype, seed, fresh_compiler):
    """factor * gradient as the exact product of the two rounds to: what a rounded factor misses in most entries."""
    loss = torch.compile(policy_loss, fullgraph=True, backend="aot_eager") if route == "compiled" else route
    whole, scaled = gradients(loss, 1.0, dtype, seed), gradients(loss, FACTOR, dtype, seed)
    for one, found in zip(whole, scaled, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, (one.double() * torch.tensor(FACTOR).double()).float().to(dtype))


def test_a_gpu_multiplies_in_float32_without_waiting():
    """There the factor stays a tensor, of one dimension: torch chooses the dtype of a product by those alone."""
    factor = as_factor(torch.ones((), device="meta"))
    assert factor.shape == (1,) and factor.device.type == "meta"
    on_cpu = torch.full((3,), 3.0, dtype=torch.bfloat16)
    assert torch.equal(on_cpu.mul_(torch.full((1,), FACTOR)), torch.full((3,), 0.25, dtype=torch.bfloat16))
