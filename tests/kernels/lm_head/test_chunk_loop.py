"""The chunk loop: chunks of any height give what one chunk gives, and nothing of what lies around the rows."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels import linear_logprobs, linear_policy_loss, linear_token_divergence, linear_token_loss
from mmrpt_kernels.divergence import fused as divergence_fused
from mmrpt_kernels.lm_head import chunk_loop, gemm
from mmrpt_kernels.lm_head.chunk_sizes import ChunkRows
from mmrpt_kernels.testing import assert_close_to_truth, poisoned_memory

ROWS, WIDTH, VOCAB = 21, 24, 75  # three tall chunks of 8, 8 and 5 rows; neither size is a multiple of 32
HEIGHTS = (ChunkRows(3, 8), ChunkRows(8, 8), ChunkRows(4, 9, padded=True), ChunkRows(1, ROWS), ChunkRows(ROWS, ROWS))
SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
ALL = torch.arange(ROWS) >= 0
ADVANTAGES = torch.linspace(-1.0, 1.5, ROWS)
TARGETS = (torch.arange(ROWS) * 31) % VOCAB


def token_loss(leaves, mask=ALL, targets=TARGETS, **options):
    """One sweep."""
    loss = linear_token_loss(
        *leaves[:2],
        targets,
        lambda logps, entropy, rows: ADVANTAGES[rows] * logps,
        active_mask=mask,
        bias=leaves[2],
        use_entropy=False,
        **options,
    )
    return (loss,)


def entropy_loss(leaves, mask=ALL, targets=TARGETS, **options):
    """Two sweeps: an entropy learns."""

    def loss(logps, entropy, rows):
        return ADVANTAGES[rows] * logps - 0.1 * entropy

    return (linear_token_loss(*leaves[:2], targets, loss, active_mask=mask, bias=leaves[2], **options),)


def policy_loss(leaves, mask=ALL, targets=TARGETS, **options):
    shaped = (leaves[0][None], leaves[1], targets[None], ADVANTAGES[None])
    out = linear_policy_loss(*shaped, response_mask=mask[None], bias=leaves[2], aggregation="sum", **options)
    return out.loss, out.logps


def logprobs(leaves, mask=ALL, targets=TARGETS, **options):
    """Forward and backward loop apart, an incoming gradient of zero in some rows."""
    ids = torch.where(mask, targets, -100)
    logps, entropy = linear_logprobs(*leaves[:2], ids, bias=leaves[2], return_entropy=True, **options)
    return ((logps * ADVANTAGES.clamp(min=-0.5).add(0.5)).sum() + 0.1 * entropy.sum(), logps, entropy)


def divergence(leaves, **options):
    """Two views of one head, their rows stacked."""
    hidden, weight, bias = leaves
    kinds = {"kind": ("kl", "reverse_kl"), "targets": TARGETS, "bias": bias}
    out = linear_token_divergence(hidden, hidden.roll(1, 0) * 0.5, weight, **kinds, **options)
    return ((out.divergence * ADVANTAGES[:, None]).sum() + out.logps_p.sum(), out.divergence, out.entropy_q)


ONE_VIEW = (token_loss, entropy_loss, policy_loss, logprobs)
by_loss = pytest.mark.parametrize("loss", ONE_VIEW, ids=lambda loss: loss.__name__)


@pytest.fixture(params=(HALF, SINGLE), ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=(True, False), ids=("half_products", "single_products"))
def multiplies(request, monkeypatch) -> None:
    """As on a CPU with instructions for bfloat16 products, whose matrix is bfloat16, and as on one without."""
    monkeypatch.setattr(gemm, "_cpu_multiplies_bfloat16", lambda: request.param)


def chunks_of(monkeypatch, height: ChunkRows) -> None:
    for module in (chunk_loop, divergence_fused):
        monkeypatch.setattr(module, "chunk_rows", lambda *_, **__: height)


def draw(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """hidden, weight and bias, each a part of a larger tensor that is NaN around it."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for shape in ((ROWS, WIDTH), (VOCAB, WIDTH), (1, VOCAB)):
        held = torch.full((shape[0] + 2, shape[1] + 5), torch.nan, dtype=dtype)
        parts.append(held[1:-1, : shape[1]].copy_(torch.randn(shape, generator=generator)))
    return [parts[0], parts[1], parts[2][0]]


def found(loss, tensors, wide: bool = False, **options) -> list[torch.Tensor]:
    """Results and gradients of hidden, weight and bias, made in memory full of NaN."""
    leaves = [(t.double() if wide else t).detach().requires_grad_() for t in tensors]
    with poisoned_memory():
        total, *others = loss(leaves, **options)
        return [total.detach(), *(t.detach() for t in others), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("loss", (*ONE_VIEW, divergence), ids=lambda loss: loss.__name__)
def test_the_height_of_chunks_changes_nothing(loss, dtype, multiplies, monkeypatch, seed):
    """Logits shorter than the matrix, in memory of their own or in the matrix's."""
    tensors = draw(dtype, seed)
    truth = found(loss, tensors, wide=True, backend="reference")
    eager = found(loss, tensors, backend="reference")
    for height in HEIGHTS:
        chunks_of(monkeypatch, height)
        results = found(loss, tensors, backend="portable")
        for place, (one, yardstick, true) in enumerate(zip(results, eager, truth, strict=True)):
            of_input = place >= len(truth) - 3
            # Values are float32 sums over words and rows: log-probs of size 5, and up to ROWS of them.
            rule = {} if of_input else {"dtype": SINGLE, "floor": 5.0 * (ROWS if one.dim() == 0 else 1)}
            assert_close_to_truth(one, yardstick, true, name=f"{height} {place}", **rule)


@by_loss
@pytest.mark.parametrize("height", HEIGHTS[:3], ids=str)
def test_padding_rows_give_nothing_whatever_they_hold(loss, height, dtype, multiplies, monkeypatch, seed):
    """Rows that are visited because nothing may wait: NaN hidden states, and targets that are no word."""
    chunks_of(monkeypatch, height)
    hidden, weight, bias = draw(dtype, seed)
    mask = torch.rand(ROWS) < 0.6
    mask[7:9] = torch.tensor([True, False])
    expected = found(loss, (hidden, weight, bias), mask=mask)
    hidden[~mask] = torch.nan
    hidden[8] = torch.inf
    targets = torch.where(mask, TARGETS, torch.where(ALL.cumsum(0) % 2 == 0, 10**9, -7))
    results = found(loss, (hidden, weight, bias), mask=mask, targets=targets, compact=False)
    truth = found(loss, (torch.where(mask[:, None], hidden, 0.0), weight, bias), wide=True, mask=mask)
    assert (results[-3][~mask] == 0).all()
    for place, (one, other, true) in enumerate(zip(results, expected, truth, strict=True)):
        rule = {} if place >= len(truth) - 3 else {"dtype": SINGLE, "floor": 5.0 * (ROWS if one.dim() == 0 else 1)}
        assert_close_to_truth(one, other, true, name=str(place), **rule)
