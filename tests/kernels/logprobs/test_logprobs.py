"""linear_logprobs: the definition against torch, portable against the definition, laws, hostile rows, compilation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrpt_kernels.lm_head import chunk_loop
from mmrpt_kernels.logprobs import fused, linear_logprobs
from mmrpt_kernels.testing import (
    HEAD_CASES,
    HeadCase,
    assert_close_to_truth,
    head_inputs,
    poisoned_memory,
    sum_cap,
    sum_error,
)

SMALL = HeadCase("small", 6, 5, 11, bias=True, temperature=0.8, softcap=4.0, logit_scale=1.3, chunk_size=4)
PLAIN = HeadCase("plain", 13, 16, 101, chunk_size=5)
HEAD_OPTIONS = ("temperature", "softcap", "logit_scale", "chunk_size")


def case_name(case: HeadCase) -> str:
    return case.name


def make(case: HeadCase, seed: int, dtype=torch.float64, upcast: bool = False) -> dict:
    """Inputs of a case as leaves; `upcast` widens the `dtype` values to float64."""
    made = head_inputs(case, dtype=dtype, seed=seed)
    for name in ("hidden", "weight", "bias"):
        if made[name] is not None:
            made[name] = (made[name].double() if upcast else made[name]).requires_grad_()
    return made


def call(made: dict, case: HeadCase, **overrides):
    options = {name: getattr(case, name) for name in HEAD_OPTIONS} | {"return_entropy": True, "bias": made["bias"]}
    return linear_logprobs(made["hidden"], made["weight"], made["targets"], **(options | overrides))


def run(case: HeadCase, seed: int, *, backend: str, dtype=torch.float64, upcast: bool = False, **overrides) -> dict:
    """Outputs and gradients by name; every output has its own random factor, some of them exactly zero."""
    made = make(case, seed, dtype, upcast)
    wrt = {name: made[name] for name in ("hidden", "weight", "bias") if made[name] is not None}
    generator = torch.Generator().manual_seed(seed + 1)
    factors = torch.randn(2, case.rows, generator=generator, dtype=torch.float64)
    factors[:, torch.rand(case.rows, generator=generator) < 0.3] = 0.0
    with poisoned_memory():
        out = call(made, case, backend=backend, **overrides)
        total = (out.logps * factors[0].to(out.logps.dtype)).sum()
        if out.entropy is not None:
            total = total + (out.entropy * factors[1].to(out.logps.dtype)).sum()
        grads = torch.autograd.grad(total, list(wrt.values()))
    named = {"logps": out.logps.detach()} | ({} if out.entropy is None else {"entropy": out.entropy.detach()})
    return named | {f"d_{name}": grad for name, grad in zip(wrt, grads, strict=True)}


def assert_same(one: dict, other: dict, **tolerance) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


class TestReference:
    def test_is_cross_entropy_and_categorical_entropy(self, seed):
        made = make(PLAIN, seed)
        out = call(made, PLAIN, backend="reference")
        logits = made["hidden"] @ made["weight"].T
        expected = -F.cross_entropy(logits, made["targets"], reduction="none")
        torch.testing.assert_close(out.logps, expected)
        wanted = made["targets"] != -100
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(out.entropy[wanted], entropy[wanted])

    def test_order_of_bias_scale_cap_and_temperature(self, seed):
        made = make(SMALL, seed)
        raw = made["hidden"] @ made["weight"].T + made["bias"]
        z = 4.0 * torch.tanh(1.3 * raw / 4.0) / 0.8
        wanted = made["targets"] != -100
        expected = z.log_softmax(-1).gather(1, made["targets"].clamp(min=0)[:, None])[:, 0]
        torch.testing.assert_close(call(made, SMALL, backend="reference").logps[wanted], expected[wanted])

    def test_gradcheck(self, seed):
        made = make(SMALL, seed)

        def outputs(hidden, weight, bias):
            return call(made | {"hidden": hidden, "weight": weight, "bias": bias}, SMALL, backend="reference")

        assert torch.autograd.gradcheck(outputs, (made["hidden"], made["weight"], made["bias"]))


class TestPortable:
    @pytest.mark.parametrize("case", HEAD_CASES, ids=case_name)
    def test_equals_reference_in_float64(self, case, seed):
        # eps * the size of the logits is what a float64 logit itself is known to.
        tolerance = {"rtol": 1e-9, "atol": 1e-12 * max(1.0, case.logit_size)}
        assert_same(run(case, seed, backend="portable"), run(case, seed, backend="reference"), **tolerance)

    @pytest.mark.parametrize("case", (SMALL, PLAIN), ids=case_name)
    def test_equals_reference_without_entropy(self, case, seed):
        found = run(case, seed, backend="portable", return_entropy=False)
        assert "entropy" not in found
        assert_same(found, run(case, seed, backend="reference", return_entropy=False))

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
    @pytest.mark.parametrize("case", HEAD_CASES, ids=case_name)
    def test_low_precision_by_the_error_rule(self, case, dtype, seed):
        case = case._replace(logit_size=min(case.logit_size, 1e3)) if dtype == torch.float16 else case  # its range
        truth = run(case, seed, backend="reference", dtype=dtype, upcast=True)
        eager = run(case, seed, backend="reference", dtype=dtype)
        found = run(case, seed, backend="portable", dtype=dtype)
        size = 10.0 * max(1.0, case.logit_size)  # logits enter log-probs by subtraction
        for name, value in found.items():
            of_input = name.startswith("d_")
            assert_close_to_truth(
                value,
                eager[name],
                truth[name],
                name=f"{case.name} {name} seed {seed}",
                dtype=value.dtype if of_input else torch.float32,
                floor=0.0 if of_input else size,
                eager_cap=sum_cap(case.vocab, exponents=case.logit_size, dtype=value.dtype),
                slack=sum_error(case.vocab, value.dtype) if name == "d_hidden" else 0.0,
            )

    def test_log_prob_contract_with_bfloat16_inputs(self, seed):
        """Within 1e-5 of float64 given the same inputs, at a large vocabulary and logits of a trained size."""
        case = HeadCase("contract", 12, 64, 151_936, logit_size=4.0, ignored="none")
        with torch.no_grad():
            found = call(make(case, seed, torch.bfloat16), case).logps.double()
            truth = call(make(case, seed, torch.bfloat16, upcast=True), case, backend="reference").logps
        assert (found - truth).abs().max() < 1e-5, f"seed {seed}"

    def test_log_prob_contract_where_float32_products_round_to_bfloat16(self, seed):
        """A process may let float32 products on a CPU round their inputs: bfloat16 inputs lose nothing by it."""
        products = torch.backends.mkldnn.matmul
        before = products.fp32_precision
        products.fp32_precision = "bf16"
        try:
            self.test_log_prob_contract_with_bfloat16_inputs(seed)
        finally:
            products.fp32_precision = before

    @pytest.mark.parametrize("chunk_size", (1, 2, 7, 13, 1000, None))
    def test_chunk_size_changes_nothing(self, chunk_size, seed):
        whole = run(PLAIN, seed, backend="portable", chunk_size=13)
        assert_same(run(PLAIN, seed, backend="portable", chunk_size=chunk_size), whole, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("case", (SMALL, PLAIN), ids=case_name)
    def test_without_compaction_nothing_else_changes(self, case, seed):
        """All rows, and nothing waits: the same numbers, whatever ignored rows hold."""
        made = make(case, seed)
        ignored = made["targets"] == -100
        with torch.no_grad():
            made["hidden"][ignored] = float("nan")
        wrt = [made[name] for name in ("hidden", "weight", "bias") if made[name] is not None]
        results = []
        for compact in (True, False):
            out = call(made, case, compact=compact)
            total = (out.logps * torch.arange(case.rows)).sum() + out.entropy.sum()
            results.append((*out, *torch.autograd.grad(total, wrt)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)

    def test_a_float64_bias_makes_gradients_float64(self, seed):
        """Of a bfloat16 head, whose products may otherwise be rounded."""
        made = make(PLAIN, seed, torch.bfloat16)
        made["bias"] = torch.randn(101, dtype=torch.float64).requires_grad_()
        found, expected = (
            torch.autograd.grad(call(made, PLAIN, backend=name).logps.sum(), made["bias"])
            for name in ("portable", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)

    def test_without_compaction_all_rows_may_be_ignored(self, seed):
        made = make(PLAIN, seed)
        made["targets"] = torch.full_like(made["targets"], -100)
        out = call(made, PLAIN, compact=False)
        assert not out.logps.any() and not out.entropy.any()
        grads = torch.autograd.grad(out.logps.sum() + out.entropy.sum(), (made["hidden"], made["weight"]))
        assert not any(grad.any() for grad in grads)

    def test_row_does_not_depend_on_its_batch(self, seed):
        made = make(PLAIN, seed)
        alone = {name: made[name][3:4] for name in ("hidden", "targets")}
        made["targets"] = made["targets"].clamp(min=0)
        alone["targets"] = made["targets"][3:4]
        both = call(made, PLAIN).logps[3:4], call(made | alone, PLAIN).logps
        torch.testing.assert_close(*both, rtol=0, atol=1e-14)


class TestLaws:
    @settings(max_examples=40, deadline=None)
    @given(
        vocab=st.integers(1, 40),
        size=st.sampled_from([1e-4, 1.0, 30.0, 1e4]),
        temperature=st.floats(0.05, 20.0),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
        seed=st.integers(0, 10_000),
    )
    def test_ranges(self, vocab, size, temperature, dtype, seed):
        case = HeadCase("law", 9, 4, vocab, logit_size=size, temperature=temperature, ignored="none", chunk_size=4)
        for backend in ("portable", "reference"):
            out = call(make(case, seed, dtype), case, backend=backend)
            assert (out.logps <= 0).all() and out.logps.isfinite().all()
            log_vocab = torch.tensor(math.log(vocab), dtype=out.entropy.dtype)
            assert (out.entropy >= 0).all() and (out.entropy <= log_vocab).all()

    def test_ignored_rows_are_zero_and_get_nothing(self, seed):
        made = make(PLAIN, seed)
        ignored = made["targets"] == -100
        assert ignored.any() and not ignored.all()
        out = call(made, PLAIN)
        assert (out.logps[ignored] == 0).all() and (out.entropy[ignored] == 0).all()
        (out.logps.sum() + out.entropy.sum()).backward()
        assert (made["hidden"].grad[ignored] == 0).all()

    def test_softmax_shift_invariance(self, seed):
        """A bias that is the same for every word changes nothing."""
        made = make(PLAIN, seed)
        shifted = call(made, PLAIN, bias=torch.full((PLAIN.vocab,), 3.0, dtype=torch.float64))
        torch.testing.assert_close(shifted.logps, call(made, PLAIN).logps)


class TestHostileRows:
    @pytest.fixture(params=("kept", "recomputed"))
    def route(self, request, monkeypatch) -> None:
        """The backward works from the forward's exponentials, or from logits that it makes again."""
        monkeypatch.setattr(fused, "KEPT_BYTES", fused.KEPT_BYTES if request.param == "kept" else {})

    @pytest.mark.parametrize("backend", ("portable", "reference"))
    @pytest.mark.parametrize("poison", (float("nan"), float("inf")))
    def test_ignored_poison_stays_outside(self, backend, poison, seed):
        made = make(PLAIN, seed)
        clean = run(PLAIN, seed, backend=backend)
        ignored = (made["targets"] == -100).nonzero().squeeze(-1)
        with torch.no_grad():
            made["hidden"][ignored] = poison
        out = call(made, PLAIN, backend=backend)
        torch.testing.assert_close(out.logps, clean["logps"])
        out.logps.sum().backward()
        assert made["weight"].grad.isfinite().all()
        assert (made["hidden"].grad[ignored] == 0).all()

    @pytest.mark.parametrize("poison", (float("nan"), float("inf")))
    def test_poison_without_gradient_does_not_reach_the_weight(self, poison, route, seed):
        """A NaN row that a trainer's mask multiplies by zero: eager gives NaN * 0, the fused backward skips the row."""
        case = PLAIN._replace(ignored="none")
        made = make(case, seed)
        with torch.no_grad():
            made["hidden"][4] = poison
        out = call(made, case)
        assert out.logps[4].isnan() and out.logps.isnan().sum() == 1
        keep = torch.arange(case.rows) != 4
        torch.where(keep, out.logps, 0.0).sum().backward()
        assert made["weight"].grad.isfinite().all()
        assert (made["hidden"].grad[4] == 0).all()

    @pytest.mark.parametrize("entropy", (0.0, 1.0))
    def test_active_poison_spoils_its_own_row_and_every_word(self, entropy, route, seed):
        case = PLAIN._replace(ignored="none")
        made = make(case, seed)
        with torch.no_grad():
            made["hidden"][4] = float("nan")
        out = call(made, case)
        (out.logps.sum() + (entropy * out.entropy.sum() if entropy else 0.0)).backward()
        others = torch.arange(case.rows) != 4
        assert made["hidden"].grad[others].isfinite().all() and made["hidden"].grad[4].isnan().all()
        assert made["weight"].grad.isnan().all()

    @pytest.mark.parametrize("entropy", (0.0, 5.0))
    @pytest.mark.parametrize("backend", ("portable", "reference"))
    def test_forbidden_words_are_missing_words(self, backend, entropy, seed):
        """A bias of -inf: probability 0 and no NaN, with slopes above 1 too, by which the largest float overflows."""
        made = make(PLAIN._replace(ignored="none"), seed)
        made["targets"] = made["targets"].clamp(max=49)
        few = made | {"weight": made["weight"][:50]}
        bias = torch.zeros(101, dtype=torch.float64).index_fill_(0, torch.arange(50, 101), -torch.inf)
        outs = call(made | {"bias": bias}, PLAIN, backend=backend), call(few, PLAIN, backend="reference")
        totals = [5.0 * out.logps.sum() + (entropy * out.entropy.sum() if entropy else 0.0) for out in outs]
        grads = [torch.autograd.grad(total, (made["hidden"], made["weight"])) for total in totals]
        torch.testing.assert_close([*outs[0], *grads[0]], [*outs[1], *grads[1]])
        assert (grads[0][1][50:] == 0).all()


