"""The operators of the lm head in one table, each called on the same inputs: what they share is tested through it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrpt_kernels import backends, linear_logprobs, linear_policy_loss, linear_token_divergence, linear_token_loss
from mmrpt_kernels.divergence.api import KINDS
from mmrpt_kernels.testing import HeadCase, assert_close_to_truth, head_inputs, poisoned_memory, sum_cap, sum_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = HeadCase("small", 8, 5, 11, bias=True, temperature=0.8, softcap=4.0, logit_scale=1.3, chunk_size=3)
PLAIN = HeadCase("plain", 13, 16, 101, chunk_size=5)
HEAD_OPTIONS = ("temperature", "softcap", "logit_scale", "chunk_size")
DOUBLE = torch.float64


def options_of(case: HeadCase) -> dict:
    return {name: getattr(case, name) for name in HEAD_OPTIONS}


def draw(
    case: HeadCase, seed: int = 0, *, dtype: torch.dtype = DOUBLE, wide: bool = False, device: str = DEVICE
) -> dict:
    """hidden, hidden_q, weight and bias as leaves, targets, the head's options, and per token (rows,): advantages,
    active, kept (bool), old_logps and ref_logps. `wide`: the values of `dtype` in float64."""
    made = head_inputs(case, dtype=dtype, device=device, seed=seed)
    for name in ("hidden", "hidden_q", "weight", "bias"):
        if made[name] is not None:
            made[name] = (made[name].double() if wide else made[name]).requires_grad_()
    generator = torch.Generator().manual_seed(seed + 7)
    normal = torch.randn(3, case.rows, generator=generator, dtype=DOUBLE).to(device)
    uniform = torch.rand(2, case.rows, generator=generator).to(device)
    head = {name: value for name, value in options_of(case).items() if name != "chunk_size"}
    with torch.no_grad():
        hidden, weight, bias = (None if made[n] is None else made[n].double() for n in ("hidden", "weight", "bias"))
        own = linear_logprobs(hidden, weight, made["targets"], bias=bias, backend="reference", **head).logps
    tokens = {"advantages": normal[0], "active": uniform[0] < 0.8, "kept": uniform[1] < 0.5}
    tokens |= {"old_logps": own + 0.4 * normal[1], "ref_logps": own + 0.5 * normal[2]}
    return made | tokens | {"options": options_of(case)}


def logprobs(made: dict, entropy: bool = True, **options) -> dict:
    args = (made["hidden"], made["weight"], made["targets"])
    out = linear_logprobs(*args, bias=made["bias"], return_entropy=entropy, **(made["options"] | options))
    return {"logps": out.logps, "entropy": out.entropy} if entropy else {"logps": out.logps}


def token_loss(made: dict, entropy: bool = False, **options) -> dict:
    """Of log-probabilities alone the logits are read once; where an entropy learns, twice."""

    def loss(logps, entropies, rows):
        value = made["advantages"][rows].to(logps.dtype) * logps
        return value - 0.1 * entropies if entropy else value

    args = (made["hidden"], made["weight"], made["targets"], loss)
    keywords = {"active_mask": made["active"], "bias": made["bias"], "use_entropy": entropy}
    return {"loss": linear_token_loss(*args, **keywords, **(made["options"] | options))}


def policy_loss(made: dict, entropy: bool = False, statistics: bool = False, **options) -> dict:
    """One sequence of all rows, or as many as made["sequences"]; with entropies a KL to the reference policy too, and
    results of all tokens."""
    count, (rows, width) = made.get("sequences", 1), made["hidden"].shape
    hidden = made["hidden"].view(count, rows // count, width)
    args = (hidden, made["weight"], *(made[name].view(hidden.shape[:2]) for name in ("targets", "advantages")))
    tokens = {"response_mask": made["active"], "perception_mask": made["kept"]}
    tokens |= {name: made[name] for name in ("old_logps", "ref_logps") if made[name] is not None}
    keywords = {name: value.view(hidden.shape[:2]) for name, value in tokens.items()} | {"bias": made["bias"]}
    if entropy:
        keywords |= {"entropy_coef": 0.05, "kl_coef": 0.1, "kl_estimator": "k2", "return_statistics": True}
    out = linear_policy_loss(*args, **(keywords | made["options"] | options))
    seen = {"seen_logps": out.logps.view(-1), "seen_entropy": out.entropy.view(-1)} if entropy else {}
    seen |= {f"seen_{name}": value for name, value in out.statistics.items()} if statistics else {}
    return {"loss": out.loss} | seen


def divergence(made: dict, kind=KINDS, **options) -> dict:
    """A result for every kind by its name; made["weight_q"] is another head for the second view."""
    keywords = {"targets": made["targets"], "bias": made["bias"], "kind": kind, "weight_q": made.get("weight_q")}
    views = (made["hidden"], made["hidden_q"], made["weight"])
    out = linear_token_divergence(*views, **keywords, **(made["options"] | options))
    names = [name + " again" * kind[:place].count(name) for place, name in enumerate(kind)]
    return dict(zip(names, out.divergence.unbind(-1), strict=True)) | {n: getattr(out, n) for n in out._fields[1:]}


class Operator(NamedTuple):
    """call(inputs of `draw`, **options) gives results by name; those of seen_... are constants."""

    name: str
    op: str  # its name in the table of backends
    call: Callable[..., dict[str, torch.Tensor]]
    leaves: tuple[str, ...] = ("hidden", "weight", "bias")

    @property
    def by_rows(self) -> bool:
        """Whether results are one a row, not a sum over rows."""
        return self.op in ("logprobs", "divergence")


OPERATORS = (
    Operator("logprobs", "logprobs", logprobs),
    Operator("logprobs_alone", "logprobs", functools.partial(logprobs, entropy=False)),
    Operator("token_loss", "policy_loss", token_loss),
    Operator("entropy_loss", "policy_loss", functools.partial(token_loss, entropy=True)),
    Operator("policy_loss", "policy_loss", policy_loss),
    Operator("policy_loss_with_entropy", "policy_loss", functools.partial(policy_loss, entropy=True)),
    Operator("divergence", "divergence", divergence, ("hidden", "hidden_q", "weight", "bias")),
)
*ONE_VIEW, DIVERGENCE = OPERATORS


def name_of(value) -> str:
    return str(getattr(value, "name", value))


by_operator = pytest.mark.parametrize("operator", OPERATORS, ids=name_of)


def served(operator: Operator, backend: str) -> None:
    """Skip the test where the backend does not serve the operator on this machine."""
    try:
        backends.select(operator.op, device=torch.device(DEVICE), dtype=torch.float32, requested=backend)
    except backends.BackendError as error:
        pytest.skip(str(error))


# Backends that serve an operator on some machine. Without a GPU Triton's kernels run in its interpreter and those of
# csrc in their host build.
EVERY = ("portable", "triton", "cuda")
SERVED = {"logprobs": EVERY, "policy_loss": EVERY, "divergence": EVERY[:2]}


def pairs(*operators: Operator) -> pytest.MarkDecorator:
    """Parameters `operator` and `backend`."""
    made = [(o, name) for o in operators for name in SERVED[o.op]]
    return pytest.mark.parametrize("operator, backend", made, ids=name_of)


def leaves_of(operator: Operator, made: dict) -> dict[str, torch.Tensor]:
    return {n: made[n] for n in operator.leaves if made[n] is not None and made[n].requires_grad}


def mixed_sum(results: dict, seed: int, keep: torch.Tensor | None = None) -> torch.Tensor:
    """A scalar in which every result that may learn has its own coefficient; three rows in ten, and those outside
    `keep` (rows,), have none and never meet the sum, whatever they hold."""
    generator, total = torch.Generator().manual_seed(seed + 1), 0.0
    for name, part in results.items():
        if name.startswith("seen_"):
            continue
        factors = torch.randn(part.shape, generator=generator, dtype=DOUBLE)
        if part.dim():
            factors[torch.rand(part.shape, generator=generator) < 0.3] = 0.0
            factors = factors if keep is None else factors.masked_fill(~keep.cpu(), 0.0)
        factors = factors.to(part)
        total = total + torch.where(factors != 0, part * factors, 0.0).sum()
    return total


def run(operator: Operator, made: dict, seed: int = 0, keep: torch.Tensor | None = None, **options) -> dict:
    """Results, and gradients of a mixed sum of them as d_<leaf>, made in memory full of NaN."""
    wrt = leaves_of(operator, made)
    with poisoned_memory():
        results = operator.call(made, **options)
        grads = torch.autograd.grad(mixed_sum(results, seed, keep), list(wrt.values()))
    named = {name: value.detach() for name, value in results.items()}
    return named | {f"d_{name}": grad for name, grad in zip(wrt, grads, strict=True)}


def assert_same(found: dict, expected: dict, what: str = "", **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{what} {n}: {m}", **tolerance)


def assert_by_the_rule(operator: Operator, case: HeadCase, seed: int, dtype: torch.dtype, backend: str, **options):
    """A backend's numbers by the error rule: float64 is the truth, the definition in the same dtype the yardstick."""

    def found_by(backend: str, wide: bool = False) -> dict:
        return run(operator, draw(case, seed, dtype=dtype, wide=wide), seed, backend=backend, **options)

    judge(operator, case, dtype, found_by(backend), found_by("reference"), found_by("reference", wide=True))


