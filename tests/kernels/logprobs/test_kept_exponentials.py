"""The exponentials that `linear_logprobs` keeps for its backward: the same gradients for one product less."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.logprobs import fused, linear_logprobs
from mmrpt_kernels.testing import HeadCase
from tests.kernels.lm_head.operators import draw, options_of

PLAIN = HeadCase("plain", 23, 16, 101, chunk_size=5)
RICH = PLAIN._replace(name="rich", bias=True, temperature=0.7, softcap=5.0, logit_scale=1.7)
SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
SLOPES = torch.linspace(-2.0, 3.0, 23).masked_fill(torch.arange(23) % 3 == 0, 0.0)


def draw_leaves(case: HeadCase, seed: int, dtype=SINGLE) -> tuple[list[torch.Tensor], torch.Tensor]:
    """hidden, weight and bias where there is one, as leaves; targets."""
    made = draw(case, seed, dtype=dtype, device="cpu")
    return [made[n] for n in ("hidden", "weight", "bias") if made[n] is not None], made["targets"]


def call(leaves: list[torch.Tensor], targets: torch.Tensor, case: HeadCase, **options):
    bias = leaves[2] if len(leaves) > 2 else None
    return linear_logprobs(leaves[0], leaves[1], targets, bias=bias, **(options_of(case) | options))


@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "entropy"))
def test_three_products_and_none_for_rows_without_a_gradient(entropy, products, seed):
    leaves, targets = draw_leaves(PLAIN, seed)
    counted = int((targets != -100).sum())
    found = call(leaves, targets, PLAIN, return_entropy=entropy)
    assert products() == (counted, 0, 0)
    (found.logps * SLOPES).sum().backward()
    active = int(((SLOPES != 0) & (targets != -100)).sum())
    assert 0 < active < counted and products() == (0, active, active)
    assert torch.equal(leaves[0].grad.any(-1), (SLOPES != 0) & (targets != -100))
    total = (call(leaves, targets, PLAIN, backend="reference").logps * SLOPES).sum()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(torch.autograd.grad(total, leaves)))


def test_an_entropy_with_a_gradient_recomputes(products, monkeypatch, seed):
    grads = []
    for budget in (fused.KEPT_BYTES, {}):
        monkeypatch.setattr(fused, "KEPT_BYTES", budget)
        leaves, targets = draw_leaves(RICH, seed)
        found = call(leaves, targets, RICH, return_entropy=True)
        products()
        grads.append(torch.autograd.grad(((found.logps + 0.1 * found.entropy) * SLOPES).sum(), leaves))
        assert products()[0] == int(((SLOPES != 0) & (targets != -100)).sum())
    torch.testing.assert_close(*grads)


def kept_rows(dtype=SINGLE, **options) -> int:
    """Rows whose exponentials wait for the backward; 0: none do."""
    saved, (leaves, targets) = [], draw_leaves(PLAIN, 0, dtype)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        call(leaves, targets, PLAIN, **options)
    return sum(t.shape[0] for t in saved if t.dim() == 2 and t.shape[1] == PLAIN.vocab)


def test_when_they_are_kept(monkeypatch, seed):
    """Within the budget, for rows that count, and not where another route makes the gradient."""
    counted = int((draw_leaves(PLAIN, 0)[1] != -100).sum())
    for options in ({}, {"return_entropy": True}, {"dtype": HALF}, {"dtype": DOUBLE}):
        assert kept_rows(**options) == counted, options
    for options in ({"compact": False}, {"skip_below": 0.01}):
        assert kept_rows(**options) == 0, options
    monkeypatch.setattr(fused, "matrix_dtype", lambda *_: torch.float16)  # as on a GPU: its range lacks exponentials
    assert kept_rows(dtype=torch.float16) == 0


def test_the_budget_counts_the_matrix_in_its_dtype(multiplies, monkeypatch, seed):
    counted = int((draw_leaves(PLAIN, 0)[1] != -100).sum())
    for dtype in (SINGLE, HALF):
        small = dtype == HALF and gemm._cpu_multiplies_bfloat16()
        size = counted * PLAIN.vocab * (2 if small else 4)
        for budget, rows in ((size, counted), (size - 1, 0)):
            monkeypatch.setattr(fused, "KEPT_BYTES", {"cpu": budget})
            assert kept_rows(dtype=dtype) == rows


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr(fused, "_keep_exponentials", lambda *_: pytest.fail("kept"))
    leaves, targets = draw_leaves(PLAIN, 0)
    with torch.no_grad():
        call(leaves, targets, PLAIN)
    call([t.detach() for t in leaves], targets, PLAIN)
    assert not call([t.detach() for t in leaves], targets, PLAIN).logps.requires_grad


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpoints(reentrant, products, seed):
    """The forward that is thrown away keeps nothing; the one that is run again does, for the backward that follows."""
    leaves, targets = draw_leaves(PLAIN, seed)
    expected = torch.autograd.grad((call(leaves, targets, PLAIN).logps * SLOPES).sum(), leaves)
    counted = int((targets != -100).sum())
    products()
    logps = checkpoint(lambda *given: call(list(given), targets, PLAIN).logps, *leaves, use_reentrant=reentrant)
    assert products() == (counted, 0, 0)
    (logps * SLOPES).sum().backward()
    assert products()[0] == counted
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


def test_a_graph_that_is_kept_gives_the_same_again(seed):
    leaves, targets = draw_leaves(RICH, seed)
    total = (call(leaves, targets, RICH).logps * SLOPES).sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(first, torch.autograd.grad(total, leaves), strict=True))
