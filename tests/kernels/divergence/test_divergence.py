"""linear_token_divergence: the definition against textbooks, portable against the definition, laws, compilation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mmrpt_kernels import linear_token_divergence
from mmrpt_kernels.divergence import fused
from mmrpt_kernels.divergence.api import KINDS, TokenDivergence
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.testing import (
    HEAD_CASES,
    HeadCase,
    assert_close_to_truth,
    head_inputs,
    on_a_grid,
    poisoned_memory,
    sum_cap,
    sum_error,
)

SMALL = HeadCase("small", 6, 5, 11, bias=True, temperature=0.8, softcap=4.0, logit_scale=1.3, chunk_size=4)
PLAIN = HeadCase("plain", 13, 16, 101, chunk_size=5)


def call(made, case, *, kind=KINDS, **overrides) -> TokenDivergence:
    options = {name: getattr(case, name) for name in ("temperature", "softcap", "logit_scale", "chunk_size")}
    options |= {"targets": made["targets"], "bias": made["bias"]} | overrides
    return linear_token_divergence(made["hidden"], made["hidden_q"], made["weight"], kind=kind, **options)


def leaves(made) -> dict[str, torch.Tensor]:
    """The differentiable tensors, as fresh leaves put back into `made`."""
    found = {name: t for name, t in made.items() if t is not None and t.is_floating_point()}
    for name, tensor in found.items():
        found[name] = made[name] = tensor.detach().clone().requires_grad_()
    return found


def mixed_sum(out, seed: int, keep: torch.Tensor | None = None) -> torch.Tensor:
    """A scalar in which every finite output has its own coefficient; rows outside `keep` (rows,) have none."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for part in out:
        if part is None:
            continue
        factors = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part)
        if keep is not None:
            part, factors = part[keep], factors[keep]
        total = total + (part * factors).sum()
    return total


def equal_views(case, device="cpu", seed=0) -> dict:
    """A case's inputs on a grid, the second view a copy of the first."""
    made = head_inputs(case, device=device, seed=seed)
    sizes = {"hidden": 1.0, "weight": case.logit_size / math.sqrt(case.hidden), "bias": 1.0}
    made |= {name: on_a_grid(made[name], size) for name, size in sizes.items() if made[name] is not None}
    return made | {"hidden_q": made["hidden"].clone()}


def run(case, backend, dtype, seed, kind=KINDS, upcast=False, device="cpu"):
    """Outputs and gradients of one backend by name, brought back to the CPU; `upcast` computes in float64 from inputs
    rounded to `dtype`."""
    made = head_inputs(case, dtype=dtype, device=device, seed=seed)
    if upcast:
        made = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in made.items()}
    wrt = leaves(made)
    with poisoned_memory():
        out = call(made, case, kind=kind, backend=backend)
        gradients = torch.autograd.grad(mixed_sum(out, seed), list(wrt.values()))
    found = out._asdict() | {f"d_{name}": g for name, g in zip(wrt, gradients, strict=True)}
    return {name: value.cpu() for name, value in found.items()}


