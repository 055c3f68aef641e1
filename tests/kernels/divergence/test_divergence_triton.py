"""The Triton row kernels of linear_token_divergence on logits of our own making, in the interpreter or on a GPU.

The whole operator on them is in test_divergence.py and tests/kernels/lm_head/test_operators.py, what the compiler makes
of the kernels in test_divergence_compile.py.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels import linear_token_divergence
from mmrpt_kernels.backends import BackendError
from mmrpt_kernels.divergence import pair_softmax, triton_forward
from mmrpt_kernels.divergence.api import KINDS
from mmrpt_kernels.lm_head.options import HeadOptions
from tests.kernels.devices import INTERPRETING, on_devices

# numpy, which the interpreter runs on, says aloud what a word of probability zero is masked for.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered",
    "ignore:divide by zero encountered",
    "ignore:overflow encountered",
    "ignore:All-NaN slice",
    "ignore:Conversion of an array",
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a short row has several programs, and a program several tiles."""
    if INTERPRETING:
        monkeypatch.setattr(triton_forward, "BLOCK", 128)
        monkeypatch.setattr(triton_forward, "SPAN", 256)


def chunk_of_logits(device, *, rows=5, vocab=301, size=3.0):
    """Raw logits (n, V) of both views, targets (n,)."""
    generator = torch.Generator().manual_seed(5)
    raw_p = size * torch.randn(rows, vocab, generator=generator)
    raw_q = raw_p + 0.3 * size * torch.randn(rows, vocab, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return raw_p.to(device), raw_q.to(device), targets.to(device)


KERNELS = pair_softmax.pair_kernels("triton")


def head(raw: torch.Tensor, bias: torch.Tensor | None = None) -> pair_softmax.PairHead:
    """That of logits (n, V) as they are."""
    return pair_softmax.PairHead(bias, HeadOptions(), raw.shape[-1], None)


def values(raw_p, raw_q, targets, kinds) -> pair_softmax.RowValues:
    """What rows of logits come to, float32 as the operator gives it."""
    wanted = pair_softmax.Wanted(kinds)
    found, _ = pair_softmax.statistics(KERNELS, (raw_p, raw_q), targets, wanted, head(raw_p))
    made = pair_softmax.row_values(found, kinds, targets is not None)
    return pair_softmax.RowValues(*(None if part is None else part.float() for part in made))


def gradients(raw_p, raw_q, targets, grads: pair_softmax.RowValues, *, dtype=torch.float32, want_q=True, over=False):
    """d loss / d raw of both views in `dtype`, for all kinds; `over`: in the logits' own memory."""
    raw, wanted = (raw_p, raw_q), pair_softmax.Wanted(KINDS, learns=True)
    found, state = pair_softmax.statistics(KERNELS, raw, targets, wanted, head(raw_p))
    outs = raw if over else tuple(torch.empty_like(one, dtype=dtype) for one in raw)
    outs = outs if want_q else (outs[0], None)
    KERNELS.gradients(state, targets, found, pair_softmax.slopes_of(grads, found, targets, KINDS), head(raw_p), outs)
    return outs


def row_grads(count, device, value=1.0) -> pair_softmax.RowValues:
    vectors = (torch.full((count,), value, device=device) for _ in range(4))
    return pair_softmax.RowValues(torch.full((count, len(KINDS)), value, device=device), *vectors)


class TestRows:
    """The kernels on logits of our own making."""

    @on_devices
    def test_small_divergences_keep_their_digits(self, device):
        """One sweep for KL takes differences of logits before it sums: better than the sum of p (log p - log q)."""
        raw_p, _, targets = chunk_of_logits(device, vocab=1009)
        raw_q = raw_p + 1e-3 * torch.randn(raw_p.shape, generator=torch.Generator().manual_seed(1)).to(device)
        found = values(raw_p.clone(), raw_q.clone(), targets, KINDS).divergence.cpu().double()
        lp, lq = (torch.log_softmax(raw.cpu().double(), -1) for raw in (raw_p, raw_q))
        mean = ((lp.exp() + lq.exp()) / 2).log()
        js = ((lp.exp() * (lp - mean)).sum(-1) + (lq.exp() * (lq - mean)).sum(-1)) / 2
        truth = torch.stack([(lp.exp() * (lp - lq)).sum(-1), (lq.exp() * (lq - lp)).sum(-1), js], -1)
        assert truth.min() > 1e-8 and truth.max() < 1e-5
        assert (found[:, :3] - truth).abs().max() < 2 * torch.finfo(torch.float32).eps

    @on_devices
    def test_a_row_does_not_depend_on_its_chunk(self, device):
        raw_p, raw_q, targets = chunk_of_logits(device)
        whole = values(raw_p, raw_q, targets, KINDS)
        part = values(raw_p[2:4], raw_q[2:4], targets[2:4], KINDS)
        assert all(torch.equal(a[2:4], b) for a, b in zip(whole, part, strict=True))
        d_whole = gradients(raw_p, raw_q, targets, row_grads(5, device))
        d_part = gradients(raw_p[2:4], raw_q[2:4], targets[2:4], row_grads(2, device))
        assert all(torch.equal(a[2:4], b) for a, b in zip(d_whole, d_part, strict=True))

    @on_devices
    def test_any_row_stride(self, device):
        raw_p, raw_q, targets = chunk_of_logits(device, vocab=127)
        wide = torch.full((5, 300), float("nan"), device=device)
        wide[:, 50:177] = raw_p
        strided = values(wide[:, 50:177], raw_q, targets, KINDS)
        for a, b in zip(strided, values(raw_p, raw_q, targets, KINDS), strict=True):
            assert torch.equal(a, b)

    @on_devices
    def test_a_view_without_gradient_gets_zeros(self, device):
        raw_p, raw_q, targets = chunk_of_logits(device)
        raw_q[2] = float("nan")
        grads = row_grads(5, device, 0.0)
        grads.entropy_p[2] = 1.0
        d_p, d_q = gradients(raw_p, raw_q, targets, grads)
        assert (d_p[2] != 0).any() and (d_q == 0).all()

    @on_devices
    def test_gradients_come_in_the_dtype_of_the_products(self, device):
        raw_p, raw_q, targets = chunk_of_logits(device)
        wide = gradients(raw_p, raw_q, targets, row_grads(5, device))
        half = gradients(raw_p, raw_q, targets, row_grads(5, device), dtype=torch.bfloat16, want_q=False)
        torch.testing.assert_close(half[0], wide[0].bfloat16(), rtol=2**-7, atol=0.0)  # numpy may truncate

    @on_devices
    def test_over_the_logits_themselves(self, device):
        raw_p, raw_q, targets = chunk_of_logits(device)
        apart = gradients(raw_p, raw_q, targets, row_grads(5, device))
        gradients(raw_p, raw_q, targets, row_grads(5, device), over=True)
        assert torch.equal(raw_p, apart[0]) and torch.equal(raw_q, apart[1])

    @on_devices
    def test_a_target_outside_the_vocabulary_is_seen(self, device):
        """The argument checks cannot look at targets on a GPU without waiting for it."""
        raw_p, raw_q, targets = chunk_of_logits(device)
        targets[0], targets[1] = 301, -100
        found = values(raw_p, raw_q, targets, ("k3",))
        for part in (found.logps_p, found.logps_q, found.divergence[:, 0]):
            assert part[0].isnan() and part[1] == 0 and part[2:].isfinite().all()

    @on_devices
    def test_a_uniform_row_has_no_more_than_all_entropy(self, device):
        zeros = torch.zeros(2, 293, device=device)
        found = values(zeros, zeros.clone(), None, ("kl",))
        assert (found.entropy_p <= math.log(293)).all()
        torch.testing.assert_close(found.entropy_p.cpu(), torch.full((2,), math.log(293)))

    def test_float64_is_refused(self):
        hidden, weight = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(5, 3)
        with pytest.raises(BackendError, match=r"divergence.*'triton'.*float64.*portable"):
            linear_token_divergence(hidden, hidden, weight.double(), backend="triton")
        with pytest.raises(BackendError, match="float64"):  # one wide tensor makes wide statistics
            linear_token_divergence(hidden.float(), hidden.float(), weight.double(), backend="triton")
