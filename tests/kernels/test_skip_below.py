"""skip_below: words too small to matter leave the two gradient products; a likeness of rank one takes their place."""

from __future__ import annotations

import math

import pytest
import torch

from mmrpt_kernels import linear_logprobs, linear_policy_loss, linear_token_loss
from mmrpt_kernels.logprobs import columns
from mmrpt_kernels.testing import assert_close_to_truth, poisoned_memory

ROWS, VOCAB, HIDDEN = 96, 4099, 64
HALVES = (torch.bfloat16, torch.float16)


def made(kind: str, dtype: torch.dtype = torch.bfloat16, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """hidden (N, H), weight (V, H), targets (N,) whose logits are "flat", "zipf" (word frequencies of a language) or
    "peaked" (two thirds of the tokens nearly certain, the rest of the mass on yet fewer words).

    Rare words' weights share a direction, as in trained models: the first feature holds the word's log-frequency.
    """
    hidden, weight = torch.randn(rows, HIDDEN), torch.randn(VOCAB, HIDDEN) / math.sqrt(HIDDEN)
    frequency = (-2.0 if kind == "peaked" else -1.1) * torch.log(torch.arange(VOCAB) + 2.7)
    targets = torch.multinomial(frequency.softmax(0), rows, replacement=True)
    if kind == "flat":
        hidden *= 0.01
    else:
        weight[:, 0] = frequency / 4.0
        hidden[:, 0] = 4.0
    if kind == "peaked":
        towards = weight[targets].clone()
        towards[:, 0] = 0.0
        strength = torch.where(torch.rand(rows) < 0.67, 20.0, 10.0)
        hidden += strength[:, None] * towards / towards.norm(dim=1, keepdim=True)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}


