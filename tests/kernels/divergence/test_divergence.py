"""linear_token_divergence: the definition against textbooks, each kind alone, laws, refusals.

What it shares with the other operators of the lm head (the definition on hostile shapes, broken rows, frozen leaves,
compilation) is in tests/kernels/lm_head/test_operators.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from mmrpt_kernels import linear_token_divergence
from mmrpt_kernels.divergence import fused
from mmrpt_kernels.divergence.api import KINDS, TokenDivergence
from mmrpt_kernels.lm_head.chunk_sizes import ChunkRows
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.testing import HEAD_CASES, HeadCase, head_inputs, on_a_grid
from tests.kernels.lm_head.operators import (
    DEVICE,
    DIVERGENCE,
    DOUBLE,
    PLAIN,
    SMALL,
    LargestTensor,
    assert_same,
    draw,
    mixed_sum,
    name_of,
    run,
    served,
)

pytestmark = [
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, which the interpreter runs on, of probability zero
]
BACKENDS = ("portable", "reference", "triton")
by_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def serves(request) -> None:
    """A backend that this machine lacks skips the test; in the interpreter a row has one program."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if "backend" in params:
        served(DIVERGENCE, params["backend"])


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend == "triton" else DOUBLE


def equal_views(case: HeadCase, seed: int) -> dict:
    """A case's float32 inputs on a grid, the second view a copy of the first."""
    made = draw(case, seed, dtype=torch.float32)
    sizes = {"hidden": 1.0, "weight": case.logit_size / math.sqrt(case.hidden), "bias": 1.0}
    made |= {name: on_a_grid(made[name].detach(), size) for name, size in sizes.items() if made[name] is not None}
    return made | {"hidden_q": made["hidden"].clone()}


def test_the_definition_against_torch_distributions(seed):
    made = draw(PLAIN, seed)
    out = DIVERGENCE.call(made, backend="reference")
    p, q = (torch.distributions.Categorical(logits=made[n] @ made["weight"].T) for n in ("hidden", "hidden_q"))
    m = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
    kl = torch.distributions.kl_divergence
    hit = made["targets"] >= 0
    log_p, log_q = (d.log_prob(made["targets"].clamp_min(0)) * hit for d in (p, q))
    d = log_q - log_p
    expected = {"kl": kl(p, q), "reverse_kl": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}
    expected |= {"k3": (d.exp() - d - 1).clamp(0, 10), "logps_p": log_p, "logps_q": log_q}
    assert_same(out, expected | {"entropy_p": p.entropy(), "entropy_q": q.entropy()})


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_gradcheck(backend, seed):
    made = draw(SMALL._replace(rows=6), seed)
    head_q = (made["weight"].detach() + 0.1 * torch.randn_like(made["weight"])).requires_grad_()

    def outputs(*leaves):
        new = made | dict(zip(DIVERGENCE.leaves, leaves[:4], strict=True))
        return tuple(DIVERGENCE.call(new | {"weight_q": leaves[4]}, backend=backend).values())

    assert torch.autograd.gradcheck(outputs, (*(made[name] for name in DIVERGENCE.leaves), head_q))


def test_k3_is_an_estimate_of_kl_under_p(seed):
    made = draw(HeadCase("tiny", 3, 4, 9, logit_size=1.0), seed)
    every = torch.arange(9, device=DEVICE).repeat(3, 1)
    views = [made[n][:, None].expand(3, 9, 4) for n in ("hidden", "hidden_q")]
    out = linear_token_divergence(*views, made["weight"], targets=every, kind=("k3", "kl"))
    k3, kl = out.divergence.unbind(-1)
    assert k3.max() < 10, "the clamp would bias the estimate"
    torch.testing.assert_close((out.logps_p.exp() * k3).sum(-1), kl[:, 0])


@pytest.mark.parametrize("kind", [*((kind,) for kind in KINDS), ("js", "kl", "js"), ("js", "reverse_kl")], ids=str)
@pytest.mark.parametrize("case", [SMALL._replace(rows=2), PLAIN._replace(rows=2, vocab=301)], ids=name_of)
@pytest.mark.parametrize("backend", ("portable", "triton"))
def test_kinds_alone_and_together(backend, case, kind, seed):
    """What a kernel leaves out for a kind changes nothing for another."""
    made = draw(case, seed, dtype=dtype_of(backend))
    found, truth = (run(DIVERGENCE, made, seed, backend=b, kind=kind) for b in (backend, "reference"))
    rtol, atol = (1e-9, 1e-12) if backend == "portable" else (1e-4, 3e-5)
    assert_same(found, truth, rtol=rtol, atol=atol)
    alone = linear_token_divergence(
        made["hidden"], made["hidden_q"], made["weight"], kind=kind[0], bias=made["bias"],
        targets=made["targets"], backend=backend, **made["options"],
    ).divergence  # fmt: skip
    torch.testing.assert_close(alone.detach(), found[kind[0]])


