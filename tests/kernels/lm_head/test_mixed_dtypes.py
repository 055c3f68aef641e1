"""Hidden states and a head of two dtypes: exact products in float32, and a word of warning where that is slow."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmrpt_kernels import linear_logprobs
from mmrpt_kernels.lm_head import gemm

ROWS, WIDTH, VOCAB = 40, 24, 56
EPS = torch.finfo(torch.float32).eps
FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)
PAIRS = [(FLOAT, half) for half in HALVES] + [(half, FLOAT) for half in HALVES] + [HALVES]


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
