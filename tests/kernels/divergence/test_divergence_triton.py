"""The Triton row kernels of linear_token_divergence, forward and backward, against the definition, and their laws.

Without a GPU Triton's interpreter runs the kernels on small shapes; with one the same cases run for real, and larger
ones. What the compiler makes of the kernels is in test_divergence_compile.py.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels import linear_token_divergence
from mmrpt_kernels.backends import BackendError
from mmrpt_kernels.divergence import pair_softmax, triton_forward
from mmrpt_kernels.divergence.api import KINDS, TokenDivergence
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.testing import (
    HEAD_CASES,
    HeadCase,
    assert_close_to_truth,
    head_inputs,
    poisoned_memory,
    sum_cap,
    sum_error,
)
from tests.kernels.devices import INTERPRETING, by_case_and_device, on_devices
from tests.kernels.divergence.test_divergence import PLAIN, SMALL, call, eager_run, equal_views, leaves, mixed_sum, run

# numpy, which the interpreter runs on, says aloud what a word of probability zero is masked for.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered",
    "ignore:divide by zero encountered",
    "ignore:overflow encountered",
    "ignore:All-NaN slice",
    "ignore:Conversion of an array",
)

CASES = (
    *(case._replace(rows=min(case.rows, 4)) for case in HEAD_CASES if case.name not in ("qwen_vocab", "no_rows")),
    HeadCase("no_rows", 0, 8, 33),
    HeadCase("two_words", 5, 4, 2, bias=True),
    HeadCase("exactly_one_program", 3, 8, 256, ignored="none"),
    HeadCase("one_word_beyond_it", 3, 8, 257),
    HeadCase("negative_scale_and_softcap", 4, 8, 60, softcap=30.0, logit_scale=-1.2),
    HeadCase("negative_scale", 4, 8, 60, logit_scale=-1.2),
)
QWEN = HeadCase("qwen_vocab", 3, 4, 151_936)
GPU_CASES = (
    HeadCase("long", 300, 64, 32_003, bias=True, temperature=0.9),
    HeadCase("qwen_rows", 65, 128, 151_936),
    HeadCase("gemma", 33, 64, 262_144, softcap=30.0),
    *HEAD_CASES,
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a short row has several programs, and a program several tiles."""
    if INTERPRETING:
        monkeypatch.setattr(triton_forward, "BLOCK", 128)
        monkeypatch.setattr(triton_forward, "SPAN", 256)


def large_tiles(monkeypatch):
    """So that the interpreter, whose time goes by operations, gets through a long row."""
    if INTERPRETING:
        monkeypatch.setattr(triton_forward, "BLOCK", 16_384)
        monkeypatch.setattr(triton_forward, "SPAN", 65_536)


def meets_the_definition(case, device, dtype, seed):
    """Every output and gradient of all kinds by the error rule."""
    actual = run(case, "triton", dtype, seed, device=device)
    truth = run(case, "reference", dtype, seed, upcast=True)
    eager = eager_run(case, dtype, seed)
    # A divergence subtracts log-probabilities, and these are what rounds; a gradient multiplies such a difference by
    # the weight's rows or by hidden states. In half precision eager's own rounding is larger than that.
    logps = 6 * case.logit_size * abs(case.logit_scale) / case.temperature + math.log(case.vocab)
    factors = {"d_hidden": case.logit_size / math.sqrt(case.hidden), "d_weight": 1.0, "d_bias": 1.0}
    factors["d_hidden_q"] = factors["d_hidden"]
    cap, summed = sum_cap(case.vocab, exponents=case.logit_size, dtype=dtype), sum_error(case.vocab, dtype)
    for key, value in truth.items():
        floor = logps * factors.get(key, 1.0) if dtype == torch.float32 or key not in factors else 0.0
        rule = {"dtype": dtype, "floor": floor, "eager_cap": cap, "slack": summed * key.startswith("d_hidden")}
        assert_close_to_truth(actual[key], eager[key], value, name=f"{case.name} {key}", **rule)


