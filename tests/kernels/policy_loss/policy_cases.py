"""Inputs, variants and runs of linear_policy_loss that its tests share."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.policy_loss import linear_policy_loss
from mmrpt_kernels.testing import HeadCase, poisoned_memory
from tests.kernels.lm_head.operators import draw

D = torch.float64
BATCH = HeadCase("batch", 24, 8, 53, ignored="some", chunk_size=5)
SMALL = HeadCase("small", 8, 4, 9, bias=True, temperature=0.8, softcap=4.0, logit_scale=1.3, ignored="none")
LEAVES = ("hidden", "weight", "bias")
PER_TOKEN = ("old_logps", "ref_logps", "sampler_weights", "perception_mask")


def make(case: HeadCase, seed: int, *, batch: int = 1, dtype: torch.dtype = D) -> dict:
    """Arguments of a call by name: `rows` tokens as (batch, T), every optional tensor given."""
    drawn, shape = draw(case, seed, dtype=dtype, device="cpu"), (batch, case.rows // batch)
    hidden = drawn["hidden"].detach().view(*shape, case.hidden).requires_grad_()
    weights = torch.rand(batch + case.rows, generator=torch.Generator().manual_seed(seed + 8), dtype=D) + 0.5
    made = {
        "hidden": hidden,
        "weight": drawn["weight"],
        "bias": drawn["bias"],
        "advantages": drawn["advantages"][:batch],
    }
    named = {"response_mask": "active", "perception_mask": "kept"}
    for name in ("targets", "old_logps", "ref_logps", *named):
        made[name] = drawn[named.get(name, name)].view(shape)
    made |= {"trajectory_weights": weights[:batch], "sampler_weights": weights[batch:].view(shape)}
    return made | drawn["options"]


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


by_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