class TestReference:
    """The definition itself: against distributions of torch, and its derivative against finite differences."""

    def test_against_torch_distributions(self, seed):
        made = head_inputs(PLAIN, dtype=torch.float64, seed=seed)
        out = call(made, PLAIN, backend="reference")
        p = torch.distributions.Categorical(logits=made["hidden"] @ made["weight"].T)
        q = torch.distributions.Categorical(logits=made["hidden_q"] @ made["weight"].T)
        m = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
        kl = torch.distributions.kl_divergence
        expected = {
            "kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "js": (kl(p, m) + kl(q, m)) / 2,
        }
        for name, value in expected.items():
            torch.testing.assert_close(out.divergence[:, KINDS.index(name)], value, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(out.entropy_p, p.entropy())
        torch.testing.assert_close(out.entropy_q, q.entropy())
        hit = made["targets"] >= 0
        log_p, log_q = (d.log_prob(made["targets"].clamp_min(0)) * hit for d in (p, q))
        torch.testing.assert_close(out.logps_p, log_p)
        torch.testing.assert_close(out.logps_q, log_q)
        d = log_q - log_p
        torch.testing.assert_close(out.divergence[:, KINDS.index("k3")], (d.exp() - d - 1).clamp(0, 10))

    @pytest.mark.parametrize("backend", ["reference", "portable"])
    def test_gradcheck(self, backend, seed):
        made = head_inputs(SMALL, dtype=torch.float64, seed=seed)
        tensors = [made[name].requires_grad_() for name in ("hidden", "hidden_q", "weight", "bias")]
        head_q = (made["weight"].detach() + 0.1 * torch.randn(11, 5, dtype=torch.float64)).requires_grad_()

        def outputs(hidden, hidden_q, weight, bias, weight_q):
            new = made | {"hidden": hidden, "hidden_q": hidden_q, "weight": weight, "bias": bias}
            return tuple(call(new, SMALL, weight_q=weight_q, backend=backend))

        assert torch.autograd.gradcheck(outputs, (*tensors, head_q))

    def test_k3_is_an_estimate_of_kl_under_p(self, seed):
        made = head_inputs(HeadCase("tiny", 3, 4, 9, logit_size=1.0, ignored="none"), dtype=torch.float64, seed=seed)
        every = torch.arange(9).repeat(3, 1)
        rows = {n: made[n][:, None].expand(3, 9, 4) for n in ("hidden", "hidden_q")}
        out = linear_token_divergence(
            rows["hidden"], rows["hidden_q"], made["weight"], targets=every, kind=("k3", "kl")
        )
        k3, kl = out.divergence.unbind(-1)
        assert k3.max() < 10, "the clamp would bias the estimate"
        torch.testing.assert_close((out.logps_p.exp() * k3).sum(-1), kl[:, 0])


class TestPortable:
    """Against the definition, forward and backward, on hostile shapes."""

    @pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: case.name)
    def test_float64_equals_the_definition(self, case, seed):
        actual, truth = (run(case, backend, torch.float64, seed) for backend in ("portable", "reference"))
        for name, value in truth.items():
            torch.testing.assert_close(
                actual[name],
                value,
                rtol=1e-9,
                atol=1e-12 * max(1.0, case.logit_size),
                msg=lambda m, n=name: f"{n}: {m}",
            )

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("case", [SMALL, PLAIN], ids=lambda case: case.name)
    def test_each_kind_alone(self, case, kind, seed):
        actual, truth = (run(case, backend, torch.float64, seed, kind) for backend in ("portable", "reference"))
        assert actual["divergence"].shape == (case.rows,)
        for name, value in truth.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", ["prime_vocab", "qwen_vocab", "bias_and_temperature", "softcap_and_scale"])
    def test_error_rule(self, name, dtype, seed):
        case = next(case for case in HEAD_CASES if case.name == name)
        actual = run(case, "portable", dtype, seed)
        truth = run(case, "reference", dtype, seed, upcast=True)
        eager = eager_run(case, dtype, seed)
        logit = 6 * case.logit_size / case.temperature  # what is subtracted to make a divergence or a log-probability
        cap, summed = sum_cap(case.vocab, exponents=case.logit_size, dtype=dtype), sum_error(case.vocab, dtype)
        for key, value in truth.items():
            floor = 0.0 if key.startswith("d_") else logit
            rule = {"dtype": dtype, "floor": floor, "eager_cap": cap, "slack": summed * key.startswith("d_hidden")}
            assert_close_to_truth(actual[key], eager[key], value, name=f"{name} {key}", **rule)

    def test_huge_logits_stay_finite(self, seed):
        case = next(case for case in HEAD_CASES if case.name == "huge_logits")
        for name, value in run(case, "portable", torch.float32, seed).items():
            assert value.isfinite().all(), f"{name}, seed {seed}"

    def test_leading_dimensions_and_strides(self, seed):
        made = head_inputs(PLAIN._replace(rows=24), seed=seed)
        flat = call(made, PLAIN)
        strided = made | {
            "hidden": made["hidden"].view(4, 6, -1).transpose(0, 1),
            "hidden_q": made["hidden_q"].repeat_interleave(2, dim=-1)[..., ::2].view(4, 6, -1).transpose(0, 1),
            "weight": made["weight"].T.contiguous().T,
            "targets": made["targets"].view(4, 6).T,
        }
        assert not any(strided[name].is_contiguous() for name in strided if strided[name] is not None)
        out = call(strided, PLAIN)
        assert out.divergence.shape == (6, 4, len(KINDS)) and out.entropy_p.shape == (6, 4)
        for field, expected in flat._asdict().items():
            back = getattr(out, field).transpose(0, 1).reshape(expected.shape)
            torch.testing.assert_close(back, expected, msg=lambda m, n=field: f"{n}: {m}")

    @pytest.mark.parametrize("wide", ("hidden", "hidden_q", "weight", "weight_q", "bias"))
    def test_one_float64_tensor_makes_everything_float64(self, wide, seed):
        made = head_inputs(SMALL, dtype=torch.float32, seed=seed)
        made["weight_q"] = made["weight"] + 0.1
        wrt = leaves(made)
        made[wide] = made[wide].double()
        results = {}
        for backend in ("reference", "portable"):
            out = call(made, SMALL, weight_q=made["weight_q"], backend=backend)
            assert all(part.dtype == torch.float64 for part in out)
            results[backend] = [*out, *torch.autograd.grad(mixed_sum(out, seed), list(wrt.values()))]
        torch.testing.assert_close(results["portable"][:5], results["reference"][:5], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(results["portable"][5:], results["reference"][5:], rtol=1e-6, atol=1e-6)

    def test_one_vector_without_leading_dimensions(self, seed):
        made = head_inputs(PLAIN, seed=seed)
        one = linear_token_divergence(made["hidden"][0], made["hidden_q"][0], made["weight"])
        assert one.divergence.shape == () and one.logps_p is None and one.logps_q is None
        torch.testing.assert_close(one.divergence, call(made, PLAIN, kind="kl").divergence[0])

    @pytest.mark.parametrize("detached", ["hidden_q", "hidden", "weight"])
    def test_a_detached_input_gets_none_and_the_others_the_same(self, detached, seed):
        made = head_inputs(PLAIN, dtype=torch.float64, seed=seed)
        wrt = leaves(made)
        full = dict(zip(wrt, torch.autograd.grad(mixed_sum(call(made, PLAIN), seed), wrt.values()), strict=True))
        made[detached] = made[detached].detach()
        rest = [name for name in wrt if name != detached]
        partial = torch.autograd.grad(mixed_sum(call(made, PLAIN), seed), [wrt[name] for name in rest])
        for name, value in zip(rest, partial, strict=True):
            torch.testing.assert_close(value, full[name])

    @pytest.mark.parametrize("learns", [True, False])
    def test_the_same_head_twice(self, learns, seed):
        """One matrix in memory as both heads is one product; its gradients are still two."""
        made = head_inputs(PLAIN, dtype=torch.float64, seed=seed)
        results = []
        for head_q in (lambda w: w.view_as(w), lambda w: w.clone()):
            wrt = leaves(dict(made))
            weight_q = head_q(wrt["weight"].detach()).requires_grad_(learns)
            out = call(wrt | {"targets": made["targets"], "bias": None}, PLAIN, weight_q=weight_q)
            sources = [*wrt.values(), *([weight_q] if learns else [])]
            results.append([*out, *torch.autograd.grad(mixed_sum(out, seed), sources)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_detaching_the_whole_second_view(self, seed):
        made = head_inputs(PLAIN, dtype=torch.float64, seed=seed)
        wrt = leaves(made)
        out = call(made | {"hidden_q": made["hidden_q"].detach()}, PLAIN, kind="kl", weight_q=made["weight"].detach())
        (actual,) = torch.autograd.grad(out.divergence.sum(), wrt["weight"])
        logq = F.log_softmax(made["hidden_q"] @ made["weight"].T, -1).detach()
        logp = F.log_softmax(made["hidden"] @ wrt["weight"].T, -1)
        (truth,) = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), wrt["weight"])
        torch.testing.assert_close(actual, truth)

    @pytest.mark.parametrize("read", [*TokenDivergence._fields, "logps_p and entropy_q", "divergence twice"])
    def test_what_no_loss_reads_changes_nothing(self, read, seed):
        """A gradient of some outputs alone: the others' are missing, not zero."""
        results = []
        for backend in ("portable", "reference"):
            wrt = leaves(made := head_inputs(SMALL, dtype=torch.float64, seed=seed))
            kind = ("kl", "js", "kl") if read == "divergence twice" else KINDS
            out = call(made, SMALL, kind=kind, backend=backend)
            parts = [getattr(out, field) for field in out._fields if field in read.split()]
            results.append(torch.autograd.grad(mixed_sum(parts, seed), list(wrt.values()), allow_unused=True))
        for name, a, b in zip(wrt, *results, strict=True):
            b = torch.zeros_like(a) if b is None else b
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.parametrize("case", [SMALL, PLAIN], ids=lambda case: case.name)
    def test_the_cache_does_not_decide(self, case, monkeypatch, seed):
        """Row kernels that take a chunk a row at a time, and whole."""
        whole = run(case, "portable", torch.float64, seed)
        monkeypatch.setattr(fused, "BLOCK_BYTES", 1)
        for name, value in run(case, "portable", torch.float64, seed).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.parametrize("wide", ["hidden", "hidden_q", "weight", "bias"])
    def test_one_wide_tensor(self, wide, seed):
        """Views of two dtypes are projected apart; everything is as wide as its widest part."""
        results = []
        for backend in ("portable", "reference"):
            made = head_inputs(SMALL, seed=seed)
            wrt = leaves(made | {wide: made[wide].double()})
            out = call(wrt | {"targets": made["targets"]}, SMALL, backend=backend)
            results.append([*out, *torch.autograd.grad(mixed_sum(out, seed), list(wrt.values()))])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def eager_run(case, dtype, seed):
    """Plain PyTorch in `dtype`: logits by linear in that dtype, softmax as autocast does it, in float32."""
    made = head_inputs(case, dtype=dtype, seed=seed)
    wrt = leaves(made)
    logs = []
    for name in ("hidden", "hidden_q"):
        raw = F.linear(made[name], made["weight"], made["bias"]) * case.logit_scale
        if case.softcap:
            raw = case.softcap * torch.tanh(raw / case.softcap)
        logs.append(F.log_softmax(raw.float() / case.temperature, -1))
    lp, lq = logs
    p, q, hit = lp.exp(), lq.exp(), made["targets"] >= 0
    on_target = [torch.where(hit, x.gather(-1, made["targets"].clamp_min(0)[:, None])[:, 0], 0.0) for x in logs]
    mean = ((p + q) / 2).clamp_min(1e-38).log()
    d = (on_target[1] - on_target[0]).clamp(-20, 20)
    columns = (
        (p * (lp - lq)).sum(-1),
        (q * (lq - lp)).sum(-1),
        (p * (lp - mean) + q * (lq - mean)).sum(-1) / 2,
        (d.exp() - d - 1).clamp(0, 10),
    )
    out = TokenDivergence(torch.stack(columns, -1), *on_target, -(p * lp).sum(-1), -(q * lq).sum(-1))
    gradients = torch.autograd.grad(mixed_sum(out, seed), list(wrt.values()))
    return out._asdict() | {f"d_{name}": g for name, g in zip(wrt, gradients, strict=True)}


class TestPoison:
    """What is not finite stays where it is."""

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_bad_row_leaves_the_others_alone(self, backend, value, seed):
        made = head_inputs(PLAIN, seed=seed)
        clean = call(made, PLAIN, backend=backend)
        made["hidden"][4] = value
        good = torch.arange(PLAIN.rows) != 4
        for field, part in call(made, PLAIN, backend=backend)._asdict().items():
            torch.testing.assert_close(part[good], getattr(clean, field)[good], msg=lambda m, n=field: f"{n}: {m}")
            if field in ("divergence", "entropy_p"):
                assert not part[4].isfinite().all()

    def test_a_bad_row_without_gradient_reaches_no_weight(self, seed):
        made = head_inputs(PLAIN, seed=seed)
        keep = torch.arange(PLAIN.rows) != 4
        without = {n: t[keep] if n in ("hidden", "hidden_q", "targets") else t for n, t in made.items()}
        wrt = leaves(without)
        expected = torch.autograd.grad(mixed_sum(call(without, PLAIN), seed), [wrt["hidden"], wrt["weight"]])
        made["hidden"][4] = float("nan")
        wrt = leaves(made)
        out = call(made, PLAIN)
        actual = torch.autograd.grad(mixed_sum([part[keep] for part in out], seed), [wrt["hidden"], wrt["weight"]])
        torch.testing.assert_close(actual[0][keep], expected[0])
        assert (actual[0][4] == 0).all()
        torch.testing.assert_close(actual[1], expected[1])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_a_banned_word_counts_for_nothing(self, dtype, seed):
        """A bias of -inf is the same as a smaller vocabulary, gradients included."""
        case = PLAIN._replace(ignored="none", vocab=30)
        made = head_inputs(case, dtype=dtype, seed=seed)
        made["targets"] %= 20
        banned = torch.zeros(30, dtype=dtype)
        banned[20:] = -torch.inf
        for backend in ("portable", "reference"):
            whole, part = made | {"bias": banned}, made | {"weight": made["weight"][:20]}
            results = []
            for one in (whole, part):
                wrt = leaves(one)
                one["bias"] = None if one["bias"] is None else one["bias"].detach()
                out = call(one, case, backend=backend)
                pair = [wrt["hidden"], wrt["weight"]]
                results.append([*out, *torch.autograd.grad(mixed_sum(out, seed), pair)])
            results[0][-1] = results[0][-1][:20]
            for name, a, b in zip((*TokenDivergence._fields, "d_hidden", "d_weight"), *results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, w=backend: f"{w} {n}: {m}")


class TestLaws:
    @settings(max_examples=25, deadline=None)
    @given(
        rows=st.integers(1, 9),
        vocab=st.integers(1, 40),
        size=st.sampled_from([1e-6, 1.0, 30.0, 1e4]),
        chunk=st.integers(1, 10),
        seed=st.integers(0, 1000),
    )
    def test_bounds_symmetry_and_chunks(self, rows, vocab, size, chunk, seed):
        case = HeadCase("law", rows, 6, vocab, logit_size=size, chunk_size=chunk)
        made = head_inputs(case, seed=seed)
        out = call(made, case)
        kl, reverse, js, k3 = out.divergence.unbind(-1)
        assert (out.divergence >= 0).all() and (k3 <= 10).all() and (js <= math.log(2)).all()
        noise = 1e-6 * max(1.0, size)
        assert (js <= (kl + reverse) / 8 + noise).all()  # by way of Hellinger's distance (Taneja)
        for part in (out.entropy_p, out.entropy_q):
            assert (part >= 0).all() and (part <= math.log(vocab) + 1e-5).all()
        assert (out.logps_p <= 0).all() and (out.logps_q <= 0).all()
        swapped = call(made | {"hidden": made["hidden_q"], "hidden_q": made["hidden"]}, case)
        # A logit is a sum of 6 products, which other chunks and views may add in another order: each result of two
        # views changes by at most twice what two logits do.
        sizes = max(made[name].abs().matmul(made["weight"].abs().T).max().item() for name in ("hidden", "hidden_q"))
        tolerance = {"rtol": 1e-5, "atol": 2 * 6 * torch.finfo(torch.float32).eps * max(1.0, sizes)}
        torch.testing.assert_close(swapped.divergence[:, :3], torch.stack([reverse, kl, js], -1), **tolerance)
        for field, part in call(made, case, chunk_size=rows)._asdict().items():
            torch.testing.assert_close(part, getattr(out, field), **tolerance, msg=lambda m, n=field: f"{n}: {m}")

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_equal_views_have_no_divergence(self, backend, seed):
        for case in HEAD_CASES:
            out = call(equal_views(case, seed=seed), case, backend=backend)
            js = KINDS.index("js")
            if backend == "reference":  # log((p + p) / 2) and log p differ in their last bits
                assert (out.divergence[:, js] <= 1e-6).all(), f"{case.name}, seed {seed}: {out.divergence[:, js]}"
                out.divergence[:, js] = 0
            assert (out.divergence == 0).all(), f"{case.name}, seed {seed}: {out.divergence}"

    @pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: case.name)
    def test_equal_views_that_the_product_rounds_apart(self, case, seed):
        """By twice the distance of two logits, each a sum of H products and a bias; exp in k3 rounds besides."""
        made = head_inputs(case, seed=seed)
        out = call(made | {"hidden_q": made["hidden"].clone()}, case)
        size = made["hidden"].abs() @ made["weight"].abs().T + (0.0 if made["bias"] is None else made["bias"].abs())
        apart = (case.hidden + 1) * size.amax(-1, keepdim=True) * case.logit_scale / case.temperature
        assert (out.divergence <= (2.0 * apart + 2.0) * torch.finfo(torch.float32).eps).all(), f"seed {seed}"

    def test_disjoint_views_reach_the_upper_ends(self):
        weight = 200 * torch.eye(4)
        hidden_p, hidden_q = torch.eye(4)[:2], torch.eye(4)[2:]
        out = linear_token_divergence(hidden_p, hidden_q, weight, kind=("js", "kl"))
        torch.testing.assert_close(out.divergence, torch.tensor([math.log(2), 200.0]).expand(2, 2))

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_k3_clamps_and_its_gradient_stops_there(self, backend):
        weight = torch.eye(3)
        hidden_p = torch.tensor([[0.0, 0.0, 0.0]] * 3, requires_grad=True)
        hidden_q = torch.tensor([[50.0, 0.0, 0.0], [3.0, 0.0, 0.0], [-50.0, 0.0, 0.0]], requires_grad=True)
        targets = torch.zeros(3, dtype=torch.int64)
        out = linear_token_divergence(hidden_p, hidden_q, weight, targets=targets, kind="k3", backend=backend)
        d = (out.logps_q - out.logps_p).detach().clamp(-20, 20)
        torch.testing.assert_close(out.divergence.detach(), (d.exp() - d - 1).clamp(0, 10))
        assert out.divergence[2] == 10
        grads = torch.autograd.grad(out.divergence.sum(), [hidden_p, hidden_q])
        assert all((g[2] == 0).all() and (g[1] != 0).all() for g in grads)

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_ignored_targets(self, backend, seed):
        case = PLAIN._replace(ignored="all")
        wrt = leaves(made := head_inputs(case, seed=seed))
        out = call(made, case, kind=("k3", "kl"), backend=backend)
        assert (out.logps_p == 0).all() and (out.logps_q == 0).all() and (out.divergence[:, 0] == 0).all()
        assert (out.divergence[:, 1] > 0).all()
        scalar = out.logps_p.sum() + out.logps_q.sum() + out.divergence[:, 0].sum()
        assert all((g == 0).all() for g in torch.autograd.grad(scalar, list(wrt.values())))


