"""The lm head under autocast: float32 master weights go in, and what the float32 accumulators hold comes out."""

from __future__ import annotations

import math

import pytest
import torch

from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.testing import HeadCase, poisoned_memory
from tests.kernels.lm_head.operators import OPERATORS, Operator, assert_same, draw, leaves_of, mixed_sum

CASE = HeadCase("autocast", 48, 16, 64, logit_size=1.0, bias=True, ignored="none")
EPS = torch.finfo(torch.float32).eps
HALF = torch.bfloat16
LOSSES = [o for o in OPERATORS if o.name in ("logprobs_alone", "token_loss", "policy_loss", "divergence")]
by_loss = pytest.mark.parametrize("operator", LOSSES, ids=lambda operator: operator.name)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="autocast of a CPU")


def draw_leaves(seed: int, of=lambda leaf: leaf) -> dict:
    """Inputs whose float32 leaves are made of(leaf); two views far apart: no divergence is a small difference."""
    made = draw(CASE, seed, dtype=torch.float32)
    made["hidden_q"] = made["hidden"].roll(1, 0)
    return made | {name: of(made[name].detach()).requires_grad_() for name in OPERATORS[-1].leaves}


def autocast_run(operator: Operator, made: dict, seed: int, call=None, enabled: bool = True, **options) -> dict:
    wrt = leaves_of(operator, made)
    with poisoned_memory():
        with torch.autocast("cpu", HALF, enabled=enabled):
            results = (call or operator.call)(made, **options)
        # Of a sum the gradients exist already, in the leaves' dtypes: nothing multiplies them.
        total = mixed_sum(results, seed) if operator.by_rows else results["loss"]
        grads = torch.autograd.grad(total, list(wrt.values()))
    return {n: t.detach() for n, t in results.items()} | {f"d_{n}": g for n, g in zip(wrt, grads, strict=True)}


@pytest.fixture
def float32_products(monkeypatch):
    """As on a CPU without bfloat16 instructions: elsewhere a CPU's products of halves come rounded to bfloat16."""
    monkeypatch.setattr(gemm, "_cpu_multiplies_bfloat16", lambda: False)


@by_loss
def test_gradients_of_master_weights_have_the_accumulators_precision(operator, float32_products, seed):
    """Against float64 on the rounded inputs, where no product is rounded.

    A logit's error is at most H eps sum |h w|, a probability's relative error that and the sum over V, a gradient's
    those and the sum over rows. Rounded to bfloat16 at the end, it would be about 2^-8 / sqrt(12): ten times more.
    """
    found = autocast_run(operator, draw_leaves(seed), seed, backend="portable")
    exact = draw_leaves(seed, of=lambda leaf: leaf.to(HALF).double())
    truth = autocast_run(operator, exact, seed, enabled=False, backend="reference")
    size = (exact["hidden"].abs() @ exact["weight"].abs().t()).max().item()
    bound = (CASE.hidden * size + CASE.vocab + CASE.rows) * EPS
    assert bound < 0.1 * 2.0**-8 / math.sqrt(12)
    for name in (name for name in truth if name.startswith("d_")):
        assert found[name].dtype == torch.float32
        error = (found[name].double() - truth[name]).square().mean().sqrt() / truth[name].square().mean().sqrt()
        assert error <= bound, f"{name}: relative RMS error {error:.2e} > {bound:.2e}"


@by_loss
@pytest.mark.parametrize("chunk_size", (None, 10))
@pytest.mark.parametrize("backend", ("portable", "reference"))
def test_they_are_those_of_half_precision_inputs_before_rounding(operator, backend, chunk_size, seed):
    """On any CPU: cast, and rounded by the caller, both ways give the same bits; results are float32."""
    options = {"backend": backend, "chunk_size": chunk_size}
    found = autocast_run(operator, draw_leaves(seed), seed, **options)
    halves = autocast_run(operator, draw_leaves(seed, of=lambda leaf: leaf.to(HALF)), seed, enabled=False, **options)
    for name, half in halves.items():
        assert found[name].dtype == torch.float32 and half.dtype == (HALF if name.startswith("d_") else torch.float32)
        assert torch.equal(found[name].to(half.dtype), half), name


@by_loss
def test_no_cast_copy_waits_for_the_backward(operator, seed):
    """What is saved is the caller's own head, or gradients in its dtype: nothing of their shapes in the autocast dtype
    (exponentials may be)."""
    made, saved = draw_leaves(seed), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", HALF),
    ):
        operator.call(made, backend="portable")
    shapes = [leaf.shape for leaf in leaves_of(operator, made).values()]
    assert saved and not any(t.dtype == HALF and t.shape in shapes for t in saved)


@by_loss
def test_compiled_as_eager(operator, float32_products, seed, fresh_compiler):
    compiled = torch.compile(operator.call, fullgraph=True, backend="aot_eager")
    found, expected = (autocast_run(operator, draw_leaves(seed), seed, call) for call in (compiled, operator.call))
    assert all(value.dtype == torch.float32 for value in found.values())
    assert_same(found, expected, rtol=1e-5, atol=1e-6)
