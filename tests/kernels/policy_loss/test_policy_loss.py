"""linear_policy_loss and linear_token_loss: the definition, portable against it, laws, masks, compilation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.logprobs import linear_logprobs
from mmrpt_kernels.policy_loss import fused, linear_policy_loss, linear_token_loss, operator, reference
from mmrpt_kernels.policy_loss.options import PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import policy_rows, token_losses
from mmrpt_kernels.testing import (
    HEAD_CASES,
    HeadCase,
    assert_close_to_truth,
    head_inputs,
    poisoned_memory,
    sum_cap,
    sum_error,
)

D = torch.float64
BATCH = HeadCase("batch", 24, 8, 53, ignored="some", chunk_size=5)
SMALL = HeadCase("small", 8, 4, 9, bias=True, temperature=0.8, softcap=4.0, logit_scale=1.3, ignored="none")
HEAD_OPTIONS = ("temperature", "softcap", "logit_scale", "chunk_size")
LEAVES = ("hidden", "weight", "bias")
PER_TOKEN = ("old_logps", "ref_logps", "sampler_weights", "perception_mask")


def make(case: HeadCase, seed: int, *, batch: int = 1, dtype=D, upcast: bool = False, drift: float = 0.4) -> dict:
    """Arguments of a call by name: `rows` tokens as (batch, T), every optional tensor given; leaves require gradients.

    `drift`: standard deviation of the log-ratio; `upcast` widens the `dtype` values to float64.
    """
    raw = head_inputs(case, dtype=dtype, seed=seed)
    shape = (batch, case.rows // batch)
    generator = torch.Generator().manual_seed(seed + 7)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=D)

    made = {name: raw[name] for name in LEAVES}
    made["hidden"] = made["hidden"].view(*shape, case.hidden)
    made = {n: t if t is None else (t.double() if upcast else t).requires_grad_() for n, t in made.items()}
    made["targets"] = raw["targets"].view(shape)
    with torch.no_grad():
        wide = {n: None if made[n] is None else made[n].double() for n in LEAVES}
        head = {name: getattr(case, name) for name in ("temperature", "softcap", "logit_scale")}
        own = linear_logprobs(wide["hidden"], wide["weight"], made["targets"], bias=wide["bias"], **head).logps
    made["advantages"] = normal(shape[0])
    made["response_mask"] = torch.rand(shape, generator=generator) < 0.8
    made["perception_mask"] = torch.rand(shape, generator=generator) < 0.5
    made["trajectory_weights"] = torch.rand(shape[0], generator=generator, dtype=D) + 0.5
    made["old_logps"] = own + drift * normal(*shape)
    made["ref_logps"] = own + 0.5 * normal(*shape)
    made["sampler_weights"] = torch.rand(shape, generator=generator, dtype=D) + 0.5
    return made | {name: getattr(case, name) for name in HEAD_OPTIONS}


def call(made: dict, **overrides):
    return linear_policy_loss(**({"return_statistics": True} | made | overrides))


def run(made: dict, *, scale: float = 1.0, **overrides) -> dict:
    """Everything a call gives, by name: loss, gradients of scale * loss, logps, entropy, statistics."""
    wrt = {name: made[name] for name in LEAVES if made[name] is not None}
    with poisoned_memory():
        out = call(made, **overrides)
        grads = torch.autograd.grad(out.loss * scale, list(wrt.values()))
    named = {"loss": out.loss.detach(), "logps": out.logps, **out.statistics}
    if out.entropy is not None:
        named["entropy"] = out.entropy
    return named | {f"d_{name}": grad for name, grad in zip(wrt, grads, strict=True)}


def assert_same(one: dict, other: dict, *, leave_out=(), what: str = "", **tolerance) -> None:
    for name in (one.keys() | other.keys()) - set(leave_out):
        torch.testing.assert_close(one[name], other[name], msg=lambda m, n=name: f"{what} {n}: {m}", **tolerance)


VARIANTS = {
    "plain_on_policy": {"old_logps": None, "ref_logps": None, "sampler_weights": None, "perception_mask": None},
    "clipped": {"ref_logps": None, "sampler_weights": None, "perception_mask": None},
    "vppo": {"clip_high": 0.28, "dual_clip": 3.0, "entropy_coef": -0.06, "entropy_kind": "sampled"},
    "kept_entropy": {"entropy_coef": 0.05, "entropy_scope": "kept"},
    "entropy_and_k3": {"entropy_coef": 0.05, "kl_coef": 0.1, "aggregation": "sum"},
    "k1": {"kl_coef": 0.1, "kl_estimator": "k1", "aggregation": "sequence_mean"},
    "k2": {"kl_coef": -0.1, "kl_estimator": "k2", "normalizer": 13.0},
    "gspo": {"ratio_level": "sequence", "clip_low": 0.03, "clip_high": 0.04, "aggregation": "sequence_mean"},
    "gspo_everything": {"ratio_level": "sequence", "entropy_coef": 0.1, "kl_coef": 0.1, "dual_clip": 1.5},
    "gspo_on_policy": {"ratio_level": "sequence", "old_logps": None},
    "cispo": {"surrogate": "cispo", "clip_high": 0.28, "entropy_coef": 0.05},
    "cispo_by_sequence": {"surrogate": "cispo", "ratio_level": "sequence", "kl_coef": 0.1},
    "shaped": {"aggregation": "sum", "dual_clip": 1.05, "clip_low": 0.0, "clip_high": 0.0},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request) -> dict:
    return request.param


class TestReference:
    def test_by_hand(self):
        """Four tokens whose every number is worked out on paper."""
        logps = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], dtype=D)
        old = logps - torch.tensor([[1.5, 1.1], [0.5, 1.0]], dtype=D).log()
        every = torch.ones(2, 2, dtype=torch.bool)
        kept = torch.tensor([[True, True], [True, False]])
        advantages = torch.tensor([[2.0, 2.0], [-1.0, -1.0]], dtype=D)
        tokens = PolicyTokens(every, kept, advantages, old, None, None)
        losses = reference.loss_per_token(logps, logps, tokens, PolicyOptions(clip_low=0.2, clip_high=0.3))
        # 1.5 is clipped to 1.3; 1.1 is not; for A < 0, 0.5 is clipped to 0.8; the last token is filtered out.
        torch.testing.assert_close(losses, torch.tensor([[-2.6, -2.2], [0.8, 0.0]], dtype=D))
        with_ref = tokens._replace(ref_logps=logps + 0.3)
        for kind, value in (("k1", -0.3), ("k2", 0.045), ("k3", math.exp(0.3) - 1.3)):
            more = reference.loss_per_token(
                logps, logps, with_ref, PolicyOptions(kl_coef=2.0, kl_estimator=kind, clip_high=0.3)
            )
            torch.testing.assert_close(more - losses, torch.full((2, 2), 2 * value, dtype=D))

    def test_dual_clip_by_hand(self):
        tokens = PolicyTokens(*(torch.ones(3, 1, dtype=torch.bool),) * 2, *(None,) * 4)
        tokens = tokens._replace(
            advantages=torch.tensor([[-1.0], [-1.0], [1.0]], dtype=D),
            old_logps=-torch.tensor([[5.0], [2.0], [5.0]], dtype=D).log(),
        )
        losses = reference.loss_per_token(torch.zeros(3, 1, dtype=D), None, tokens, PolicyOptions(dual_clip=3.0))
        torch.testing.assert_close(losses, torch.tensor([[3.0], [2.0], [-1.2]], dtype=D))

    def test_aggregations_by_hand(self):
        losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        response = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
        for kind, count, value in (("token_mean", None, 2.5), ("sequence_mean", None, 3.0), ("sum", None, 10.0)):
            assert reference.aggregate(losses, response, kind, count).item() == value
        for kind, value in (("token_mean", 2.0), ("sequence_mean", 1.2), ("sum", 2.0)):
            assert reference.aggregate(losses, response, kind, 5.0).item() == pytest.approx(value)

    def test_gradcheck(self, variant, seed):
        made = make(SMALL, seed, batch=2)

        def loss(hidden, weight, bias):
            new = made | {"hidden": hidden, "weight": weight, "bias": bias}
            return call(new, backend="reference", **variant).loss

        stops = variant.get("surrogate") == "cispo" or variant.get("ratio_level") == "sequence"
        if stops or variant.get("old_logps", 0) is None:
            # A stop-gradient stands in the ratio: the value does not move the way the gradient says. Compare with the
            # surrogate's coefficients instead.
            coefficient_check(made, variant, seed)
            return
        assert torch.autograd.gradcheck(loss, tuple(made[name] for name in LEAVES))


def coefficient_check(made: dict, variant: dict, seed: int) -> None:
    """d loss / d logits of the reference = w * r * A' in tokens that are not clipped (CISPO: w * clip(r) * A' in all),
    written out by hand."""
    plain = {"entropy_coef": 0.0, "kl_coef": 0.0, "dual_clip": None}
    made = made | variant | plain
    logps = linear_logprobs(
        made["hidden"], made["weight"], made["targets"], bias=made["bias"], **{n: made[n] for n in HEAD_OPTIONS}
    ).logps
    response, kept = made["response_mask"], made["response_mask"]
    if made["perception_mask"] is not None:
        kept = kept & made["perception_mask"]
    ratio = torch.ones_like(logps)
    if made["old_logps"] is not None:
        gaps = (logps - made["old_logps"]).detach()
        if made.get("ratio_level") == "sequence":
            gaps = ((gaps * response).sum(1) / response.sum(1))[:, None].expand(logps.shape)
        ratio = gaps.exp()
    shaped = (made["advantages"] * made["trajectory_weights"])[:, None]
    limits = 1 - made.get("clip_low", 0.2), 1 + made.get("clip_high", 0.2)
    clipped = torch.where(shaped > 0, ratio > limits[1], ratio < limits[0])
    if made.get("surrogate") == "cispo":
        ratio, clipped = ratio.clamp(*limits), torch.zeros_like(clipped)
    sampler = 1.0 if made["sampler_weights"] is None else made["sampler_weights"]
    slope = -(ratio * shaped * sampler * (kept & ~clipped)).detach()
    if made.get("aggregation") == "sequence_mean":
        weights = 1 / response.sum(1, keepdim=True) / response.shape[0]
    else:
        weights = 1 / response.sum()
    expected = torch.autograd.grad((slope * weights * logps).sum(), [made[name] for name in LEAVES])
    found = torch.autograd.grad(call(made, backend="reference").loss, [made[name] for name in LEAVES])
    torch.testing.assert_close(found, expected)


class TestSurrogate:
    """The fused loss's own per-token function against the definition's, on given log-probs."""

    LOG_RATIOS = (-1e4, -100.0, math.log(0.8), -0.1, 0.0, 0.1, math.log(1.28), 1.0, 79.0, 81.0, 1e4)

    @pytest.mark.parametrize("dual_clip", (None, 3.0))
    @pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
    def test_values_and_slopes(self, dual_clip, estimator):
        grid = torch.tensor(list(itertools.product(self.LOG_RATIOS, (-2.0, 0.0, 0.5))), dtype=D)
        log_ratio, advantages = grid.unbind(1)
        for perception in (True, False):
            mask = torch.ones(len(grid), dtype=torch.bool)
            tokens = PolicyTokens(mask, mask & perception, advantages, -2.0 - log_ratio, -2.0 + log_ratio, None)
            options = PolicyOptions(0.3, estimator, 0.2, 0.28, dual_clip, 0.1, "response", "exact")
            given = torch.full_like(log_ratio, -2.0), torch.full_like(log_ratio, 1.5), tokens
            found = token_losses(*given, policy_rows(tokens), options)
            logps = torch.full_like(log_ratio, -2.0).requires_grad_()
            entropy = torch.full_like(log_ratio, 1.5).requires_grad_()
            losses = reference.loss_per_token(logps[:, None], entropy[:, None], columns(tokens), options)[:, 0]
            slopes = torch.autograd.grad(losses.sum(), (logps, entropy))
            for name, a, b in zip(("loss", "d_logp", "d_entropy"), found, (losses, *slopes), strict=True):
                assert a.isfinite().all(), name
                torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")

    def test_float32_never_overflows(self):
        log_ratio = torch.tensor([200.0, 1e30, 1e4])
        mask = torch.ones(3, dtype=torch.bool)
        for advantage in (-50.0, 50.0):
            tokens = PolicyTokens(mask, mask, torch.full((3,), advantage), -log_ratio, log_ratio, None)
            found = token_losses(torch.zeros(3), None, tokens, mask, PolicyOptions(kl_coef=1.0))
            assert found[0].isfinite().all() and found[1].isfinite().all()


def columns(tokens: PolicyTokens) -> PolicyTokens:
    """(n,) -> (n, 1): n sequences of one token."""
    return PolicyTokens(*(None if t is None else t[:, None] for t in tokens))


class TestPortable:
    def test_every_variant_equals_reference(self, variant, seed):
        for offset, statistics in itertools.product(range(3), (True, False)):
            made = make(BATCH, seed + offset, batch=4)
            found, expected = (
                run(made, scale=2.5, backend=backend, return_statistics=statistics, **variant)
                for backend in ("portable", "reference")
            )
            # Without statistics each backend may compute what it needs; only the loss and its gradients are promised.
            unpromised = () if statistics else ("logps",)
            assert_same(found, expected, leave_out=unpromised, what=f"seed {seed + offset}", rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: case.name)
    def test_hostile_shapes(self, case, seed):
        made = make(case, seed)
        made |= {"entropy_coef": 0.02, "kl_coef": 0.1, "kl_estimator": "k2"}
        tolerance = {"rtol": 1e-9, "atol": 1e-11 * max(1.0, case.logit_size)}
        assert_same(run(made, backend="portable"), run(made, backend="reference"), **tolerance)

    @pytest.mark.parametrize("chunk_size", (1, 3, 24, None))
    def test_chunk_size_changes_nothing(self, variant, chunk_size, seed):
        made = make(BATCH, seed, batch=4)
        whole = run(made, chunk_size=10**6, **variant)
        assert_same(run(made, chunk_size=chunk_size, **variant), whole, rtol=1e-11, atol=1e-13)

    def test_without_compaction_nothing_else_changes(self, variant, seed):
        """All rows, none counted: the same numbers, whatever masked tokens hold."""
        made = make(BATCH, seed, batch=4)
        outside = ~(made["response_mask"] & (made["targets"] != -100))
        with torch.no_grad():
            made["hidden"][outside] = float("nan")
        made["targets"] = torch.where(outside & (made["targets"] != -100), 10**6, made["targets"])
        for name in ("old_logps", "ref_logps", "sampler_weights"):
            made[name] = torch.where(outside, float("nan"), made[name])
        for statistics in (True, False):
            options = variant | {"return_statistics": statistics}
            tolerance = {"what": f"seed {seed}", "rtol": 1e-11, "atol": 1e-13}
            counted = run(made, **options)
            assert_same(run(made, compact=False, **options), counted, **tolerance)

    def test_without_compaction_all_tokens_may_be_masked(self, seed):
        made = make(BATCH, seed, batch=4)
        made["response_mask"] = torch.zeros_like(made["response_mask"])
        assert_same(run(made, compact=False), run(made), rtol=0, atol=0)

    @pytest.mark.parametrize("vocab", (1, 2))
    @pytest.mark.parametrize("softcap", (0.0, 5.0))
    def test_a_broken_row_without_gradient_spreads_nothing(self, vocab, softcap, seed):
        hidden, weight = torch.randn(3, 4), torch.randn(vocab, 4, requires_grad=True)
        hidden[1] = torch.nan
        hidden.requires_grad_()
        kept, advantages = torch.tensor([[True, False, True]]), torch.ones(1)
        whole = torch.ones_like(kept)
        out = linear_policy_loss(
            *(hidden[None], weight, torch.zeros(1, 3, dtype=torch.int64), advantages),
            response_mask=whole,
            perception_mask=kept,
            softcap=softcap,
            compact=False,
        )
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.loss, (hidden, weight)))

    @pytest.mark.parametrize("level", ("token", "sequence"))
    def test_a_token_that_the_old_policy_ruled_out(self, level, seed):
        made = make(BATCH, seed, batch=4)
        made["old_logps"][:, ::3] = -torch.inf
        found, expected = (run(made, ratio_level=level, backend=name) for name in ("portable", "reference"))
        assert_same(found, expected, rtol=1e-9, atol=1e-11)
        assert found["d_hidden"].isfinite().all()

    def test_a_broken_token_without_gradient_breaks_no_gradient(self, seed):
        """A response token outside the perception mask is looked at for the statistics, and only for them."""
        made = make(BATCH, seed, batch=4)
        idle = made["response_mask"] & (made["targets"] != -100) & ~made["perception_mask"]
        assert idle.any()
        whole = {compact: run(made, compact=compact) for compact in (True, False)}
        with torch.no_grad():
            made["hidden"][idle] = float("nan")
        for compact in (True, False):
            broken = run(made, compact=compact)
            for name in ("loss", "d_hidden", "d_weight"):
                torch.testing.assert_close(broken[name], whole[compact][name], rtol=1e-12, atol=1e-13)

    def test_statistics_do_not_change_the_loss(self, variant, seed):
        made = make(BATCH, seed, batch=4)
        without = run(made, return_statistics=False, **variant)
        with_them = run(made, **variant)
        for name in ("loss", "d_hidden", "d_weight"):
            torch.testing.assert_close(without[name], with_them[name], rtol=1e-11, atol=1e-13)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
    @pytest.mark.parametrize("name", ("prime_vocab", "qwen_vocab", "bias_and_temperature", "softcap_and_scale"))
    def test_low_precision_by_the_error_rule(self, name, dtype, seed):
        case = next(case for case in HEAD_CASES if case.name == name)
        options = {"entropy_coef": 0.02, "kl_coef": 0.1, "aggregation": "sum"}
        truth = run(make(case, seed, dtype=dtype, upcast=True), backend="reference", **options)
        eager = run(make(case, seed, dtype=dtype), backend="reference", **options)
        found = run(make(case, seed, dtype=dtype), backend="portable", **options)
        for key in ("loss", "logps", "entropy", "d_hidden", "d_weight"):
            of_input = key.startswith("d_")
            assert_close_to_truth(
                found[key],
                eager[key],
                truth[key],
                name=f"{name} {key} seed {seed}",
                dtype=dtype if of_input else torch.float32,
                floor=0.0 if of_input else 20.0,
                eager_cap=sum_cap(case.vocab, exponents=case.logit_size, dtype=found[key].dtype),
                slack=sum_error(case.vocab, found[key].dtype) if key == "d_hidden" else 0.0,
            )

    def test_frozen_and_unfrozen(self, seed):
        full = run(make(SMALL, seed, batch=2), entropy_coef=0.1)
        for flags in itertools.product((True, False), repeat=3):
            made = make(SMALL, seed, batch=2)
            for name, flag in zip(LEAVES, flags, strict=True):
                made[name].requires_grad_(flag)
            wrt = [name for name in LEAVES if made[name].requires_grad]
            out = call(made, entropy_coef=0.1)
            torch.testing.assert_close(out.loss.detach(), full["loss"])
            if not wrt:
                assert not out.loss.requires_grad
                continue
            out.loss.backward()
            for name in LEAVES:
                if name in wrt:
                    torch.testing.assert_close(made[name].grad, full[f"d_{name}"])
                else:
                    assert made[name].grad is None

    def test_tied_embeddings_and_strides(self, seed):
        grads = []
        for backend in ("portable", "reference"):
            torch.manual_seed(seed)
            table = torch.randn(8, 31, dtype=D).t().requires_grad_()  # (V, H), not contiguous
            ids = torch.randint(31, (3, 9))
            hidden = torch.tanh(F.embedding(ids, table)).transpose(0, 1)[:-1].transpose(0, 1)
            mask = torch.rand(8, 3).t() < 0.7
            assert not (table.is_contiguous() or hidden.is_contiguous() or mask.is_contiguous())
            out = linear_policy_loss(hidden, table, ids[:, 1:], torch.randn(3), response_mask=mask, backend=backend)
            grads += torch.autograd.grad(out.loss, table)
        torch.testing.assert_close(*grads)


class TestMasks:
    @pytest.mark.parametrize("backend", ("portable", "reference"))
    def test_masked_tokens_get_exactly_zero(self, variant, backend, seed):
        made = make(BATCH, seed, batch=4)
        found = run(made, backend=backend, **variant)
        response = made["response_mask"] & (made["targets"] != -100)
        assert (found["d_hidden"][~response] == 0).all()
        everywhere = variant.get("entropy_coef") and variant.get("entropy_scope", "response") == "response"
        if not (everywhere or variant.get("kl_coef")) and variant.get("perception_mask", 0) is not None:
            assert (found["d_hidden"][~made["perception_mask"]] == 0).all()

    @pytest.mark.parametrize("backend", ("portable", "reference"))
    def test_nothing_to_learn(self, variant, backend, seed):
        """All masked, or all advantages zero: loss 0, gradients 0, no NaN, no division by zero."""
        made = make(BATCH, seed, batch=4)
        empty = torch.zeros_like(made["response_mask"])
        found = run(made | {"response_mask": empty}, backend=backend, **variant)
        assert all((value == 0).all() for value in found.values() if value.numel())
        flat = made | {"advantages": torch.zeros(4, dtype=D)}
        found = run(flat, backend=backend, **(variant | {"kl_coef": 0.0, "entropy_coef": 0.0}))
        for name in ("loss", "d_hidden", "d_weight"):
            assert (found[name] == 0).all(), name

    @pytest.mark.parametrize("backend", ("portable", "reference"))
    @pytest.mark.parametrize("poison", (float("nan"), float("inf"), -float("inf")))
    def test_poison_under_the_mask_changes_nothing(self, variant, backend, poison, seed):
        made = make(BATCH, seed, batch=4)
        clean = run(made, backend=backend, **variant)
        outside = ~(made["response_mask"] & (made["targets"] != -100))
        assert outside.any()
        bad = dict(made)
        bad["hidden"] = made["hidden"].detach().clone()
        bad["hidden"][outside] = poison
        bad["hidden"].requires_grad_()
        for name in ("old_logps", "ref_logps", "sampler_weights"):
            bad[name] = torch.where(outside, poison, made[name])
        bad["advantages"] = torch.where(outside, poison, made["advantages"][:, None].expand(outside.shape))
        bad["targets"] = torch.where(outside & (made["targets"] != -100), 10**6, made["targets"])
        assert_same(run(bad, backend=backend, **variant), clean, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("backend", ("portable", "reference"))
    @pytest.mark.parametrize("statistics", (True, False))
    def test_poison_in_a_filtered_token_reaches_no_gradient(self, backend, statistics, seed):
        """A response token outside perception_mask: with statistics it is looked at, and still gets exactly zero."""
        made = make(BATCH, seed, batch=4)
        clean = run(made, backend=backend)
        token = (made["response_mask"] & (made["targets"] != -100) & ~made["perception_mask"]).nonzero()[0]
        bad = made | {"hidden": made["hidden"].detach().clone()}
        bad["hidden"][tuple(token)] = float("nan")
        bad["hidden"].requires_grad_()
        found = run(bad, backend=backend, return_statistics=statistics)
        for name in ("loss", "d_hidden", "d_weight"):
            torch.testing.assert_close(found[name], clean[name])

    def test_clipped_tokens_get_exactly_zero(self, seed):
        """Ratios beyond the clip: coefficient zero, so the token's hidden gradient is exactly zero."""
        made = make(BATCH._replace(ignored="none"), seed, batch=4)
        far = made | {"advantages": torch.ones(4, dtype=D), "old_logps": made["old_logps"] - 50.0}
        found = run(far)
        assert (found["d_hidden"] == 0).all() and (found["d_weight"] == 0).all()
        assert found["clip_fraction_high"] == 1 and found["clip_fraction_low"] == 0

    def test_an_active_nan_spoils_its_own_row_only(self, seed):
        made = make(BATCH._replace(ignored="none"), seed, batch=4)
        made["response_mask"][:] = made["perception_mask"][:] = True
        with torch.no_grad():
            made["hidden"][1, 2] = float("nan")
        found = run(made)
        assert found["loss"].isnan() and found["d_hidden"][1, 2].isnan().all()
        found["d_hidden"][1, 2] = 0
        assert found["d_hidden"].isfinite().all()

    def test_rows_visited(self, seed, monkeypatch):
        """Filtered tokens cost nothing without statistics, and one forward visit with them."""
        seen = []

        def counting(hidden, head, values, selection, loop, **options):
            seen.append((set(selection.rows.tolist()), "gradients" in options, values.want_entropy))
            return softmax_loop(hidden, head, values, selection, loop, **options)

        softmax_loop = fused.softmax_loop
        monkeypatch.setattr(fused, "softmax_loop", counting)
        made = make(BATCH, seed, batch=4)
        response = (made["response_mask"] & (made["targets"] != -100)).view(-1)
        kept = response & made["perception_mask"].view(-1)
        kept_rows, other_rows = (set(m.nonzero().squeeze(-1).tolist()) for m in (kept, response & ~kept))
        call(made, return_statistics=False)
        assert [v for v in seen if v[0]] == [(kept_rows, True, False)]
        seen.clear()
        call(made)
        assert seen == [(other_rows, False, True), (kept_rows, True, True)]
        seen.clear()
        call(made, return_statistics=False, entropy_coef=0.1, entropy_scope="kept")
        assert [v for v in seen if v[0]] == [(kept_rows, True, True)]


