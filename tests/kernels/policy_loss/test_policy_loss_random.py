"""linear_policy_loss with options drawn at random, portable against the definition in float64: what no list of variants
pairs up (strides, masks with empty rows, NaN outside them, ignored words, chunks, no compaction, partial gradients)."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrpt_kernels import linear_logprobs, linear_policy_loss

D = torch.float64
IGNORED = 3  # a word's own id will do
CHOICES = {
    "temperature": (1.0, 0.6),
    "softcap": (0.0, 0.0, 3.0),
    "logit_scale": (1.0, -0.7, 2.5),
    "kl_coef": (0.0, 0.1, -0.2),
    "kl_estimator": ("k1", "k2", "k3"),
    "clip_low": (0.2, 1.0, 0.003),
    "clip_high": (0.28, 0.003, math.inf),
    "entropy_coef": (0.0, 0.1, -0.06),
    "entropy_scope": ("response", "kept"),
    "entropy_kind": ("exact", "sampled"),
    "ratio_level": ("token", "sequence"),
    "surrogate": ("clip", "cispo"),
    "aggregation": ("token_mean", "sequence_mean", "sum"),
    "normalizer": (None, 3.5, torch.tensor(4), torch.tensor(2.5, dtype=torch.bfloat16)),
    "return_statistics": (True, False),
}
SHAPES = st.tuples(*(st.sampled_from(sizes) for sizes in ((0, 1, 2, 4), (0, 1, 3, 7), (1, 2, 33), (1, 5))))


def optional(tensor: torch.Tensor, pick) -> torch.Tensor | None:
    return tensor if pick((True, True, False)) else None


def draw_call(shape: tuple[int, int, int, int], seed: int, pick) -> dict:
    """Arguments of a call for shape (B, T, V, H); whatever a masked token may hold is NaN or no word."""
    batch, length, vocab, width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=D)

    def mask(share: float) -> torch.Tensor:
        return torch.rand(batch, length, generator=generator) < share

    made = {name: pick(choices) for name, choices in CHOICES.items()}
    made["dual_clip"] = pick((None, 1.5)) if made["surrogate"] == "clip" else None
    made["weight"] = normal(width, vocab).t() * 2 if pick((True, False)) else normal(vocab, 2 * width)[:, ::2]
    made["bias"] = optional(normal(vocab), pick)
    hidden, targets = normal(batch, length, width), torch.randint(vocab, (batch, length), generator=generator)
    head = {name: made[name] for name in ("bias", "temperature", "softcap", "logit_scale")}
    own = linear_logprobs(hidden, made["weight"], targets, backend="reference", **head).logps
    drift = pick((0.1, 1.0, 60.0))
    made["response_mask"] = mask(pick((0.0, 0.5, 1.0)))
    outside = ~made["response_mask"] | (targets == IGNORED)
    nan = pick((0.0, math.nan, math.inf, -math.inf))
    made["perception_mask"] = optional(mask(0.5), pick)
    advantages = normal(batch, length) if pick((True, False)) else normal(batch)
    made["advantages"] = advantages * (torch.rand(advantages.shape, generator=generator) < 0.8)
    made["trajectory_weights"] = optional(normal(batch).abs(), pick)
    made["old_logps"] = optional((own + drift * normal(batch, length)).masked_fill(outside, nan), pick)
    made["ref_logps"] = (own + normal(batch, length)).masked_fill(outside, nan)
    made["sampler_weights"] = optional((normal(batch, length) * mask(0.8)).masked_fill(outside, nan), pick)
    made["hidden"] = hidden.masked_fill(outside[..., None], nan)
    made["targets"] = torch.where(~made["response_mask"] & (targets != IGNORED), pick((0, vocab + 5, -7)), targets)
    return made | {"ignore_index": IGNORED}


def run(made: dict, wanted: list[str], **overrides) -> dict[str, torch.Tensor]:
    leaves = {name: made[name].clone().requires_grad_() for name in wanted if made[name] is not None}
    out = linear_policy_loss(**(made | leaves | overrides))
    grads = torch.autograd.grad(-1.5 * out.loss, list(leaves.values())) if leaves else ()
    named = {"loss": out.loss.detach()} | out.statistics
    if made["return_statistics"]:  # else each backend computes what it needs
        named |= {"logps": out.logps, "entropy": out.entropy}
    return named | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(shape=SHAPES, number=st.integers(0, 10**6), data=st.data())
def test_any_options_together(shape, number, data):
    def pick(choices):
        return data.draw(st.sampled_from(choices))

    made = draw_call(shape, number, pick)
    wanted = [name for name in ("hidden", "weight", "bias") if pick((True, True, False))]
    expected = run(made, wanted, backend="reference")
    how = {"chunk_size": pick((None, 1, 2, 5)), "compact": pick((True, False))}
    found = run(made, wanted, backend="portable", **how)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all(), f"{name}: what a masked token holds was looked at"
        size = value.abs().max().item() if value.numel() else 0.0
        limit = {"rtol": 0.0, "atol": 1e-9 * (1.0 + size)}
        torch.testing.assert_close(found[name], value, **limit, msg=lambda m, n=name: f"{n}: {m}")
    if "d_hidden" in found:
        outside = ~made["response_mask"] | (made["targets"] == IGNORED)
        assert not found["d_hidden"][outside].any()
        everywhere = made["kl_coef"] or made["entropy_coef"] and made["entropy_scope"] == "response"
        if made["perception_mask"] is not None and not everywhere:
            assert not found["d_hidden"][~made["perception_mask"]].any()