WITH_TWO_HEADS = DIVERGENCE._replace(leaves=("hidden", "hidden_q", "weight", "weight_q"))


@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("backend", ("portable", "triton"))
def test_a_head_of_its_own_for_the_second_view(backend, wide, seed):
    """Of another hidden size, and perhaps another dtype: one float64 tensor makes every statistic float64."""
    if wide and backend == "triton":
        pytest.skip("no float64")
    made = draw(HeadCase("heads", 4, 8, 70, chunk_size=3), seed, dtype=torch.float32)
    made["hidden_q"] = made["hidden_q"].detach()[:, :5].requires_grad_()
    made["weight_q"] = made["weight"].detach()[:, 3:].to(DOUBLE if wide else torch.float32).requires_grad_()
    found, expected = (run(WITH_TWO_HEADS, made, seed, backend=name) for name in (backend, "reference"))
    assert found["kl"].dtype == found["entropy_p"].dtype == (DOUBLE if wide else torch.float32)
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("height", (ChunkRows(5, 5), ChunkRows(3, 8)), ids=("in_place", "apart"))
@pytest.mark.parametrize("fixed", [(), ("weight_q",), ("hidden_q", "weight_q", "bias"), ("hidden", "weight", "bias")])
def test_the_same_head_twice(fixed, height, monkeypatch, seed):
    """One matrix in memory as both heads is one product; its gradients are still two, or those of one view alone."""
    monkeypatch.setattr(fused, "chunk_rows", lambda *_, **__: height)
    with_both = DIVERGENCE._replace(leaves=(*DIVERGENCE.leaves, "weight_q"))
    results = []
    for backend, head_q in (
        ("portable", lambda w: w.view_as(w)),
        ("portable", torch.clone),
        ("reference", torch.clone),
    ):
        made = draw(PLAIN._replace(bias=True), seed)
        made["weight_q"] = head_q(made["weight"].detach()).requires_grad_()
        for name in fixed:
            made[name].requires_grad_(False)
        results.append(run(with_both, made, seed, backend=backend))
    for found in results[:2]:
        assert_same(found, results[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("read", [*KINDS, *TokenDivergence._fields[1:], "logps_p and entropy_q"])
def test_what_no_loss_reads_changes_nothing(read, seed):
    """A gradient of some outputs alone: the others' are missing, not zero."""
    results = []
    for backend in ("portable", "reference"):
        made = draw(SMALL, seed)
        out = DIVERGENCE.call(made, backend=backend)
        total = mixed_sum({name: value for name, value in out.items() if name in read.split()}, seed)
        results.append(torch.autograd.grad(total, [made[n] for n in DIVERGENCE.leaves], allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [SMALL, PLAIN], ids=name_of)
def test_row_kernels_take_a_chunk_a_row_at_a_time_or_whole(case, monkeypatch, seed):
    whole = run(DIVERGENCE, draw(case, seed), seed, backend="portable")
    monkeypatch.setattr(fused, "BLOCK_BYTES", 1)
    assert_same(run(DIVERGENCE, draw(case, seed), seed, backend="portable"), whole, rtol=1e-12, atol=1e-13)


def test_leading_dimensions(seed):
    made = draw(PLAIN._replace(rows=24), seed)
    views, targets = (made["hidden"], made["hidden_q"]), made["targets"]
    flat = linear_token_divergence(*views, made["weight"], targets=targets, kind=KINDS)
    shaped = (view.view(4, 6, -1).transpose(0, 1) for view in views)
    out = linear_token_divergence(*shaped, made["weight"], targets=targets.view(4, 6).T, kind=KINDS)
    assert out.divergence.shape == (6, 4, len(KINDS)) and out.entropy_p.shape == (6, 4)
    for one, expected in zip(out, flat, strict=True):
        torch.testing.assert_close(one.transpose(0, 1).reshape(expected.shape), expected)
    one = linear_token_divergence(views[0][0], views[1][0], made["weight"])
    assert one.divergence.shape == () and one.logps_p is None and one.logps_q is None
    torch.testing.assert_close(one.divergence, flat.divergence[0, 0])


@pytest.mark.parametrize("size", [1e-6, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("vocab", [1, 2, 5, 40, 293])
@pytest.mark.parametrize("backend", ("portable", "triton"))
def test_bounds_and_symmetry(backend, vocab, size, seed):
    made = draw(HeadCase("law", 4, 6, vocab, logit_size=size), seed, dtype=torch.float32)
    out = DIVERGENCE.call(made, backend=backend)
    kl, reverse, js, k3 = (out[kind] for kind in KINDS)
    assert all((out[kind] >= 0).all() for kind in KINDS) and (k3 <= 10).all() and (js <= math.log(2)).all()
    noise = 1e-6 * max(1.0, size)
    assert (js <= (kl + reverse) / 8 + noise).all()  # by way of Hellinger's distance (Taneja)
    for part in (out["entropy_p"], out["entropy_q"]):
        assert (part >= 0).all() and (part <= math.log(vocab) + 1e-5).all()
    assert (out["logps_p"] <= 0).all() and (out["logps_q"] <= 0).all()
    swapped = DIVERGENCE.call(made | {"hidden": made["hidden_q"], "hidden_q": made["hidden"]}, backend=backend)
    # A logit is a sum of 6 products, which other views may add in another order: each result of two views changes by
    # at most twice what two logits do.
    sizes = max((made[n].abs() @ made["weight"].abs().T).max().item() for n in ("hidden", "hidden_q"))
    tolerance = {"rtol": 1e-5, "atol": 2 * 6 * torch.finfo(torch.float32).eps * max(1.0, sizes)}
    for name, expected in (("kl", reverse), ("reverse_kl", kl), ("js", js)):
        torch.testing.assert_close(swapped[name], expected, **tolerance)


@by_backend
@pytest.mark.parametrize("case", HEAD_CASES, ids=name_of)
def test_equal_views_have_no_divergence(case, backend, seed):
    if backend == "triton" and DEVICE == "cpu":
        case = case._replace(rows=min(case.rows, 2))
    out = DIVERGENCE.call(equal_views(case, seed), backend=backend)
    for kind in KINDS:
        # log((p + p) / 2) and log p differ in the definition's last bits
        assert (out[kind] <= (1e-6 if (kind, backend) == ("js", "reference") else 0.0)).all(), f"{kind}, seed {seed}"


@pytest.mark.parametrize("case", HEAD_CASES, ids=name_of)
def test_equal_views_that_the_product_rounds_apart(case, seed):
    """By twice the distance of two logits, each a sum of H products and a bias; exp in k3 rounds besides."""
    made = draw(case, seed, dtype=torch.float32)
    out = DIVERGENCE.call(made | {"hidden_q": made["hidden"].detach().clone()})
    size = made["hidden"].abs() @ made["weight"].abs().T + (0.0 if made["bias"] is None else made["bias"].abs())
    apart = (case.hidden + 1) * size.amax(-1) * case.logit_scale / case.temperature
    for kind in KINDS:
        assert (out[kind] <= (2.0 * apart + 2.0) * torch.finfo(torch.float32).eps).all(), f"{kind}, seed {seed}"


@by_backend
def test_disjoint_views_reach_the_upper_ends(backend):
    weight, hidden = 200 * torch.eye(4, device=DEVICE), torch.eye(4, device=DEVICE)
    out = linear_token_divergence(hidden[:2], hidden[2:], weight, kind=("js", "kl"), backend=backend)
    torch.testing.assert_close(out.divergence.cpu(), torch.tensor([math.log(2), 200.0]).expand(2, 2))


@by_backend
def test_k3_clamps_and_its_gradient_stops_there(backend):
    weight, zeros = torch.eye(3, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    hidden_p = torch.zeros(3, 3, device=DEVICE).requires_grad_()
    hidden_q = (torch.tensor([[50.0], [3.0], [-50.0]]) * torch.eye(3)[:1]).to(DEVICE).requires_grad_()
    out = linear_token_divergence(hidden_p, hidden_q, weight, targets=zeros, kind="k3", backend=backend)
    d = (out.logps_q - out.logps_p).detach().clamp(-20, 20)
    torch.testing.assert_close(out.divergence.detach(), (d.exp() - d - 1).clamp(0, 10))
    assert out.divergence[2] == 10
    grads = torch.autograd.grad(out.divergence.sum(), [hidden_p, hidden_q])
    assert all((g[2] == 0).all() and (g[1] != 0).all() for g in grads)


def test_half_precision_gradients_accumulate_in_float32():
    """A bfloat16 sum of 2048 equal chunks would stop growing after 256 of them."""
    rows, half = 4096, {"dtype": torch.bfloat16, "device": DEVICE}
    hidden, hidden_q = torch.ones(rows, 1, **half), torch.zeros(rows, 1, **half)
    weight = torch.tensor([[0.5], [-0.5]], **half).requires_grad_()
    out = linear_token_divergence(hidden, hidden_q, weight, chunk_size=2)
    (actual,) = torch.autograd.grad(out.divergence.sum(), weight)
    wide = weight.detach().double().requires_grad_()
    truth = linear_token_divergence(hidden.double(), hidden_q.double(), wide, backend="reference")
    (expected,) = torch.autograd.grad(truth.divergence.sum(), wide)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=0.0)


def test_no_logits_for_all_rows_in_memory():
    """The largest tensor made without gradients is a chunk of both views, and results hold no reference to one."""
    made = head_inputs(HeadCase("long", 400, 4, 500, ignored="none"), device=DEVICE)
    tensors = (made["hidden"], made["hidden_q"], made["weight"], None, None, made["targets"])
    pair = fused.Pair(*tensors, KINDS, HeadOptions(), LoopOptions("portable", 10))
    with LargestTensor() as seen:
        fused.forward(pair)
    assert 10 * 500 <= seen.size <= 2 * 10 * 500