@by_case_and_device(CASES, GPU_CASES)
def test_it_meets_the_definition(case, device, seed):
    meets_the_definition(case, device, torch.float32, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_case_and_device([CASES[1], CASES[-2]], GPU_CASES)
def test_half_precision(case, device, dtype, seed):
    meets_the_definition(case, device, dtype, seed)


@on_devices
def test_a_long_vocabulary(device, monkeypatch, seed):
    large_tiles(monkeypatch)
    meets_the_definition(QWEN, device, torch.float32, seed)


@pytest.mark.parametrize("kind", [*KINDS, ("js", "kl", "js"), ("js", "reverse_kl")], ids=str)
@on_devices
def test_kinds_alone_and_together(kind, device, seed):
    """What a kernel leaves out for a kind changes nothing for another: against portable, all gradients."""
    case = PLAIN._replace(rows=2, vocab=301)
    actual, expected = (
        run(case, backend, torch.float32, seed, kind, device=device) for backend in ("triton", "portable")
    )
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=3e-5, msg=lambda m, n=name: f"{n}, seed {seed}: {m}"
        )


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

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @on_devices
    def test_a_row_without_gradient_gets_zeros_whatever_it_holds(self, value, device):
        raw_p, raw_q, targets = chunk_of_logits(device)
        raw_p[1], raw_q[1], raw_q[3, 7] = value, value, value
        grads = row_grads(5, device)
        for part in grads:
            part[1] = part[3] = 0.0
        for gradient in gradients(raw_p, raw_q, targets, grads):
            assert (gradient[[1, 3]] == 0).all()
            assert gradient[[0, 2, 4]].isfinite().all() and (gradient[[0, 2, 4]] != 0).any(-1).all()

    @on_devices
    def test_a_view_without_gradient_gets_zeros(self, device):
        raw_p, raw_q, targets = chunk_of_logits(device)
        raw_q[2] = float("nan")
        grads = row_grads(5, device, 0.0)
        grads.entropy_p[2] = 1.0
        d_p, d_q = gradients(raw_p, raw_q, targets, grads)
        assert (d_p[2] != 0).any() and (d_q == 0).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @on_devices
    def test_a_bad_row_leaves_the_others_alone(self, value, device):
        raw_p, raw_q, targets = chunk_of_logits(device)
        clean = values(raw_p, raw_q, targets, KINDS)
        raw_p[4, 260] = value
        good = torch.arange(5, device=device) != 4
        for name, a, b in zip(clean._fields, values(raw_p, raw_q, targets, KINDS), clean, strict=True):
            assert torch.equal(a[good], b[good]), name
            if name in ("divergence", "logps_p", "entropy_p"):
                assert a[4].isnan().all(), f"{name}: {a[4]}"

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
    def test_a_bias_is_the_same_as_logits_that_have_it(self, device):
        raw_p, raw_q, targets = chunk_of_logits(device)
        bias = torch.randn(raw_p.shape[-1], generator=torch.Generator().manual_seed(2)).to(device)
        added, apart = ((raw_p + bias, raw_q + bias), None), ((raw_p, raw_q), bias)
        results = []
        for raw, own in (added, apart):
            wanted, outs = pair_softmax.Wanted(KINDS, learns=True), tuple(torch.empty_like(one) for one in raw)
            found, state = pair_softmax.statistics(KERNELS, raw, targets, wanted, head(raw_p, own))
            slopes = pair_softmax.slopes_of(row_grads(5, device), found, targets, KINDS)
            KERNELS.gradients(state, targets, found, slopes, head(raw_p, own), outs)
            results.append([*found, *outs])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @on_devices
    def test_a_target_outside_the_vocabulary_is_seen(self, device):
        """The argument checks cannot look at targets on a GPU without waiting for it."""
        raw_p, raw_q, targets = chunk_of_logits(device)
        targets[0], targets[1] = 301, -100
        found = values(raw_p, raw_q, targets, ("k3",))
        for part in (found.logps_p, found.logps_q, found.divergence[:, 0]):
            assert part[0].isnan() and part[1] == 0 and part[2:].isfinite().all()


class TestLaws:
    @by_case_and_device([*CASES, QWEN._replace(rows=1)], GPU_CASES)
    def test_equal_views_have_no_divergence(self, case, device, monkeypatch, seed):
        if case.vocab > 100_000:
            large_tiles(monkeypatch)
        out = call(equal_views(case, device, seed), case, backend="triton")
        assert (out.divergence == 0).all(), f"seed {seed}: {out.divergence}"

    @pytest.mark.parametrize("size", [1e-6, 1.0, 30.0, 1e4])
    @pytest.mark.parametrize("vocab", [1, 2, 5, 293])
    @on_devices
    def test_bounds_and_symmetry(self, vocab, size, device, seed):
        case = HeadCase("law", 4, 6, vocab, logit_size=size)
        made = head_inputs(case, device=device, seed=seed)
        out = call(made, case, backend="triton")
        kl, reverse, js, k3 = out.divergence.unbind(-1)
        assert (out.divergence >= 0).all() and (k3 <= 10).all() and (js <= math.log(2)).all()
        noise = 1e-6 * max(1.0, size)
        assert (js <= (kl + reverse) / 8 + noise).all()  # by way of Hellinger's distance (Taneja)
        for part in (out.entropy_p, out.entropy_q):
            assert (part >= 0).all() and (part <= math.log(vocab)).all()
        assert (out.logps_p <= 0).all() and (out.logps_q <= 0).all()
        swapped = call(made | {"hidden": made["hidden_q"], "hidden_q": made["hidden"]}, case, backend="triton")
        expected = torch.stack([reverse, kl, js], -1)
        torch.testing.assert_close(swapped.divergence[:, :3], expected, rtol=1e-5, atol=1e-6 * max(1.0, size))

    @on_devices
    def test_a_uniform_row_has_no_more_than_all_entropy(self, device):
        zeros = torch.zeros(2, 293, device=device)
        found = values(zeros, zeros.clone(), None, ("kl",))
        assert (found.entropy_p <= math.log(293)).all()
        torch.testing.assert_close(found.entropy_p.cpu(), torch.full((2,), math.log(293)))

    @on_devices
    def test_disjoint_views_reach_the_upper_ends(self, device):
        weight = 200 * torch.eye(4, device=device)
        hidden = torch.eye(4, device=device)
        out = linear_token_divergence(hidden[:2], hidden[2:], weight, kind=("js", "kl"), backend="triton")
        torch.testing.assert_close(out.divergence.cpu(), torch.tensor([math.log(2), 200.0]).expand(2, 2))


