"""The lm head under autocast: float32 master weights go in, and what the float32 accumulators hold comes out."""

from __future__ import annotations

import math

import pytest
import torch

from mmrpt_kernels import linear_logprobs, linear_policy_loss, linear_token_divergence, linear_token_loss
from mmrpt_kernels.divergence import operator as divergence_operator
from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.logprobs import operator
from mmrpt_kernels.policy_loss import operator as loss_operator
from mmrpt_kernels.policy_loss.options import PolicyOptions
from mmrpt_kernels.testing import poisoned_memory

ROWS, WIDTH, VOCAB = 48, 16, 64
EPS = torch.finfo(torch.float32).eps
TARGETS = torch.arange(ROWS) % VOCAB


def leaves(seed: int) -> list[torch.Tensor]:
    """hidden, weight and bias in float32, as autocast finds them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    return [torch.randn(shape, generator=generator).mul_(0.5).requires_grad_() for shape in shapes]


def logprobs(hidden, weight, bias, **options):
    return -linear_logprobs(hidden, weight, TARGETS, bias=bias, **options).logps.mean()


def policy_loss(hidden, weight, bias, **options):
    every = torch.ones(1, ROWS, dtype=torch.bool)
    shaped = (hidden[None], weight, TARGETS[None], torch.ones(1))
    return linear_policy_loss(*shaped, bias=bias, response_mask=every, **options).loss


def token_loss(hidden, weight, bias, **options):
    return linear_token_loss(hidden, weight, TARGETS, lambda logps, entropy, rows: -logps / ROWS, bias=bias, **options)


def divergence(hidden, weight, bias, **options):
    return linear_token_divergence(hidden, hidden.roll(1, 0), weight, bias=bias, **options).divergence.mean()


LOSSES = (logprobs, policy_loss, token_loss, divergence)
by_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def autocast_gradients(loss, wrt, **options) -> list[torch.Tensor]:
    with poisoned_memory():
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*wrt, **options)
        return list(torch.autograd.grad(value, wrt))


@pytest.fixture
def float32_products(monkeypatch):
    """As on a CPU without bfloat16 instructions: elsewhere a CPU's products of halves come rounded to bfloat16."""
    monkeypatch.setattr(gemm, "_cpu_multiplies_bfloat16", lambda: False)


@by_loss
def test_gradients_of_master_weights_have_the_accumulators_precision(loss, float32_products, seed):
    """Against float64 on the rounded inputs, where no product is rounded.

    A logit's error is at most H eps sum |h w|, a probability's relative error that and the sum over V, a gradient's
    those and the sum over rows. Rounded to bfloat16 at the end, it would be about 2^-8 / sqrt(12): ten times more.
    """
    wrt = leaves(seed)
    found = autocast_gradients(loss, wrt, backend="portable")
    exact = [t.detach().bfloat16().double().requires_grad_() for t in wrt]
    truth = torch.autograd.grad(loss(*exact, backend="reference"), exact)
    size = (exact[0].abs() @ exact[1].abs().t()).max().item()
    bound = (WIDTH * size + VOCAB + ROWS) * EPS
    assert bound < 0.1 * 2.0**-8 / math.sqrt(12)
    for name, one, true in zip(("d hidden", "d weight", "d bias"), found, truth, strict=True):
        assert one.dtype == torch.float32
        error = (one.double() - true).square().mean().sqrt() / true.square().mean().sqrt()
        assert error <= bound, f"{name}: relative RMS error {error:.2e} > {bound:.2e}"


@by_loss
@pytest.mark.parametrize("chunk_size", (None, 10))
def test_they_are_those_of_half_precision_inputs_before_rounding(loss, chunk_size, seed):
    """On any CPU: cast, and rounded by the caller, both ways give the same bits."""
    wrt, options = leaves(seed), {"backend": "portable", "chunk_size": chunk_size}
    found = autocast_gradients(loss, wrt, **options)
    cast = [t.detach().bfloat16().requires_grad_() for t in wrt]
    for one, half in zip(found, torch.autograd.grad(loss(*cast, **options), cast), strict=True):
        assert half.dtype == torch.bfloat16
        if loss is not divergence:  # whose two views' gradients of hidden autograd adds up, in bfloat16 or in float32
            assert torch.equal(one.bfloat16(), half)


@by_loss
def test_no_cast_copy_waits_for_the_backward(loss, seed):
    """What is saved is the caller's own head, or gradients in its dtype: nothing of their shapes in the autocast dtype
    (exponentials may be)."""
    wrt, saved = leaves(seed), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss(*wrt, backend="portable")
    shapes = [t.shape for t in wrt]
    assert saved and not any(t.dtype == torch.bfloat16 and t.shape in shapes for t in saved)


@by_loss
def test_compiled_as_eager(loss, float32_products, seed, fresh_compiler):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wrt = leaves(seed)
    for found, expected in zip(autocast_gradients(compiled, wrt), autocast_gradients(loss, wrt), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_opcheck(seed):
    hidden, weight, bias = leaves(seed)
    options = (*HeadOptions(), *LoopOptions("portable", cast=torch.bfloat16))
    torch.library.opcheck(operator.linear_logprobs, (hidden, weight, bias, TARGETS, -100, True, *options))
    detached, ones = (hidden.detach(), weight.detach(), bias.detach()), torch.ones(ROWS)
    backward = (*detached, TARGETS, ones, ones, -100, [True] * 3, *options)
    torch.library.opcheck(operator.linear_logprobs_backward, backward)
    every = torch.ones(ROWS, dtype=torch.bool)
    constants = (TARGETS[None], True, [True] * 3, every, every, ones, None, None, None, ones)
    policy = (*PolicyOptions(), *options)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    leading = (hidden[None].detach().requires_grad_(), weight, bias)
    torch.library.opcheck(loss_operator.linear_policy_loss, (*leading, *constants, *policy), test_utils=tests)
    views = (hidden, hidden.detach().roll(1, 0), weight, None, bias, TARGETS)
    torch.library.opcheck(divergence_operator.linear_token_divergence, (*views, "kl,js", *options))