class TestIntegration:
    """The operator inside torch.library, torch.compile, autocast and checkpointing."""

    def test_forward_mode_raises_where_it_would_be_dropped(self, seed):
        made = head_inputs(PLAIN, dtype=torch.float64, seed=seed)

        def values(hidden, backend):
            return call(made | {"hidden": hidden}, PLAIN, backend=backend).divergence

        with pytest.raises(RuntimeError, match="reverse-mode derivatives only"):
            torch.func.jvp(lambda h: values(h, "portable"), (made["hidden"],), (made["hidden"],))
        assert torch.func.jvp(lambda h: values(h, "reference"), (made["hidden"],), (made["hidden"],))[1].any()

    def test_opcheck(self, seed):
        made = head_inputs(SMALL, seed=seed)
        hidden, hidden_q, weight, bias = (made[n].requires_grad_() for n in ("hidden", "hidden_q", "weight", "bias"))
        operator = torch.ops.mmrpt_kernels.linear_token_divergence.default
        rest = ("kl,js,k3", *HeadOptions(0.8, 4.0, 1.3), *LoopOptions("portable", 4))
        torch.library.opcheck(operator, (hidden, hidden_q, weight, None, bias, made["targets"], *rest))
        rest = ("kl", *HeadOptions(), *LoopOptions("portable"))
        torch.library.opcheck(operator, (hidden, hidden_q, weight, weight, None, None, *rest))

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_compile_without_graph_break(self, backend, fresh_compiler, seed):
        wrt = leaves(made := head_inputs(SMALL, seed=seed))

        def outputs(targets):
            return call(made | {"targets": targets}, SMALL, backend=backend)

        expected = torch.autograd.grad(mixed_sum(outputs(made["targets"]), seed), list(wrt.values()))
        compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(mixed_sum(compiled(made["targets"]), seed), list(wrt.values()))
        for name, a, b in zip(wrt, actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.parametrize("backend", ["portable", "reference"])
    def test_autocast_casts_the_products_and_keeps_float32_statistics(self, backend, seed):
        wrt = leaves(made := head_inputs(PLAIN, seed=seed))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(made, PLAIN, backend=backend)
        grads = torch.autograd.grad(mixed_sum(out, seed), list(wrt.values()))
        assert all(part.dtype == torch.float32 for part in (*out, *grads))
        rounded = {n: t.bfloat16() if t is not None and t.is_floating_point() else t for n, t in made.items()}
        for field, part in call(rounded, PLAIN, backend=backend)._asdict().items():
            torch.testing.assert_close(part, getattr(out, field))

    def test_checkpointing(self, seed):
        wrt = leaves(made := head_inputs(PLAIN, seed=seed))

        def loss(hidden, hidden_q):
            return mixed_sum(call(made | {"hidden": hidden, "hidden_q": hidden_q}, PLAIN), seed)

        expected = torch.autograd.grad(loss(made["hidden"], made["hidden_q"]), list(wrt.values()))
        again = checkpoint(loss, made["hidden"], made["hidden_q"], use_reentrant=False)
        for a, b in zip(torch.autograd.grad(again, list(wrt.values())), expected, strict=True):
            assert torch.equal(a, b)

    def test_half_precision_gradients_accumulate_in_float32(self):
        """A bfloat16 sum of 2048 equal chunks would stop growing after 256 of them."""
        rows = 4096
        hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
        hidden_q = torch.zeros(rows, 1, dtype=torch.bfloat16)
        weight = torch.tensor([[0.5], [-0.5]], dtype=torch.bfloat16, requires_grad=True)
        out = linear_token_divergence(hidden, hidden_q, weight, chunk_size=2)
        (actual,) = torch.autograd.grad(out.divergence.sum(), weight)
        wide = weight.detach().double().requires_grad_()
        truth = linear_token_divergence(hidden.double(), hidden_q.double(), wide, backend="reference")
        (expected,) = torch.autograd.grad(truth.divergence.sum(), wide)
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=0.0)

    def test_no_logits_for_all_rows_in_memory(self):
        """The largest tensor made without gradients is a chunk, and results hold no reference to one."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Largest(TorchDispatchMode):
            size = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                for part in result if isinstance(result, (tuple, list)) else (result,):
                    if isinstance(part, torch.Tensor):
                        self.size = max(self.size, part.numel())
                return result

        made = head_inputs(HeadCase("long", 400, 4, 500, ignored="none"))
        tensors = (made["hidden"], made["hidden_q"], made["weight"], None, None, made["targets"])
        pair = fused.Pair(*tensors, KINDS, HeadOptions(), LoopOptions("portable", 10))
        with Largest() as seen:
            fused.forward(pair)
        assert 10 * 500 <= seen.size <= 2 * 10 * 500


class TestRefusals:
    @pytest.mark.parametrize(
        "change, words",
        [
            ({"kind": "cosine"}, ("kind", "'cosine'", "kl, reverse_kl, js, k3")),
            ({"kind": ()}, ("kind", "empty")),
            ({"kind": "k3"}, ("k3", "targets")),
            ({"hidden_q": torch.zeros(4, 8)}, ("hidden_q", "(4, 8)", "(3, 8)")),
            ({"hidden_q": torch.zeros(3, 7)}, ("hidden_q", "(3, 7)")),
            ({"hidden_p": torch.zeros(3, 8, dtype=torch.int32)}, ("hidden", "torch.int32")),
            ({"weight": torch.zeros(8, 20)}, ("weight", "(8, 20)")),
            ({"weight_q": torch.zeros(21, 8)}, ("weight_q", "(21, 8)")),
            ({"bias": torch.zeros(8)}, ("bias", "(8,)", "(20,)")),
            ({"targets": torch.zeros(2, dtype=torch.int64)}, ("targets", "(2,)")),
            ({"targets": torch.zeros(3)}, ("targets", "torch.float32", "torch.int64")),
            ({"targets": torch.tensor([0, 20, 1])}, ("targets", "20", "vocabulary")),
            ({"temperature": 0.0}, ("temperature",)),
            ({"chunk_size": 0}, ("chunk_size",)),
            ({"backend": "cuda"}, ("divergence", "cuda", "portable")),
        ],
    )
    def test_refusal_says_what_and_how(self, change, words):
        good = {"hidden_p": torch.zeros(3, 8), "hidden_q": torch.zeros(3, 8), "weight": torch.zeros(20, 8)}
        linear_token_divergence(**good)
        with pytest.raises(ValueError) as error:
            linear_token_divergence(**(good | change))
        for word in words:
            assert word in str(error.value)

    def test_another_hidden_size_for_the_second_view(self, seed):
        torch.manual_seed(seed)
        out = linear_token_divergence(
            torch.randn(3, 8), torch.randn(3, 5), torch.randn(20, 8), weight_q=torch.randn(20, 5)
        )
        assert (out.divergence > 0).all()