class TestOperator:
    """The whole operator by name: what the loop makes of the kernels."""

    @on_devices
    def test_a_banned_word_counts_for_nothing(self, device, seed):
        """A bias of -inf is the same as a smaller vocabulary, gradients included."""
        made = head_inputs(PLAIN._replace(ignored="none", vocab=300, rows=4), device=device, seed=seed)
        made["targets"] %= 200
        banned = torch.zeros(300, device=device)
        banned[200:] = -torch.inf
        results = []
        for one in (made | {"bias": banned}, made | {"weight": made["weight"][:200]}):
            wrt = leaves(one)
            one["bias"] = None if one["bias"] is None else one["bias"].detach()
            out = call(one, PLAIN, backend="triton")
            results.append([*out, *torch.autograd.grad(mixed_sum(out, seed), [wrt["hidden"], wrt["weight"]])])
        assert (results[0][-1][200:] == 0).all()
        results[0][-1] = results[0][-1][:200]
        for name, a, b in zip((*TokenDivergence._fields, "d_hidden", "d_weight"), *results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    @on_devices
    def test_a_bad_row_without_gradient_reaches_no_weight(self, device, seed):
        made = head_inputs(PLAIN._replace(rows=6), device=device, seed=seed)
        keep = torch.arange(6, device=device) != 4
        made["hidden"][4] = float("nan")
        wrt = leaves(made)
        with poisoned_memory():
            out = call(made, PLAIN, backend="triton")
            wanted = [wrt["hidden"], wrt["hidden_q"], wrt["weight"]]
            found = torch.autograd.grad(mixed_sum([part[keep] for part in out], seed), wanted)
        assert all(gradient.isfinite().all() for gradient in found)
        assert (found[0][4] == 0).all() and (found[1][4] == 0).all()

    @on_devices
    def test_ignored_targets(self, device, seed):
        case = PLAIN._replace(ignored="all", rows=4)
        wrt = leaves(made := head_inputs(case, device=device, seed=seed))
        out = call(made, case, kind=("k3", "kl"), backend="triton")
        assert (out.logps_p == 0).all() and (out.logps_q == 0).all() and (out.divergence[:, 0] == 0).all()
        assert (out.divergence[:, 1] > 0).all()
        scalar = out.logps_p.sum() + out.logps_q.sum() + out.divergence[:, 0].sum()
        assert all((g == 0).all() for g in torch.autograd.grad(scalar, list(wrt.values())))

    @on_devices
    def test_a_head_of_its_own_for_the_second_view(self, device, seed):
        torch.manual_seed(seed)
        tensors = [torch.randn(*size).to(device) for size in ((4, 8), (4, 5), (70, 8), (70, 5))]

        def outputs(backend):
            p, q, weight, weight_q = wrt = [t.clone().requires_grad_() for t in tensors]
            out = linear_token_divergence(p, q, weight, weight_q=weight_q, kind=("kl", "js"), backend=backend)
            return [out.divergence, *torch.autograd.grad(mixed_sum(out, seed), wrt)]

        for a, b in zip(outputs("triton"), outputs("portable"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @on_devices
    def test_opcheck(self, device, seed):
        made = head_inputs(SMALL._replace(rows=2), device=device, seed=seed)
        hidden, hidden_q, weight, bias = (made[n].requires_grad_() for n in ("hidden", "hidden_q", "weight", "bias"))
        operator = torch.ops.mmrpt_kernels.linear_token_divergence.default
        rest = ("kl,js,k3", *HeadOptions(0.8, 4.0, 1.3), *LoopOptions("triton", 4))
        torch.library.opcheck(operator, (hidden, hidden_q, weight, None, bias, made["targets"], *rest))

    @on_devices
    def test_compile_without_graph_break(self, device, fresh_compiler, seed):
        wrt = leaves(made := head_inputs(SMALL._replace(rows=3), device=device, seed=seed))

        def outputs(targets):
            return call(made | {"targets": targets}, SMALL, backend="triton")

        expected = torch.autograd.grad(mixed_sum(outputs(made["targets"]), seed), list(wrt.values()))
        compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(mixed_sum(compiled(made["targets"]), seed), list(wrt.values()))
        for name, a, b in zip(wrt, actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    def test_float64_is_refused(self):
        hidden, weight = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(5, 3)
        with pytest.raises(BackendError, match=r"divergence.*'triton'.*float64.*portable"):
            linear_token_divergence(hidden, hidden, weight.double(), backend="triton")
        with pytest.raises(BackendError, match="float64"):  # one wide tensor makes wide statistics
            linear_token_divergence(hidden.float(), hidden.float(), weight.double(), backend="triton")
