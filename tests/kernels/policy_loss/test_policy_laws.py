"""linear_policy_loss against losses written by hand, statistics, linear_token_loss, and torch's habits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrpt_kernels.logprobs import linear_logprobs
from mmrpt_kernels.policy_loss import linear_policy_loss, linear_token_loss
from tests.kernels.lm_head.operators import HEAD_OPTIONS, assert_same
from tests.kernels.policy_loss.policy_cases import (
    BATCH,
    LEAVES,
    PER_TOKEN,
    SMALL,
    VARIANTS,
    D,
    call,
    make,
    run,
)


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
        found, expected = run(made, **options), run(plain | {"perception_mask": None}, **options)
        for name in ("kept_fraction", "clip_fraction_low", "clip_fraction_high"):
            del found[name], expected[name]
        assert_same(found, expected, what=f"{variant} seed {seed}", rtol=1e-10, atol=1e-12)

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
        wrt = (made["hidden"], made["weight"])
        loss = F.cross_entropy((wrt[0] @ wrt[1].T).flatten(0, 1), made["targets"].flatten())
        expected = torch.autograd.grad(loss, wrt)
        every = torch.ones(made["targets"].shape, dtype=torch.bool)
        out = linear_policy_loss(*wrt, made["targets"], torch.ones(4), response_mask=every)
        assert out.loss.item() == pytest.approx(-1.0)
        torch.testing.assert_close(torch.autograd.grad(out.loss, wrt), expected)
        by_token = linear_token_loss(*wrt, made["targets"], lambda logps, entropy, rows: -logps)
        by_token = by_token / (made["targets"] != -100).sum()
        torch.testing.assert_close(by_token, loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(torch.autograd.grad(by_token, wrt), expected)

    def test_cispo_by_hand(self, seed):
        """Values and gradients of constant(clip(r)) A logp; beyond the clip a token still learns."""
        made = make(BATCH, seed, batch=4)
        made |= {"perception_mask": None, "sampler_weights": None, "trajectory_weights": None}
        made["old_logps"] = made["old_logps"] + torch.tensor([[-3.0], [3.0], [-3.0], [0.0]], dtype=D)  # ratios of 20
        response = made["response_mask"] & (made["targets"] != -100)
        logps = linear_logprobs(made["hidden"], made["weight"], made["targets"]).logps
        ratio = (logps - made["old_logps"]).exp().detach().clamp(0.8, 1.28)
        manual = -(ratio * made["advantages"][:, None] * logps * response).sum() / response.sum()
        out = call(made, surrogate="cispo", clip_high=0.28)
        torch.testing.assert_close(out.loss, manual)
        wrt = (made["hidden"], made["weight"])
        found, expected = (torch.autograd.grad(x, wrt) for x in (out.loss, manual))
        torch.testing.assert_close(found, expected)
        assert (found[0][response].abs().amax(-1) > 0).all()
        assert out.statistics["clip_fraction_high"] > 0.3 and out.statistics["clip_fraction_low"] > 0.1

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

    @pytest.mark.parametrize("whole", (True, False))
    def test_statistics(self, whole, seed):
        """Of all response tokens; without a forward of their own, of those that learn."""
        made = make(BATCH, seed, batch=4)
        response = made["response_mask"] & (made["targets"] != -100)
        kept = response & made["perception_mask"]
        out = call(made, return_statistics=whole)
        full = linear_logprobs(made["hidden"], made["weight"], made["targets"], return_entropy=True)
        ratio = (full.logps - made["old_logps"]).exp()
        low = (ratio < 0.8) & (made["advantages"][:, None] < 0)
        high = (ratio > 1.2) & (made["advantages"][:, None] > 0)
        seen = response if whole else kept
        logps, ratio, ref_gap = full.logps[seen], ratio[seen], (made["ref_logps"] - full.logps)[seen]
        expected = {
            "tokens": response.sum(),
            "kept_fraction": kept.sum() / response.sum(),
            "logp_mean": logps.mean(),
            "max_logp": logps.max(),
            "ratio_mean": ratio.mean(),
            "ratio_max": ratio.max(),
            "approx_kl": (ratio - ratio.log() - 1).mean(),
            "clip_fraction_low": low[kept].double().mean(),
            "clip_fraction_high": high[kept].double().mean(),
            "ref_kl": (ref_gap.exp() - ref_gap - 1).mean(),
        }
        if whole:
            expected["entropy_mean"] = full.entropy[seen].mean()
            assert (out.logps[~response] == 0).all() and (out.entropy[~response] == 0).all()
        assert out.statistics.keys() == expected.keys() and (out.entropy is not None) == whole
        for name, value in expected.items():
            assert out.statistics[name].shape == () and not out.statistics[name].requires_grad
            torch.testing.assert_close(out.statistics[name], value.detach().to(D), rtol=1e-6, atol=1e-9, msg=name)
        assert call(made, return_statistics=whole, entropy_coef=0.1).statistics["entropy_mean"] > 0


class TestTokenLoss:
    @pytest.mark.parametrize("backend", ("portable", "reference"))
    def test_own_objective(self, backend, seed):
        made = make(SMALL, seed, batch=2)
        head = {name: made[name] for name in (*LEAVES, "targets", *HEAD_OPTIONS)}
        active, factors = made["response_mask"], torch.randn(8, dtype=D)

        def focal(logps, entropy, rows):
            return -factors[rows] * (1 - logps.exp()) ** 2 * logps + 0.1 * entropy**2

        options = {"token_loss": focal, "active_mask": active, "backend": backend, "chunk_size": 3}
        total = linear_token_loss(**(head | options))
        plain = linear_logprobs(**head, return_entropy=True, backend="reference")
        manual = focal(plain.logps.view(-1), plain.entropy.view(-1), torch.arange(8))[active.view(-1)].sum()
        torch.testing.assert_close(total, manual)
        wrt = [made[name] for name in LEAVES]
        torch.testing.assert_close(torch.autograd.grad(total * 3, wrt), torch.autograd.grad(manual * 3, wrt))

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


class TestTorch:
    def test_annealed_coefficients_compile_without_graph_break(self, seed, fresh_compiler):
        """A number that changes between calls becomes symbolic at its second value."""
        made = make(SMALL, seed, batch=2, dtype=torch.float32)

        def step(coef: float):
            return call(made, kl_coef=coef, entropy_coef=2 * coef, normalizer=10 * coef, temperature=1 + coef).loss

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for coef in (0.1, 0.2, 0.3):
            torch.testing.assert_close(compiled(coef), step(coef))

    def test_gradient_accumulation(self, seed):
        """Two calls into one .grad: the gradient handed out by the first must not be overwritten by the second."""
        made = make(BATCH, seed, batch=4)
        once = run(made)["d_weight"]
        for scale in (1.0, 0.5, 1.0):
            (call(made).loss * scale).backward()
        torch.testing.assert_close(made["weight"].grad, 2.5 * once)

    @pytest.mark.parametrize("first", (1.0, 3.0))
    def test_a_second_backward_is_refused(self, first, seed):
        made = make(BATCH, seed)
        args = made["hidden"], made["weight"], made["targets"]
        for loss in (call(made).loss, linear_token_loss(*args, lambda logps, entropy, rows: -logps)):
            (loss if first == 1.0 else loss * first).backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="second backward"):
                loss.backward()
