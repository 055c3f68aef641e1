"""linear_policy_loss: the definition by hand, its per-token function, and what masks do.

Portable against the definition, with options drawn at random, is in test_policy_loss_random.py, the laws of all
operators in tests/kernels/lm_head.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mmrpt_kernels.policy_loss import fused, reference
from mmrpt_kernels.policy_loss.options import PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import policy_rows, token_losses
from mmrpt_kernels.testing import HeadCase
from tests.kernels.lm_head.operators import assert_same
from tests.kernels.policy_loss.policy_cases import (
    BATCH,
    LEAVES,
    SMALL,
    VARIANTS,
    D,
    by_variant,
    call,
    make,
    run,
)

# Elsewhere a stop-gradient stands in the ratio: the value does not move the way the gradient says. Those gradients are
# written by hand in test_policy_laws.py.
STOPS = ("plain_on_policy", "gspo", "gspo_everything", "gspo_on_policy", "cispo", "cispo_by_sequence")
DIFFERENTIABLE = [name for name in VARIANTS if name not in STOPS]


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

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_gradcheck(self, name, seed):
        made = make(SMALL, seed, batch=2)

        def loss(*leaves):
            new = made | dict(zip(LEAVES, leaves, strict=True))
            return call(new, backend="reference", **VARIANTS[name]).loss

        assert torch.autograd.gradcheck(loss, tuple(made[name] for name in LEAVES))


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
    @pytest.mark.parametrize("vocab", (1, 2))
    @pytest.mark.parametrize("softcap", (0.0, 5.0))
    def test_a_broken_row_without_gradient_spreads_nothing(self, vocab, softcap, seed):
        made = make(HeadCase("few_words", 3, 4, vocab, softcap=softcap, ignored="none"), seed, dtype=torch.float32)
        made |= {"response_mask": torch.ones(1, 3) > 0, "perception_mask": torch.tensor([[True, False, True]])}
        with torch.no_grad():
            made["hidden"][0, 1] = torch.nan
        out = call(made, compact=False, return_statistics=False)
        grads = torch.autograd.grad(out.loss, (made["hidden"], made["weight"]))
        assert all(grad.isfinite().all() for grad in grads)

    @pytest.mark.parametrize("level", ("token", "sequence"))
    def test_a_token_that_the_old_policy_ruled_out(self, level, seed):
        made = make(BATCH, seed, batch=4)
        made["old_logps"][:, ::3] = -torch.inf
        found, expected = (run(made, ratio_level=level, backend=name) for name in ("portable", "reference"))
        assert_same(found, expected, rtol=1e-9, atol=1e-11)
        assert found["d_hidden"].isfinite().all()


class TestMasks:
    @by_variant
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

    def test_clipped_tokens_get_exactly_zero(self, seed):
        """Ratios beyond the clip: coefficient zero, so the token's hidden gradient is exactly zero."""
        made = make(BATCH._replace(ignored="none"), seed, batch=4)
        far = made | {"advantages": torch.ones(4, dtype=D), "old_logps": made["old_logps"] - 50.0}
        found = run(far)
        assert (found["d_hidden"] == 0).all() and (found["d_weight"] == 0).all()
        assert found["clip_fraction_high"] == 1 and found["clip_fraction_low"] == 0

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