class TestLaws:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10_000), variant=st.sampled_from(sorted(VARIANTS)))
    def test_shaping_and_filtering_are_token_advantages(self, seed, variant):
        """Weights and mask equal advantages alpha(tau) * mask(t) * A(tau): any trainer that takes (B, T) can do it."""
        made = make(BATCH, seed, batch=4)
        options = VARIANTS[variant] | {"entropy_coef": 0.0}
        if options.get("perception_mask", 0) is None:
            made["perception_mask"] = torch.ones_like(made["response_mask"])
        by_token = made["perception_mask"] * (made["trajectory_weights"] * made["advantages"])[:, None]
        plain = made | {"advantages": by_token, "trajectory_weights": None}
        options.pop("perception_mask", None)
        one, other = run(made, **options), run(plain | {"perception_mask": None}, **options)
        statistics = ("kept_fraction", "clip_fraction_low", "clip_fraction_high")
        assert_same(one, other, leave_out=statistics, what=f"{variant} seed {seed}", rtol=1e-10, atol=1e-12)

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 10_000), variant=st.sampled_from(sorted(VARIANTS)), batches=st.sampled_from([1, 2, 4]))
    def test_micro_batches_with_a_normalizer_add_up(self, seed, variant, batches):
        made = make(BATCH, seed, batch=4)
        response = made["response_mask"] & (made["targets"] != -100)
        options = {k: v for k, v in VARIANTS[variant].items() if k not in ("normalizer", "aggregation", *PER_TOKEN)}
        made |= {k: None for k in PER_TOKEN if VARIANTS[variant].get(k, 0) is None}
        for aggregation, count in (("token_mean", response.sum()), ("sequence_mean", (response.sum(1) > 0).sum())):
            whole = run(made, aggregation=aggregation, **options)
            total = {"loss": 0.0, "d_weight": 0.0}
            for part in torch.arange(4).chunk(batches):
                piece = {
                    k: v[part] if isinstance(v, torch.Tensor) and k not in ("weight", "bias") else v
                    for k, v in made.items()
                }
                piece["hidden"] = piece["hidden"].detach().requires_grad_()
                found = run(piece, aggregation=aggregation, normalizer=count, **options)
                total = {name: total[name] + found[name] for name in total}
            for name, value in total.items():
                torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-12)

    def test_is_cross_entropy(self, seed):
        """Advantage 1, on-policy: the gradient of F.cross_entropy; the loss itself is the constant -1."""
        made = make(BATCH, seed, batch=4)
        logits = made["hidden"] @ made["weight"].T
        wrt = (made["hidden"], made["weight"])
        expected = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), made["targets"].flatten()), wrt)
        every = torch.ones(made["targets"].shape, dtype=torch.bool)
        out = linear_policy_loss(*wrt, made["targets"], torch.ones(4), response_mask=every)
        assert out.loss.item() == pytest.approx(-1.0)
        torch.testing.assert_close(torch.autograd.grad(out.loss, wrt), expected)
        by_token = linear_token_loss(*wrt, made["targets"], lambda logps, entropy, rows: -logps)
        count = (made["targets"] != -100).sum()
        torch.testing.assert_close(
            by_token / count, F.cross_entropy(logits.flatten(0, 1), made["targets"].flatten()), rtol=1e-9, atol=0
        )
        torch.testing.assert_close(torch.autograd.grad(by_token / count, wrt), expected)

    def test_dr_grpo_divides_by_no_length(self, seed):
        """A constant normalizer: the sum over tokens of min(r A, clip(r) A), over B times the longest response."""
        made = make(BATCH, seed, batch=4)
        made |= {"perception_mask": None, "sampler_weights": None, "trajectory_weights": None}
        response = made["response_mask"] & (made["targets"] != -100)
        ratio = (linear_logprobs(made["hidden"], made["weight"], made["targets"]).logps - made["old_logps"]).exp()
        advantages = made["advantages"][:, None]
        manual = -torch.where(response, torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), 0.0)
        loss = call(made, aggregation="sum", normalizer=4.0 * 6).loss
        torch.testing.assert_close(loss, manual.sum() / 24)
        wrt = (made["hidden"], made["weight"])
        torch.testing.assert_close(*(torch.autograd.grad(x, wrt) for x in (loss, manual.sum() / 24)))

    def test_cispo_by_hand(self, seed):
        """Values and gradients of constant(clip(r)) A logp; beyond the clip a token still learns."""
        made = make(BATCH, seed, batch=4)
        made |= {"perception_mask": None, "sampler_weights": None, "trajectory_weights": None}
        made["old_logps"] = made["old_logps"] - 3.0  # ratios near 20
        response = made["response_mask"] & (made["targets"] != -100)
        logps = linear_logprobs(made["hidden"], made["weight"], made["targets"]).logps
        ratio = (logps - made["old_logps"]).exp().detach().clamp(0.8, 1.28)
        manual = -(ratio * made["advantages"][:, None] * logps * response).sum() / response.sum()
        out = call(made, surrogate="cispo", clip_high=0.28)
        torch.testing.assert_close(out.loss, manual)
        wrt = (made["hidden"], made["weight"])
        found, expected = (torch.autograd.grad(x, wrt) for x in (out.loss, manual))
        torch.testing.assert_close(found, expected)
        assert (found[0][response].abs().amax(-1) > 0).all() and out.statistics["clip_fraction_high"] > 0.9

    def test_gspo_equals_the_papers_formula(self, seed):
        """Without filter, GSPO's own gradient flows through the mean log-ratio: the same numbers."""
        made = make(BATCH, seed, batch=4)
        made |= {"perception_mask": None, "sampler_weights": None, "trajectory_weights": None}
        response = made["response_mask"] & (made["targets"] != -100)
        logps = linear_logprobs(made["hidden"], made["weight"], made["targets"]).logps
        means = torch.tensor([[1.2], [0.8], [1.01], [0.99]], dtype=D).log()  # two beyond the clip, two within
        made["old_logps"] = logps.detach() - means + 0.002 * torch.randn(4, 6, dtype=D)
        made["advantages"] = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=D)
        gaps = torch.where(response, logps - made["old_logps"], 0.0)
        ratio = (gaps.sum(1) / response.sum(1)).exp()
        clipped = ratio.clamp(0.97, 1.04)
        manual = -torch.min(ratio * made["advantages"], clipped * made["advantages"]).mean()
        settings_ = {"ratio_level": "sequence", "aggregation": "sequence_mean", "clip_low": 0.03, "clip_high": 0.04}
        out = call(made, **settings_)
        torch.testing.assert_close(out.loss, manual)
        wrt = (made["hidden"], made["weight"])
        torch.testing.assert_close(torch.autograd.grad(out.loss, wrt), torch.autograd.grad(manual, wrt))
        assert (ratio != clipped).tolist() == [True, True, False, False]

    def test_statistics(self, seed):
        made = make(BATCH, seed, batch=4)
        response = made["response_mask"] & (made["targets"] != -100)
        kept = response & made["perception_mask"]
        out = call(made)
        full = linear_logprobs(made["hidden"], made["weight"], made["targets"], return_entropy=True)
        gap = (full.logps - made["old_logps"])[response]
        ratio = (full.logps - made["old_logps"]).exp()
        low = (ratio < 0.8) & (made["advantages"][:, None] < 0)
        high = (ratio > 1.2) & (made["advantages"][:, None] > 0)
        ref_gap = (made["ref_logps"] - full.logps)[response]
        expected = {
            "tokens": response.sum().double(),
            "kept_fraction": kept.sum() / response.sum(),
            "logp_mean": full.logps[response].mean(),
            "max_logp": full.logps[response].max(),
            "entropy_mean": full.entropy[response].mean(),
            "ratio_mean": ratio[response].mean(),
            "ratio_max": ratio[response].max(),
            "approx_kl": (gap.exp() - gap - 1).mean(),
            "clip_fraction_low": low[kept].double().mean(),
            "clip_fraction_high": high[kept].double().mean(),
            "ref_kl": (ref_gap.exp() - ref_gap - 1).mean(),
        }
        assert out.statistics.keys() == expected.keys()
        for name, value in expected.items():
            assert out.statistics[name].shape == () and not out.statistics[name].requires_grad
            torch.testing.assert_close(out.statistics[name], value.detach().to(D), rtol=1e-6, atol=1e-9, msg=name)
        assert (out.logps[~response] == 0).all() and (out.entropy[~response] == 0).all()

    def test_statistics_without_a_forward_of_their_own_cover_the_tokens_that_learn(self, seed):
        made = make(BATCH, seed, batch=4)
        response = made["response_mask"] & (made["targets"] != -100)
        kept = response & made["perception_mask"]
        out = call(made, return_statistics=False)
        full = call(made)
        assert out.entropy is None and out.statistics.keys() == full.statistics.keys() - {"entropy_mean"}
        for name in ("tokens", "kept_fraction", "clip_fraction_low", "clip_fraction_high"):
            assert out.statistics[name] == full.statistics[name]
        logps = full.logps[kept]
        gap, ref_gap = logps - made["old_logps"][kept], made["ref_logps"][kept] - logps
        expected = {
            "logp_mean": logps.mean(),
            "max_logp": logps.max(),
            "ratio_mean": gap.exp().mean(),
            "ratio_max": gap.exp().max(),
            "approx_kl": (gap.exp() - gap - 1).mean(),
            "ref_kl": (ref_gap.exp() - ref_gap - 1).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(out.statistics[name], value, rtol=1e-6, atol=1e-9, msg=name)
        assert call(made, return_statistics=False, entropy_coef=0.1).statistics["entropy_mean"] > 0


class TestTokenLoss:
    @pytest.mark.parametrize("backend", ("portable", "reference"))
    def test_own_objective(self, backend, seed):
        made = make(SMALL, seed, batch=2)
        head = {name: made[name] for name in HEAD_OPTIONS} | {"bias": made["bias"]}
        active = made["response_mask"]
        factors = torch.randn(8, dtype=D)
        wrt = [made[name] for name in LEAVES]

        def focal(logps, entropy, rows):
            return -factors[rows] * (1 - logps.exp()) ** 2 * logps + 0.1 * entropy**2

        total = linear_token_loss(
            made["hidden"],
            made["weight"],
            made["targets"],
            focal,
            active_mask=active,
            backend=backend,
            **(head | {"chunk_size": 3}),
        )
        plain = linear_logprobs(
            made["hidden"], made["weight"], made["targets"], return_entropy=True, backend="reference", **head
        )
        manual = focal(plain.logps.view(-1), plain.entropy.view(-1), torch.arange(8))[active.view(-1)].sum()
        torch.testing.assert_close(total, manual)
        torch.testing.assert_close(torch.autograd.grad(total * 3, wrt), torch.autograd.grad(manual * 3, wrt))

    def test_policy_loss_is_a_token_loss(self, seed):
        made = make(BATCH, seed, batch=4)
        made |= {"sampler_weights": None, "trajectory_weights": None}
        kept = (made["response_mask"] & made["perception_mask"]).view(-1)
        old, advantages = made["old_logps"].view(-1), made["advantages"][:, None].expand(4, 6).reshape(-1)

        def clipped(logps, entropy, rows):
            ratio = (logps - old[rows]).exp()
            return -torch.min(ratio * advantages[rows], ratio.clamp(0.8, 1.2) * advantages[rows])

        mask = kept.view(4, 6)
        total = linear_token_loss(made["hidden"], made["weight"], made["targets"], clipped, active_mask=mask)
        expected = call(made, aggregation="sum").loss
        torch.testing.assert_close(total, expected)
        wrt = (made["hidden"], made["weight"])
        torch.testing.assert_close(torch.autograd.grad(total, wrt), torch.autograd.grad(expected, wrt))

    def test_without_compaction(self, seed):
        """token_loss sees masked rows as zeros, and what it makes of them does not count, NaN included."""
        made = make(BATCH, seed, batch=4)
        args, active = (made["hidden"], made["weight"], made["targets"]), made["response_mask"]

        def loss(logps, entropy, rows):
            return logps / entropy  # 0 / 0 at masked rows

        results = []
        for compact in (True, False):
            total = linear_token_loss(*args, loss, active_mask=active, compact=compact, chunk_size=5)
            results.append((total, *torch.autograd.grad(total, args[:2])))
        for others in results[1:]:
            torch.testing.assert_close(results[0], others)

    def test_without_entropy_or_rows(self, seed):
        made = make(BATCH, seed)
        args = made["hidden"], made["weight"], made["targets"]
        seen = []

        def loss(logps, entropy, rows):
            seen.append(entropy)
            return -logps

        linear_token_loss(*args, loss, use_entropy=False).backward()
        assert seen and all(entropy is None for entropy in seen)
        nothing = torch.zeros_like(made["response_mask"])
        total = linear_token_loss(*args, loss, active_mask=nothing)
        grads = torch.autograd.grad(total, (made["hidden"], made["weight"]))
        assert total == 0 and all((grad == 0).all() for grad in grads)

    @pytest.mark.parametrize(
        ("function", "words"),
        [
            (lambda logps, entropy, rows: logps.sum(), r"token_loss: got \(\)"),
            (lambda logps, entropy, rows: 1.0, "token_loss: got float"),
            (lambda logps, entropy, rows: logps[:, None] + logps, "token_loss: got"),
            (lambda logps, entropy, rows: logps * FOREIGN, "captured tensor that requires a gradient"),
            (lambda logps, entropy, rows: FOREIGN.exp() + 0 * rows, "captured tensor that requires a gradient"),
        ],
    )
    def test_refuses(self, function, words, seed):
        made = make(BATCH, seed)
        with pytest.raises(ValueError, match=words):
            linear_token_loss(made["hidden"], made["weight"], made["targets"], function)


FOREIGN = torch.tensor(2.0, dtype=D, requires_grad=True)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"hidden": torch.zeros(6, 4)}, r"hidden: got shape \(6, 4\), expected \(B, T, H\)"),
            ({"targets": torch.zeros(2, 4).long()}, "targets: got shape"),
            ({"targets": torch.full((2, 3), 9)}, "targets: got ids from 9 to 9, expected 0 to 8"),
            ({"advantages": torch.zeros(3)}, "advantages: got shape"),
            ({"advantages": torch.zeros(2, 3, 1)}, "advantages: "),
            ({"response_mask": torch.ones(2, 3)}, "response_mask: got dtype"),
            ({"response_mask": torch.ones(3, 2, dtype=torch.bool)}, "response_mask: got shape"),
            ({"perception_mask": torch.ones(2, 3)}, "perception_mask: got dtype"),
            ({"trajectory_weights": torch.ones(2, 3)}, "trajectory_weights: got shape"),
            ({"old_logps": torch.ones(2)}, "old_logps: got shape"),
            ({"kl_coef": 0.1}, "ref_logps: got None"),
            ({"kl_coef": float("nan")}, "kl_coef: got nan"),
            ({"entropy_coef": float("-inf")}, "entropy_coef: got -inf"),
            ({"kl_estimator": "k4"}, "kl_estimator: got 'k4', expected one of k1, k2, k3"),
            ({"clip_low": 1.5}, "clip_low: got 1.5"),
            ({"clip_high": -0.1}, "clip_high: got -0.1"),
            ({"dual_clip": 1.0}, "dual_clip: got 1.0"),
            ({"entropy_scope": "all"}, "entropy_scope: got 'all'"),
            ({"entropy_kind": "true"}, "entropy_kind: got 'true'"),
            ({"ratio_level": "gspo"}, "ratio_level: got 'gspo'"),
            ({"surrogate": "ppo"}, "surrogate: got 'ppo', expected one of clip, cispo"),
            ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip: got 3.0 with surrogate 'cispo'"),
            ({"aggregation": "mean"}, "aggregation: got 'mean'"),
            ({"normalizer": 0.0}, "normalizer: got 0.0"),
            ({"normalizer": float("inf")}, "normalizer: got inf"),
            ({"normalizer": torch.ones(2)}, "normalizer: got shape"),
            ({"normalizer": torch.ones((), device="meta")}, "normalizer: got device meta, expected cpu"),
            ({"temperature": -1.0}, "temperature: got -1.0"),
            ({"compact": 3}, "compact: got 3, expected True"),
        ],
    )
    def test_message_names_the_argument(self, change, words):
        made = {
            "hidden": torch.zeros(2, 3, 4),
            "weight": torch.zeros(9, 4),
            "targets": torch.zeros(2, 3).long(),
            "advantages": torch.ones(2),
            "response_mask": torch.ones(2, 3, dtype=torch.bool),
        }
        with pytest.raises(ValueError, match=words):
            linear_policy_loss(**(made | change))

    @pytest.mark.parametrize("first", (1.0, 3.0))
    def test_second_backward_and_second_derivative_are_refused(self, first, seed):
        made = make(BATCH, seed)
        args = made["hidden"], made["weight"], made["targets"]
        for loss in (call(made).loss, linear_token_loss(*args, lambda logps, entropy, rows: -logps)):
            (loss if first == 1.0 else loss * first).backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="second backward"):
                loss.backward()
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(call(made).loss, made["hidden"], create_graph=True)


