"""What happens between raw logits and the softmax."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.lm_head.options import (
    HeadOptions,
    softcap_factors,
    transform_backward,
    transform_logits,
)

OPTIONS = (HeadOptions(), HeadOptions(0.7), HeadOptions(1.3, 5.0, -1.7), HeadOptions(softcap=30.0))


@pytest.mark.parametrize("options", OPTIONS)
def test_transform_is_the_documented_equation_and_its_derivative(options):
    raw = (10 * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    scaled = options.logit_scale * raw
    capped = options.softcap * torch.tanh(scaled / options.softcap) if options.softcap else scaled
    expected = capped / options.temperature
    z = transform_logits(raw, options)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(transform_logits(raw.detach().clone(), options, inplace=True), expected.detach())
    grad = torch.randn_like(raw)
    (truth,) = torch.autograd.grad(expected, raw, grad)
    torch.testing.assert_close(transform_backward(grad, z.detach(), options), truth)
    inner, outer = softcap_factors(options)
    torch.testing.assert_close(outer * torch.tanh(inner * raw) if options.softcap else outer * raw, expected)
