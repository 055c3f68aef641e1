"""skip_below: words too small to matter leave the two gradient products for a rank-one approximation."""

from __future__ import annotations

import os

import pytest
import torch

from mmrpt_kernels import linear_token_loss
from mmrpt_kernels.lm_head import sparse_vocab
from mmrpt_kernels.lm_head.sparse_vocab import MOST_KEPT, MULTIPLE, WHOLE, split
from mmrpt_kernels.testing import HEADS, HeadCase, assert_close_to_truth, draw_head, kept_words, poisoned_memory
from tests.kernels.lm_head.operators import ONE_VIEW, draw, name_of, run

ROWS, VOCAB, HIDDEN = 96, 4099, 64
HALVES = (torch.bfloat16, torch.float16)


def made(kind: str, dtype: torch.dtype = torch.bfloat16, rows: int = ROWS, seed: int = 0) -> dict[str, torch.Tensor]:
    """hidden (N, H), weight (V, H), targets (N,)."""
    return draw_head(kind, rows, HIDDEN, VOCAB, dtype=dtype, seed=seed)._asdict()


def token_gradients(
    inputs: dict, *, wide: bool = False, entropy: bool = True, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """d hidden and d weight of a policy gradient with advantages of both signs and an entropy bonus. Without the bonus
    the logits are read once, and their matrix has a factor a row."""
    hidden, weight = (inputs[n].double() if wide else inputs[n] for n in ("hidden", "weight"))
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    advantages = torch.linspace(-1.0, 1.3, hidden.shape[0], device=hidden.device)

    def loss(logps, entropy, rows):
        return -(advantages[rows].to(logps.dtype) * logps + (0.0 if entropy is None else 0.05 * entropy))

    with poisoned_memory():
        linear_token_loss(hidden, weight, inputs["targets"], loss, use_entropy=entropy, **options).backward()
    return hidden.grad, weight.grad


@pytest.fixture
def kept():
    """What share of the words every chunk keeps: 1.0 where all stay."""
    with kept_words() as seen:
        yield seen


def assert_within_eagers_error(inputs: dict, what: str, *, entropy: bool = True, **options) -> None:
    """d hidden and d weight of bfloat16 or float16 inputs by the error rule."""
    got = token_gradients(inputs, entropy=entropy, **options)
    eager = token_gradients(inputs, entropy=entropy, backend="reference")
    truth = token_gradients(inputs, entropy=entropy, wide=True, backend="reference")
    for name, one, yardstick, want in zip(("d_hidden", "d_weight"), got, eager, truth, strict=True):
        assert_close_to_truth(one, yardstick, want, name=f"{what} {name}")


by_sweeps = pytest.mark.parametrize("entropy", (False, True), ids=("one_sweep", "two_sweeps"))


@by_sweeps
@pytest.mark.parametrize("chunk_size", [None, 40])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", HEADS)
def test_auto_is_within_eagers_error_in_half_precision(kind, dtype, chunk_size, entropy, kept, seed):
    options = {"entropy": entropy, "chunk_size": chunk_size}
    assert_within_eagers_error(made(kind, dtype, seed=seed), kind, skip_below="auto", **options)
    assert len(kept) == (1 if chunk_size is None else 3)
    if kind in ("peaked", "trained") and dtype == torch.bfloat16:
        assert max(kept) <= MOST_KEPT, kept  # else nothing was shown


@by_sweeps
def test_auto_takes_gradients_that_the_row_kernels_rounded(entropy, kept, seed):
    """Triton's row kernels write d logits in bfloat16, portable's only where a CPU multiplies those."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("not interpreting")
    options = {"entropy": entropy, "skip_below": "auto", "backend": "triton"}
    assert_within_eagers_error(made("trained", seed=seed), "triton", **options)
    assert max(kept) <= MOST_KEPT


@pytest.mark.parametrize("size", [0.03, 1.0, 3.0])
def test_a_vocabulary_of_flat_words_is_not_left_out_for_each_being_small(size, kept, seed):
    """152,000 words of which each has next to nothing, and all together the half of everything."""
    flat = draw_head("flat", 64, 16, 151_936, dtype=torch.bfloat16, seed=seed)
    inputs = flat._replace(weight=flat.weight * (size / 3.0))._asdict()
    assert_within_eagers_error(inputs, f"logits of size {size}", skip_below="auto")
    assert set(kept) == {1.0}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HEADS)
def test_auto_on_a_gpu_at_a_real_vocabulary(kind, kept, seed):
    drawn = draw_head(kind, 512, 256, 151_936, dtype=torch.bfloat16, device="cuda", seed=seed)
    assert_within_eagers_error(drawn._asdict(), kind, skip_below="auto")
    assert kind not in ("peaked", "trained") or max(kept) <= MOST_KEPT


@pytest.mark.parametrize("kind, share", [("zipf", 0.2), ("trained", 0.03)])
@by_sweeps
def test_the_approximation_of_the_rest_keeps_the_error_small(kind, share, entropy, kept, monkeypatch, seed):
    """A coarse share that leaves nearly all words out: without their approximation the error is many times larger."""
    inputs = made(kind, torch.float32, seed=seed)
    exact = token_gradients(inputs, entropy=entropy)
    near = token_gradients(inputs, entropy=entropy, skip_below=share)
    assert max(kept) < 0.25

    def dropping(self, weight: torch.Tensor) -> torch.Tensor:
        return self.factor[:, None] * (self.grad @ weight[self.kept])

    monkeypatch.setattr(sparse_vocab.SparseColumns, "d_hidden", dropping)
    monkeypatch.setattr(sparse_vocab, "WHOLE", torch.inf)
    dropped = token_gradients(inputs, entropy=entropy, skip_below=share)

    def error(grads):
        return ((grads[0] - exact[0]).norm() / exact[0].norm()).item()

    assert error(near) * 3.0 <= error(dropped), (error(near), error(dropped), kept)
    assert error(near) < 0.1


def test_a_share_of_nearly_everything_keeps_a_few_words(kept, seed):
    grads = token_gradients(made("flat", torch.float32), skip_below=1.0 - 1e-15)
    assert 0.0 < max(kept) < 0.01 and all(grad.isfinite().all() for grad in grads)


@pytest.fixture(params=(False, True), ids=("alone", "with_factors"))
def split_whole(request):
    """`split` of a gradient (n, V): as a matrix alone, or as one with a factor a row, of both signs and any size."""

    def apart(grad: torch.Tensor, share: float):
        if not request.param:
            return split(grad, None, share)
        factor = torch.where(torch.arange(len(grad)) % 2 == 0, -1.0, 0.25).to(grad.dtype) * 2.0 ** (len(grad) % 5)
        return split(grad / factor[:, None], factor, share)

    return apart


def products_of(found, weight: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d hidden (n, H) and d weight (V, H) of a split gradient."""
    into = torch.zeros_like(weight)
    common = found.add_d_weight(hidden, into)
    return found.d_hidden(weight), into.addr_(found.shares, common)


def test_columns_and_rest_add_up(split_whole, seed):
    """Row sums of the gradient are kept exactly, columns of words that stay too; the rest has rank one, and is made of
    the smallest columns, as many as the share allows."""
    grad = torch.randn(7, 500, dtype=torch.float64) * torch.logspace(0, -8, 500, dtype=torch.float64)
    found = split_whole(grad, 0.01)
    assert 0 < found.kept.shape[0] < 0.45 * 500 and torch.equal(found.factor[:, None] * found.grad, grad[:, found.kept])
    assert found.kept.shape[0] % MULTIPLE == 0 and found.whole.shape == (0,)
    mass = grad.abs().sum(0) / grad.abs().sum()
    left = found.shares > 0
    assert mass[left].sum() <= 0.01 < mass[left].sum() + mass[found.kept].sort().values[:MULTIPLE].sum()
    assert mass[found.kept].min() >= mass[left].max() and left.sum() + found.kept.shape[0] == 500
    full = torch.outer(found.rest, found.shares)
    full[:, found.kept] += grad[:, found.kept]
    torch.testing.assert_close(full.sum(1), grad.sum(1))
    assert (found.shares[found.kept] == 0).all() and found.shares.sum().item() == pytest.approx(1.0)
    weight, hidden = torch.randn(500, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(products_of(found, weight, hidden), (full @ weight, full.T @ hidden))


def test_a_row_unlike_the_others_is_computed_whole(split_whole, seed):
    """100 tokens share 20 words and a thin tail; one says words that no other does, a hundredth of all the mass."""
    grad = torch.zeros(101, 1000, dtype=torch.float64)
    grad[:100, :20] = torch.rand(100, 20, dtype=torch.float64)
    grad[:100, 20:500] = 1e-5 * torch.rand(100, 480, dtype=torch.float64)
    grad[100, 500:] = 0.02 * torch.rand(500, dtype=torch.float64)
    found = split_whole(grad, 0.02)
    assert found.whole.tolist() == [100] and found.kept.shape[0] < 40
    weight, hidden = torch.randn(1000, 6, dtype=torch.float64), torch.randn(101, 6, dtype=torch.float64)
    weight[500:, 0] = 5.0  # what the odd one's words have in common must not tint the others
    (got, into), exact = products_of(found, weight, hidden), grad @ weight
    torch.testing.assert_close(got[100], exact[100])
    assert (got - exact).abs().max() < 1e-3 * exact.abs().max()
    torch.testing.assert_close(into[500:], (grad.T @ hidden)[500:])
    assert (into - grad.T @ hidden).abs().max() < 1e-3 * exact.abs().max()


def test_a_row_without_a_factor_is_nothing(seed):
    """Its matrix decides nothing, and its hidden state reaches nothing."""
    grad = torch.randn(7, 500) * torch.logspace(0, -8, 500)
    factor = torch.linspace(0.5, 2.0, 7)
    factor[3], grad[3] = 0.0, 1e6 * torch.rand(500)
    weight, hidden = torch.randn(500, 6), torch.randn(7, 6)
    hidden[3] = torch.nan
    others = torch.arange(7) != 3
    found, alone = split(grad, factor, 0.01), split(grad[others], factor[others], 0.01)
    assert torch.equal(found.kept, alone.kept)
    (d_hidden, d_weight), expected = products_of(found, weight, hidden), products_of(alone, weight, hidden[others])
    assert (d_hidden[3] == 0).all()
    torch.testing.assert_close((d_hidden[others], d_weight), expected)


def test_no_more_rows_are_whole_than_the_share_pays_for(split_whole, seed):
    """However the tail is spread over rows: those that lost WHOLE times the mean are at most one in WHOLE."""
    for rows in (3, 16, 200):
        grad = torch.rand(rows, 600) * torch.logspace(0, -6, 600)
        grad[:, 200:] *= 5 * torch.rand(rows, 1) ** 8
        found = split_whole(grad, 0.01)
        assert found is not None and found.whole.shape[0] <= rows / WHOLE


def test_a_gradient_of_rank_one_in_its_tail_is_exact(split_whole, seed):
    """Small columns in the same proportions for every row: the approximation is the thing itself."""
    tail = torch.outer(torch.randn(5, dtype=torch.float64), 1e-4 * torch.rand(90, dtype=torch.float64))
    grad = torch.cat([torch.randn(5, 10, dtype=torch.float64), tail], 1)
    found = split_whole(grad, 1e-3)
    assert found.kept[:10].tolist() == list(range(10)) and found.kept.shape == (16,)
    weight = torch.randn(100, 6, dtype=torch.float64)
    torch.testing.assert_close(found.d_hidden(weight), grad @ weight, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype, skip_below", [(torch.bfloat16, None), (torch.float32, "auto"), (torch.bfloat16, 0.0)])
def test_exact_unless_asked_for_and_in_float32(dtype, skip_below, kept, seed):
    inputs = made("peaked", dtype)
    for one, other in zip(token_gradients(inputs, skip_below=skip_below), token_gradients(inputs), strict=True):
        assert torch.equal(one, other)
    assert not kept


def test_all_words_stay_where_leaving_some_out_does_not_pay_or_the_gradient_is_nothing(split_whole):
    assert split_whole(torch.ones(3, 100), 0.005) is None
    assert split_whole(torch.zeros(3, 100), 0.005) is None
    assert split_whole(torch.ones(3, 1), 0.9) is None
    for value in (torch.inf, torch.nan):
        grad = torch.eye(100)
        assert split_whole(grad[:5], 1e-3) is not None
        grad[2, 7] = value
        assert split_whole(grad[:5], 1e-3) is None


@by_sweeps
def test_a_row_of_nan_reaches_no_other(entropy, seed):
    inputs = made("peaked", torch.float32)
    clean, _ = token_gradients(inputs, entropy=entropy)
    inputs["hidden"][5] = torch.nan
    d_hidden, _ = token_gradients(inputs, entropy=entropy, skip_below=2.0**-17)
    others = torch.arange(ROWS) != 5
    assert d_hidden[5].isnan().all() and torch.equal(d_hidden[others], clean[others])


@pytest.mark.parametrize("operator", ONE_VIEW, ids=name_of)
def test_every_operator_takes_it_with_a_frozen_head_too(operator, kept, seed):
    case = HeadCase("peaked", 24, HIDDEN, VOCAB, logit_size=30.0, ignored="none")
    for frozen in ("hidden", "weight", None):
        made, before = draw(case, seed, dtype=torch.bfloat16, device="cpu"), len(kept)
        for name in ("hidden", "hidden_q", "weight"):
            made[name].requires_grad_(frozen is None or not name.startswith(frozen))
        made["active"][:], made["kept"][:] = True, True
        grads = [g for name, g in run(operator, made, seed, skip_below="auto").items() if name.startswith("d_")]
        assert grads and all(g.isfinite().all() and g.any() for g in grads)
        assert len(kept) > before and max(kept) <= MOST_KEPT, kept
