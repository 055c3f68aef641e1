"""The three products of the lm head: exact where a float32 sum is, NaN stays in its row, and two dtypes are multiplied
in float32, with a word of warning where that is slow."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmrpt_kernels import linear_logprobs
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.testing import HEAD_CASES, head_inputs, on_a_grid, poisoned_memory

ROWS, WIDTH, VOCAB = 40, 24, 56
EPS = torch.finfo(torch.float32).eps
FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)
PAIRS = [(FLOAT, half) for half in HALVES] + [(half, FLOAT) for half in HALVES] + [HALVES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 33, gemm.WIDEN_ROWS + 5])
def test_products(dtype, vocab):
    """Of inputs on a grid, whose sums are exact in float32 and not in half precision."""
    made = head_inputs(HEAD_CASES[0]._replace(rows=9, vocab=vocab), dtype=dtype)
    hidden, weight = (on_a_grid(made[name], 1 / 8) for name in ("hidden", "weight"))
    stat = statistics_dtype(hidden)
    with poisoned_memory():
        raw = gemm.logits(hidden, weight)
        out = torch.empty(12, vocab, dtype=stat)[:9]
        assert gemm.logits(hidden, weight, out=out).data_ptr() == out.data_ptr() and torch.equal(out, raw)
        grad = on_a_grid(torch.randn(9, vocab, dtype=stat), 1 / 8)
        to_hidden = gemm.d_hidden(grad, weight)
    into = torch.ones(vocab, 8, dtype=stat)
    gemm.add_d_weight(grad, hidden, into)
    h, w, g = hidden.double(), weight.double(), grad.double()
    assert torch.equal(raw.double(), h @ w.T)
    assert torch.equal(to_hidden.double(), g @ w)
    assert torch.equal(into.double(), 1 + g.T @ h)
    factor = torch.tensor(0.125, dtype=stat)
    gemm.add_d_weight(grad, hidden, into, factor=factor)
    assert torch.equal(into.double(), 1 + 1.125 * (g.T @ h))
    gemm.add_d_weight(grad, hidden, into.fill_(torch.nan), fresh=True, factor=factor)
    assert torch.equal(into.double(), 0.125 * (g.T @ h))


@pytest.mark.parametrize("matrix", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_column_sums(matrix):
    """Over more rows than are widened at a time, with a factor a row or without, of magnitudes or not."""
    grad = on_a_grid(torch.randn(2 * gemm.SUM_ROWS + 3, 17, dtype=torch.float64), 1.0).to(matrix)
    dtype = statistics_dtype(grad)
    factor = on_a_grid(torch.randn(len(grad), dtype=dtype), 1.0)
    for scale, absolute in ((None, False), (factor, False), (factor, True)):
        exact = (grad.abs() if absolute else grad).double() * (1.0 if scale is None else scale.double()[:, None])
        found = gemm.column_sums(grad, scale, dtype, absolute=absolute)
        assert found.dtype == dtype and torch.equal(found.double(), exact.sum(0))


@pytest.mark.parametrize("multiplies", (True, False))
@pytest.mark.parametrize("vocab", (33, 1009, 1024))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_products_keep_nan_in_its_row(dtype, vocab, multiplies, monkeypatch, seed):
    """Of the gradient's rows, and of what lies around matrices that are parts of larger ones."""
    monkeypatch.setattr(gemm, "_cpu_multiplies_bfloat16", lambda: multiplies)
    held = torch.full((43, vocab + 3), torch.nan).to(dtype)
    grad, hidden, weight = held[1:41, :vocab], torch.randn(40, 64).to(dtype), torch.randn(vocab, 64).to(dtype)
    grad.copy_(torch.randn(40, vocab))
    clean = gemm.d_hidden(grad, weight)
    into = torch.zeros(vocab, 64)
    gemm.add_d_weight(grad, hidden, into)
    assert clean.isfinite().all() and into.isfinite().all()
    grad[4] = torch.nan
    found = gemm.d_hidden(grad, weight)
    assert found[4].isnan().all()
    others = torch.arange(40) != 4
    torch.testing.assert_close(found[others], clean[others])


@pytest.mark.parametrize(("of_hidden", "of_weight"), PAIRS, ids=str)
def test_nothing_is_rounded_to_the_narrower_dtype(of_hidden, of_weight, seed):
    """A logit errs by at most H eps sum |h w|, a gradient by that and the sums over words and rows, and its dtype."""
    wrt = [torch.randn(ROWS, WIDTH).mul_(0.5).to(of_hidden), torch.randn(VOCAB, WIDTH).mul_(0.5).to(of_weight)]
    size = (wrt[0].double().abs() @ wrt[1].double().abs().t()).max().item()
    bound = (WIDTH * size + VOCAB + ROWS) * EPS
    targets, found = torch.randint(VOCAB, (ROWS,)), []
    for leaves in ([t.requires_grad_() for t in wrt], [t.detach().double().requires_grad_() for t in wrt]):
        logps = linear_logprobs(*leaves, targets, backend="portable").logps
        found.append((logps, *torch.autograd.grad(logps.sum(), leaves)))
    (logps, *grads), (true_logps, *true_grads) = found
    assert (logps - true_logps).abs().max() <= bound
    for grad, true, leaf in zip(grads, true_grads, wrt, strict=True):
        assert grad.dtype == leaf.dtype
        own = 0.0 if leaf.dtype == FLOAT else torch.finfo(leaf.dtype).eps / 2
        error = (grad.double() - true).square().mean().sqrt() / true.square().mean().sqrt()
        assert error <= bound + own


@pytest.mark.parametrize(("of_hidden", "of_weight"), [*PAIRS, (FLOAT, FLOAT), HALVES[:1] * 2], ids=str)
def test_a_gpu_says_once_that_it_is_slow(of_hidden, of_weight, monkeypatch):
    monkeypatch.setattr(gemm, "_vocab_blocks", lambda *_: ())  # a torch for CPUs cannot slice fake tensors of a GPU
    gemm._warn_of_mixed_dtypes.cache_clear()
    with FakeTensorMode(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hidden = torch.empty(ROWS, WIDTH, dtype=of_hidden, device="cuda")
        weight = torch.empty(VOCAB, WIDTH, dtype=of_weight, device="cuda")
        for _ in range(2):
            logits = gemm.logits(hidden, weight)
    assert logits.dtype == FLOAT
    said = [str(one.message) for one in seen if "lm head" in str(one.message)]
    assert len(said) == (of_hidden != of_weight)
    assert all(f"hidden states in {of_hidden} with a weight in {of_weight}" in text for text in said)
    gemm._warn_of_mixed_dtypes.cache_clear()


def test_a_cpu_says_nothing():
    """There products of halves are made in float32 too."""
    gemm._warn_of_mixed_dtypes.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gemm.logits(torch.randn(3, 8), torch.randn(5, 8).bfloat16())