class TestWork:
    def test_backward_visits_only_rows_with_a_gradient(self, seed, monkeypatch):
        visited, loop = [], chunk_loop.chunk_loop

        def counting(projections, selection, *rest, **options):
            visited.append(selection.rows.tolist())
            return loop(projections, selection, *rest, **options)

        for module in (chunk_loop, fused):
            monkeypatch.setattr(module, "chunk_loop", counting)
        case = PLAIN._replace(ignored="none")
        made = make(case, seed)
        out = call(made, case)
        (out.logps + 0.1 * out.entropy)[torch.tensor([2, 7])].sum().backward()
        assert visited == [list(range(case.rows)), [2, 7]]

    @pytest.mark.parametrize("frozen", (("weight",), ("hidden",), ("bias",), ("weight", "bias"), ("hidden", "weight")))
    def test_frozen_combinations(self, frozen, seed):
        expected = run(SMALL, seed, backend="reference")
        made = make(SMALL, seed)
        for name in frozen:
            made[name].requires_grad_(False)
        wrt = [name for name in ("hidden", "weight", "bias") if name not in frozen]
        generator = torch.Generator().manual_seed(seed + 1)
        factors = torch.randn(2, SMALL.rows, generator=generator, dtype=torch.float64)
        factors[:, torch.rand(SMALL.rows, generator=generator) < 0.3] = 0.0
        out = call(made, SMALL)
        ((out.logps * factors[0]).sum() + (out.entropy * factors[1]).sum()).backward()
        for name in wrt:
            torch.testing.assert_close(made[name].grad, expected[f"d_{name}"])
        assert all(made[name].grad is None for name in frozen)

    def test_tied_embeddings(self, seed):
        """The head's weight is also the table its inputs come from: both gradients add up."""
        grads = []
        for backend in ("portable", "reference"):
            torch.manual_seed(seed)
            table = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
            ids = torch.randint(31, (2, 9))
            hidden = torch.tanh(F.embedding(ids, table))
            linear_logprobs(hidden[:, :-1], table, ids[:, 1:], backend=backend).logps.sum().backward()
            grads.append(table.grad)
        torch.testing.assert_close(*grads)

    def test_not_contiguous(self, seed):
        torch.manual_seed(seed)
        hidden = torch.randn(5, 8, 3, dtype=torch.float64).permute(2, 0, 1).requires_grad_()  # (3, 5, 8)
        weight = torch.randn(8, 17, dtype=torch.float64).t().requires_grad_()
        targets = torch.randint(17, (5, 3)).t()
        out = linear_logprobs(hidden, weight, targets, return_entropy=True)
        straight = linear_logprobs(
            hidden.contiguous(), weight.contiguous(), targets.contiguous(), return_entropy=True, backend="reference"
        )
        torch.testing.assert_close(out, straight)
        found, expected = (
            torch.autograd.grad((o.logps * 2 + o.entropy).sum(), (hidden, weight)) for o in (out, straight)
        )
        torch.testing.assert_close(found, expected)

    def test_leading_shapes(self, seed):
        torch.manual_seed(seed)
        weight = torch.randn(7, 4)
        assert linear_logprobs(torch.randn(4), weight, torch.tensor(3)).logps.shape == ()
        assert linear_logprobs(torch.randn(2, 0, 4), weight, torch.zeros(2, 0).long()).logps.shape == (2, 0)
        assert linear_logprobs(torch.randn(2, 3, 5, 4), weight, torch.zeros(2, 3, 5).long()).logps.shape == (2, 3, 5)
