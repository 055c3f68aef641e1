"""The custom operators that compilers see: schemas, fake tensors and autograd, as `torch.library.opcheck` has it."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.divergence import operator as divergence
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.logprobs import operator as logprobs
from mmrpt_kernels.policy_loss import operator as policy_loss
from mmrpt_kernels.policy_loss.options import PolicyOptions
from tests.kernels.lm_head.operators import DEVICE, OPERATORS, SMALL, draw, served

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
HEAD = HeadOptions(0.8, 4.0, 1.3)
ROWS = SMALL.rows
POLICY_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.fixture(params=("portable", "triton", "autocast"))
def loop(request) -> LoopOptions:
    """Portable, Triton's kernels, and float32 master weights that are cast inside."""
    if request.param != "triton":
        return LoopOptions("portable", 4, cast=torch.bfloat16 if request.param == "autocast" else None)
    served(OPERATORS[-1], "triton")
    return LoopOptions("triton", 4)


@pytest.fixture
def made(seed) -> dict:
    return draw(SMALL._replace(ignored="none"), seed, dtype=torch.float32)


@pytest.mark.parametrize("entropy", (True, False))
def test_logprobs(entropy, loop, made):
    head = (made["hidden"], made["weight"], made["bias"], made["targets"])
    torch.library.opcheck(logprobs.linear_logprobs, (*head, -100, entropy, *HEAD, *loop))
    ones, detached = torch.ones(ROWS, device=DEVICE), tuple(t.detach() for t in head)
    backward = (ones, ones if entropy else None, -100, [True, entropy, False], *HEAD, *loop)
    torch.library.opcheck(logprobs.linear_logprobs_backward, (*detached, *backward))


@pytest.mark.parametrize("whole", (True, False))
def test_divergence(whole, loop, made):
    """With all there is to give, and without a bias and targets but with a head for the second view."""
    views = (made["hidden"], made["hidden_q"], made["weight"])
    rest = (None, made["bias"], made["targets"]) if whole else (made["weight"], None, None)
    kinds = "kl,js,k3" if whole else "kl"
    torch.library.opcheck(divergence.linear_token_divergence, (*views, *rest, kinds, *HEAD, *loop))


@pytest.mark.parametrize(
    "options",
    (
        {"old_logps": None, "ref_logps": None, "sampler_weights": None},
        {"clip_high": 0.28, "dual_clip": 3.0, "entropy_coef": -0.06, "entropy_kind": "sampled", "kl_coef": 0.1},
        {"ratio_level": "sequence", "entropy_coef": 0.1, "entropy_scope": "kept"},
        {"surrogate": "cispo"},
    ),
    ids=("on_policy", "clipped", "sequence", "cispo"),
)
def test_policy_loss(options, loop, made):
    tokens = {name: made[name].float() for name in ("old_logps", "ref_logps")}
    tokens |= {"sampler_weights": torch.ones(ROWS, device=DEVICE)}
    tokens |= {name: options[name] for name in tokens if name in options}
    settings = PolicyOptions()._asdict() | {n: v for n, v in options.items() if n in PolicyOptions._fields}
    leaves = [made["hidden"].detach().view(2, 4, -1).requires_grad_(), made["weight"], made["bias"]]
    constants = (made["active"], made["kept"], made["advantages"].float(), *tokens.values(), made["active"].float())
    rest = (*PolicyOptions(**settings), *HEAD, *loop)
    arguments = (*leaves, made["targets"].view(2, 4), True, [True] * 3, *constants, *rest)
    torch.library.opcheck(policy_loss.linear_policy_loss, arguments, test_utils=POLICY_TESTS)