class TestTorch:
    def test_opcheck(self, variant, seed):
        made = make(SMALL, seed, batch=2, dtype=torch.float32)
        options = PolicyOptions()._asdict() | {k: v for k, v in variant.items() if k in PolicyOptions._fields}
        constants = {k: made[k] if variant.get(k, 0) is not None else None for k in PER_TOKEN}
        constants = {k: v.float() if v is not None and v.is_floating_point() else v for k, v in constants.items()}
        kept = made["response_mask"] if constants["perception_mask"] is None else constants["perception_mask"]
        tokens = [made["response_mask"], kept, made["advantages"].float()[:, None].repeat(1, 4)]
        tokens += [constants[k] for k in ("old_logps", "ref_logps", "sampler_weights")]
        tokens += [made["response_mask"].float()]
        tokens = [None if t is None else t.reshape(-1) for t in tokens]
        settings = (PolicyOptions(**options), HeadOptions(0.8, 4.0, 1.3), LoopOptions("portable", chunk_size=3))
        args = [*(made[name] for name in (*LEAVES, "targets")), True, [True, True, True], *tokens]
        args += [value for record in settings for value in record]
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(operator.linear_policy_loss, args, test_utils=tests)

    @pytest.mark.parametrize("backend", ("portable", "reference"))
    @pytest.mark.parametrize("name", ("vppo", "gspo_everything"))
    def test_policy_loss_compiles_without_graph_break(self, name, backend, seed, fresh_compiler):
        made = make(SMALL, seed, batch=2, dtype=torch.float32)

        def step(hidden, weight):
            out = call(made | {"hidden": hidden, "weight": weight}, backend=backend, **VARIANTS[name])
            return out.loss * 2, out.statistics["approx_kl"]

        wrt = (made["hidden"], made["weight"])
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if backend == "portable" else "aot_eager")
        found, expected = compiled(*wrt), step(*wrt)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found[0], wrt), torch.autograd.grad(expected[0], wrt))

    def test_annealed_coefficients_compile_without_graph_break(self, seed, fresh_compiler):
        """A number that changes between calls becomes symbolic at its second value."""
        made = make(SMALL, seed, batch=2, dtype=torch.float32)

        def step(coef: float):
            return call(made, kl_coef=coef, entropy_coef=2 * coef, normalizer=10 * coef, temperature=1 + coef).loss

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for coef in (0.1, 0.2, 0.3):
            torch.testing.assert_close(compiled(coef), step(coef))

    def test_token_loss_compiles_without_graph_break(self, seed, fresh_compiler):
        made = make(SMALL, seed, batch=2, dtype=torch.float32)
        advantages = torch.randn(8)

        def step(hidden, weight):
            return linear_token_loss(
                hidden,
                weight,
                made["targets"],
                lambda logps, entropy, rows: -advantages[rows] * logps + 0.1 * entropy,
                active_mask=made["response_mask"],
            )

        wrt = (made["hidden"], made["weight"])
        found, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(*wrt), step(*wrt)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, wrt), torch.autograd.grad(expected, wrt))

    @pytest.mark.parametrize("reentrant", (True, False))
    def test_checkpointing(self, reentrant, seed):
        made = make(BATCH, seed, batch=4)

        def loss(hidden):
            return call(made | {"hidden": torch.tanh(hidden)}, entropy_coef=0.1).loss

        (expected,) = torch.autograd.grad(loss(made["hidden"]), made["hidden"])
        checkpoint(loss, made["hidden"], use_reentrant=reentrant).backward()
        torch.testing.assert_close(made["hidden"].grad, expected)

    def test_autocast(self, seed):
        made = make(BATCH, seed, batch=4, dtype=torch.float32)
        args = made["hidden"], made["weight"], made["targets"]
        rounded = make(BATCH, seed, batch=4, dtype=torch.float32)
        for name in ("hidden", "weight"):
            rounded[name] = rounded[name].detach().bfloat16().float().requires_grad_()
        for backend in ("portable", "reference"):
            with torch.autocast("cpu", torch.bfloat16):
                found = call(made, backend=backend, entropy_coef=0.1, kl_coef=0.1)
                by_token = linear_token_loss(*args, lambda lp, h, rows: -lp + h, backend=backend)
            torch.testing.assert_close(found.loss, call(rounded, entropy_coef=0.1, kl_coef=0.1).loss)
            assert found.loss.dtype == by_token.dtype == torch.float32
            (found.loss + by_token).backward()
        assert made["weight"].grad.dtype == torch.float32

    def test_gradient_accumulation(self, seed):
        """Two calls into one .grad: the gradient handed out by the first must not be overwritten by the second."""
        made = make(BATCH, seed, batch=4)
        once = run(made)["d_weight"]
        for scale in (1.0, 0.5, 1.0):
            (call(made).loss * scale).backward()
        torch.testing.assert_close(made["weight"].grad, 2.5 * once)

    def test_without_gradients(self, seed):
        made = make(BATCH, seed, batch=4)
        expected = call(made).loss.detach()
        with torch.no_grad():
            out = call(made)
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, expected)
        with torch.inference_mode():
            torch.testing.assert_close(call(made).loss, expected)
            total = linear_token_loss(made["hidden"], made["weight"], made["targets"], lambda lp, h, rows: -lp)
        assert total > 0