def token_gradients(inputs: dict, *, wide: bool = False, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """d hidden and d weight of a policy gradient with advantages of both signs and an entropy bonus."""
    hidden, weight = (inputs[n].double() if wide else inputs[n] for n in ("hidden", "weight"))
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    advantages = torch.linspace(-1.0, 1.3, hidden.shape[0])

    def loss(logps, entropy, rows):
        return -(advantages[rows].to(logps.dtype) * logps + 0.05 * entropy)

    with poisoned_memory():
        linear_token_loss(hidden, weight, inputs["targets"], loss, **options).backward()
    return hidden.grad, weight.grad


@pytest.fixture
def kept(monkeypatch) -> list[float]:
    """What share of the words every chunk keeps: 1.0 where all stay."""
    seen = []
    real = columns.leave_out

    def watched(grad_raw, skip_below):
        found = real(grad_raw, skip_below)
        seen.append(1.0 if found is None else found.kept.shape[0] / grad_raw.shape[1])
        return found

    monkeypatch.setattr(columns, "leave_out", watched)
    return seen


@pytest.mark.parametrize("chunk_size", [None, 40])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind, most", [("flat", 1.0), ("zipf", 1.0), ("peaked", 0.45)])
def test_auto_is_within_eagers_error_in_half_precision(kind, most, dtype, chunk_size, kept, seed):
    inputs = made(kind, dtype)
    got = token_gradients(inputs, skip_below="auto", chunk_size=chunk_size)
    eager = token_gradients(inputs, backend="reference")
    truth = token_gradients(inputs, wide=True, backend="reference")
    assert len(kept) == (1 if chunk_size is None else 3) and max(kept) <= most, kept
    for name, one, yardstick, want in zip(("d_hidden", "d_weight"), got, eager, truth, strict=True):
        assert_close_to_truth(one, yardstick, want, name=f"{kind} {name}, kept {kept}")


@pytest.mark.parametrize("kind", ["flat", "zipf", "peaked"])
def test_the_likeness_of_the_rest_is_what_keeps_the_error_small(kind, kept, monkeypatch, seed):
    """A coarse threshold that leaves nearly all words out: without their likeness the error is many times larger."""
    inputs = made(kind, torch.float32)
    exact = token_gradients(inputs)
    near = token_gradients(inputs, skip_below=2.0**-10)
    assert max(kept) < 0.25
    monkeypatch.setattr(columns.Columns, "backward_hidden", lambda self, w: self.grad @ w[self.kept])
    dropped = token_gradients(inputs, skip_below=2.0**-10)

    def error(grads):
        return ((grads[0] - exact[0]).norm() / exact[0].norm()).item()

    # Where words share no direction (flat) the rest adds up to little either way.
    factor = 1.0 if kind == "flat" else 4.0
    assert error(near) * factor <= error(dropped), (error(near), error(dropped), kept)
    assert error(near) < 0.1


def test_a_threshold_above_every_word_keeps_a_few(kept, seed):
    grads = token_gradients(made("flat", torch.float32), skip_below=0.5)
    assert 0.0 < max(kept) < 0.01 and all(grad.isfinite().all() for grad in grads)


def test_columns_and_rest_add_up(seed):
    """Row sums of the gradient are kept exactly, columns of words that stay too; the rest has rank one."""
    grad = torch.randn(7, 500, dtype=torch.float64) * torch.logspace(0, -8, 500, dtype=torch.float64)
    found = columns.leave_out(grad, 1e-3)
    assert 0 < found.kept.shape[0] < 0.45 * 500 and torch.equal(found.grad, grad[:, found.kept])
    shares = grad.abs().sum(0) / grad.abs().sum()
    assert set((shares >= 1e-3).nonzero()[:, 0].tolist()) <= set(found.kept.tolist())
    assert (
        found.kept.shape[0] < (shares >= 1e-3).sum() + 8 and shares[found.kept].min() >= shares[found.shares > 0].max()
    )
    full = torch.outer(found.rest, found.shares)
    full[:, found.kept] += found.grad
    torch.testing.assert_close(full.sum(1), grad.sum(1))
    assert (found.shares[found.kept] == 0).all() and found.shares.sum().item() == pytest.approx(1.0)
    weight, hidden = torch.randn(500, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(found.backward_hidden(weight), full @ weight)
    into = torch.zeros(500, 6, dtype=torch.float64)
    common = found.backward_weight(hidden, into)
    torch.testing.assert_close(into.addr_(found.shares, common), full.T @ hidden)


def test_a_gradient_of_rank_one_in_its_tail_is_exact(seed):
    """Small columns in the same proportions for every row: the likeness is the thing itself."""
    tail = torch.outer(torch.randn(5, dtype=torch.float64), 1e-4 * torch.rand(90, dtype=torch.float64))
    grad = torch.cat([torch.randn(5, 10, dtype=torch.float64), tail], 1)
    found = columns.leave_out(grad, 1e-3)
    assert found.kept[:10].tolist() == list(range(10)) and found.kept.shape == (16,)
    weight = torch.randn(100, 6, dtype=torch.float64)
    torch.testing.assert_close(found.backward_hidden(weight), grad @ weight, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype, skip_below", [(torch.bfloat16, None), (torch.float32, "auto"), (torch.bfloat16, 0.0)])
def test_exact_unless_asked_for_and_in_float32(dtype, skip_below, kept, seed):
    inputs = made("peaked", dtype)
    for one, other in zip(token_gradients(inputs, skip_below=skip_below), token_gradients(inputs), strict=True):
        assert torch.equal(one, other)
    assert not kept


def test_all_words_stay_where_leaving_some_out_does_not_pay_or_the_gradient_is_nothing():
    assert columns.leave_out(torch.ones(3, 100), 0.005) is None
    assert columns.leave_out(torch.zeros(3, 100), 0.005) is None
    assert columns.leave_out(torch.ones(3, 1), 0.9) is None
    for value in (torch.inf, torch.nan):
        grad = torch.eye(100)
        assert columns.leave_out(grad[:5], 1e-3) is not None
        grad[2, 7] = value
        assert columns.leave_out(grad[:5], 1e-3) is None


def test_a_row_of_nan_reaches_no_other(seed):
    inputs = made("peaked", torch.float32)
    clean, _ = token_gradients(inputs)
    inputs["hidden"][5] = torch.nan
    d_hidden, _ = token_gradients(inputs, skip_below=2.0**-17)
    others = torch.arange(ROWS) != 5
    assert d_hidden[5].isnan().all() and torch.equal(d_hidden[others], clean[others])


def test_every_operator_takes_it(kept, seed):
    """linear_logprobs' backward, the policy loss, and a head whose weight or hidden states are frozen."""
    inputs = made("peaked")
    exact, _ = token_gradients(inputs)
    for frozen in ("hidden", "weight", None):
        leaves = {n: inputs[n].clone().requires_grad_(n != frozen) for n in ("hidden", "weight")}
        out = linear_logprobs(**leaves, targets=inputs["targets"], skip_below="auto")
        out.logps.sum().backward()
        loss = linear_policy_loss(
            leaves["hidden"][None],
            leaves["weight"],
            inputs["targets"][None],
            torch.ones(1),
            response_mask=torch.ones(1, ROWS, dtype=torch.bool),
            skip_below="auto",
        ).loss
        loss.backward()
        for name, leaf in leaves.items():
            assert (leaf.grad is None) == (name == frozen)
            assert leaf.grad is None or (leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0)
    assert len(kept) == 6 and max(kept) <= 0.45


def test_leaving_words_out_waits_for_the_device():
    with pytest.raises(ValueError, match="compact=False asks that nothing does"):
        linear_logprobs(**made("flat", rows=3), skip_below="auto", compact=False)


@pytest.mark.parametrize("value", [-0.1, 1.0, "always", float("nan")])
def test_refusals(value):
    inputs = made("flat", rows=3)
    for call in (
        lambda: linear_logprobs(**inputs, skip_below=value),
        lambda: linear_token_loss(**inputs, token_loss=lambda logps, entropy, rows: logps, skip_below=value),
    ):
        with pytest.raises(ValueError, match="skip_below.*'auto'"):
            call()