class LargestTensor(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, torch.Tensor):
                self.size = max(self.size, part.numel())
        return result


def judge(operator: Operator, case: HeadCase, dtype: torch.dtype, found: dict, eager: dict, truth: dict) -> None:
    """The error rule for all results and gradients of `run`."""
    assert found.keys() == truth.keys()
    # What log-probabilities and divergences subtract; below its clamp k3 has a slope of up to 11 in those. In float32 a
    # divergence's gradient is such a difference times the weight's rows or hidden states, and a KL penalty's 0.1 of it.
    size = max(20.0, 10.0 * case.logit_size * abs(case.logit_scale) / case.temperature)
    subtracted = {"divergence": size, "policy_loss_with_entropy": 0.1 * size}.get(operator.name, 0.0)
    of_gradients = subtracted if dtype == torch.float32 else 0.0
    for name, value in found.items():
        of_input, of_hidden = name.startswith("d_"), name.startswith("d_hidden")
        factor = case.logit_size / case.hidden**0.5 if of_hidden else 11.0 if name == "k3" else 1.0
        assert_close_to_truth(
            value,
            eager[name],
            truth[name],
            name=f"{operator.name} {case.name} {name}",
            dtype=value.dtype if of_input else torch.float32,
            floor=factor * (of_gradients if of_input else size),
            eager_cap=sum_cap(case.vocab, exponents=case.logit_size, dtype=value.dtype),
            slack=sum_error(case.vocab, value.dtype) if of_hidden else 0.0,
        )
