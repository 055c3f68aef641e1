"""The loss operators over Triton's and CUDA's row kernels, end to end, against the definition; and what none of them
may do: wait.

Without a GPU Triton's kernels run in its interpreter and CUDA's in their host build.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from mmrpt_kernels import backends
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions
from mmrpt_kernels.lm_head.row_softmax import row_kernels
from mmrpt_kernels.logprobs import fused as logprobs_fused
from mmrpt_kernels.logprobs import linear_logprobs
from mmrpt_kernels.policy_loss import fused, linear_policy_loss, linear_token_loss
from mmrpt_kernels.policy_loss.options import PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import PolicyTokenLoss
from mmrpt_kernels.testing import (
    HEAD_CASES,
    HeadCase,
    assert_close_to_truth,
    head_inputs,
    poisoned_memory,
    sum_cap,
    sum_error,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # `make gpu` runs what is marked
PLAIN = HeadCase("plain", 24, 16, 131, chunk_size=7)
LEAVES = ("hidden", "weight", "bias")
VARIANTS = {
    "clip": {"old": True},
    "vppo": {"old": True, "clip_high": 0.28, "dual_clip": 3.0, "entropy_coef": -0.06, "entropy_kind": "sampled"},
    "everything": {"old": True, "kl_coef": 0.1, "entropy_coef": 0.05, "aggregation": "sum"},
    "gspo": {"old": True, "ratio_level": "sequence", "aggregation": "sequence_mean"},
    "cispo": {"old": True, "surrogate": "cispo", "normalizer": 30.0},
    "on_policy": {"old": False, "entropy_coef": 0.05, "entropy_scope": "kept"},
    "not_compacted": {"old": True, "kl_coef": 0.1, "entropy_coef": 0.05, "compact": False},
}


@pytest.fixture(params=("triton", "cuda"))
def backend(request) -> str:
    if request.param == "cuda" and (reason := backends._why_no_extension(DEVICE)):
        pytest.skip(reason)
    return request.param


def leaves(case: HeadCase, seed: int, dtype: torch.dtype, upcast: bool) -> dict:
    made = head_inputs(case, dtype=dtype, device=DEVICE, seed=seed)
    for name in LEAVES:
        if made[name] is not None:
            made[name] = (made[name].double() if upcast else made[name]).requires_grad_()
    return made


def head_options(case: HeadCase) -> dict:
    return {name: getattr(case, name) for name in ("temperature", "softcap", "logit_scale", "chunk_size")}


def differentiated(made: dict, outputs: dict[str, torch.Tensor], total: torch.Tensor) -> dict[str, torch.Tensor]:
    wrt = {name: made[name] for name in LEAVES if made[name] is not None}
    grads = torch.autograd.grad(total, list(wrt.values()))
    return {n: t.detach() for n, t in outputs.items()} | {f"d_{n}": g for n, g in zip(wrt, grads, strict=True)}


def score(case: HeadCase, seed: int, backend: str, dtype: torch.dtype, upcast: bool = False, **options) -> dict:
    """linear_logprobs: outputs and gradients of a random combination of them."""
    made = leaves(case, seed, dtype, upcast)
    generator = torch.Generator().manual_seed(seed + 1)
    factors = torch.randn(2, case.rows, generator=generator, dtype=torch.float64)
    factors[:, torch.rand(case.rows, generator=generator) < 0.3] = 0.0
    factors = factors.to(DEVICE)
    with poisoned_memory():
        out = linear_logprobs(
            *(made[n] for n in ("hidden", "weight", "targets")),
            bias=made["bias"],
            return_entropy=True,
            backend=backend,
            **head_options(case),
            **options,
        )
        total = (out.logps * factors[0]).sum() + (out.entropy * factors[1]).sum()
        return differentiated(made, out._asdict(), total)


def learn(
    case: HeadCase,
    seed: int,
    backend: str,
    dtype: torch.dtype,
    upcast: bool = False,
    *,
    old: bool,
    loss_scale: float = 1.0,
    **options,
) -> dict:
    """linear_policy_loss on (4, T): loss, log-probs, entropies and gradients, those times loss_scale."""
    made = leaves(case, seed, dtype, upcast)
    shape = (4, case.rows // 4)
    generator = torch.Generator().manual_seed(seed + 2)

    def drawn(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64).to(DEVICE)

    with poisoned_memory():
        hidden = made["hidden"].view(*shape, case.hidden)
        own = linear_logprobs(
            *(t.detach().double() for t in (hidden, made["weight"])), made["targets"].view(shape), backend="reference"
        ).logps
        response, kept = drawn(*shape) < 0.8, drawn(*shape) < 0.6
        out = linear_policy_loss(
            hidden,
            made["weight"],
            made["targets"].view(shape),
            drawn(4) - 0.5,
            response_mask=response,
            perception_mask=kept,
            old_logps=own + 0.4 * (drawn(*shape) - 0.5) if old else None,
            ref_logps=own + drawn(*shape) - 0.5,
            bias=made["bias"],
            return_statistics=True,
            backend=backend,
            **head_options(case),
            **options,
        )
        return differentiated(
            made, {"loss": out.loss, "logps": out.logps, "entropy": out.entropy}, loss_scale * out.loss
        )


def assert_by_the_rule(run, case: HeadCase, seed: int, dtype: torch.dtype, backend: str = "triton", **options) -> None:
    """A backend's numbers against float64 by the error rule; the definition in the same dtype is the yardstick."""
    truth = run(case, seed, "reference", dtype, True, **options)
    eager = run(case, seed, "reference", dtype, **options)
    found = run(case, seed, backend, dtype, **options)
    assert found.keys() == truth.keys()
    size = max(20.0, 10.0 * case.logit_size)  # log-probs are differences of logits
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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: case.name)
def test_log_probabilities(case, dtype, backend, seed):
    if dtype == torch.float16:  # its range
        case = case._replace(logit_size=min(case.logit_size, 1e3))
    assert_by_the_rule(score, case, seed, dtype, backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_policy_loss(options, dtype, backend, seed):
    assert_by_the_rule(learn, PLAIN, seed, dtype, backend, **options)


def test_float16_gradients_fit_at_low_temperatures(seed):
    """d z / d raw = logit_scale / temperature counts in what a word's gradient can come to."""
    case = PLAIN._replace(temperature=0.2, logit_scale=3.0, bias=True)
    assert_by_the_rule(score, case, seed, torch.float16)


@pytest.mark.parametrize("backend", ("portable", "triton"))
@pytest.mark.parametrize("entropy_coef", (0.0, 0.05))
def test_float16_gradients_outlive_a_small_loss(backend, entropy_coef, seed):
    """A loss over a million tokens has gradients below float16's range: they wait for the loss scale in float32."""
    case = PLAIN._replace(ignored="none", vocab=4001)
    how = {"old": True, "entropy_coef": entropy_coef, "normalizer": 2.0**20, "loss_scale": 2.0**20}
    truth = learn(case, seed, "reference", torch.float16, True, **how)
    eager = learn(case, seed, "reference", torch.float16, **how | {"normalizer": 1.0, "loss_scale": 1.0})
    found = learn(case, seed, backend, torch.float16, **how)
    for name in ("d_hidden", "d_weight"):
        assert found[name].dtype == torch.float16
        assert_close_to_truth(found[name], eager[name], truth[name], name=f"{name} seed {seed}")


def test_head_options(seed):
    case = PLAIN._replace(bias=True, softcap=5.0, logit_scale=1.7, temperature=1.3)
    assert_by_the_rule(learn, case, seed, torch.float32, **VARIANTS["everything"])


def test_token_loss(backend, seed):
    made = leaves(PLAIN, seed, torch.float32, False)
    wrt = (made["hidden"], made["weight"])

    def focal(logps, entropy, taken):
        return -((1 - logps.exp()) ** 2) * logps + 0.1 * entropy

    found, expected = (
        linear_token_loss(*wrt, made["targets"], focal, chunk_size=7, backend=name) for name in (backend, "reference")
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, wrt) for x in (found, expected)), rtol=1e-4, atol=1e-5)


def test_log_prob_contract(seed):
    """Within 1e-5 of float64 given the same bfloat16 inputs, at a large vocabulary, whatever the chunk."""
    case = HeadCase("contract", 6, 64, 151_936, logit_size=4.0, ignored="none")
    made, wide = (leaves(case, seed, torch.bfloat16, upcast) for upcast in (False, True))
    names = ("hidden", "weight", "targets")
    with torch.no_grad():
        truth = linear_logprobs(*(wide[n] for n in names), return_entropy=True, backend="reference")
        for chunk_size in (None, 4):
            found = linear_logprobs(
                *(made[n] for n in names), return_entropy=True, chunk_size=chunk_size, backend="triton"
            )
            for value, expected in zip(found, truth, strict=True):
                assert (value.double() - expected).abs().max() < 1e-5, f"seed {seed}"


def test_compiles_without_graph_break(seed, fresh_compiler):
    """The implementation is imported while the compiler traces."""
    made = leaves(PLAIN, seed, torch.float32, False)

    def loss(hidden, weight):
        out = linear_logprobs(hidden, weight, made["targets"], return_entropy=True, backend="triton")
        return (out.logps.exp() - out.entropy).sum()

    wrt = (made["hidden"], made["weight"])
    compiled, eager = torch.compile(loss, fullgraph=True, backend="aot_eager")(*wrt), loss(*wrt)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, wrt), torch.autograd.grad(eager, wrt))


def test_float64_is_not_served():
    made = head_inputs(PLAIN, dtype=torch.float32, device=DEVICE)
    with pytest.raises(backends.BackendError, match="tensors are torch.float64"):
        linear_logprobs(made["hidden"], made["weight"].double(), made["targets"], backend="triton")


@pytest.mark.parametrize("chunk_size", (None, 100))
def test_gradients_of_one_chunk_and_of_many(chunk_size, seed):
    """Enough rows for several chunks or for one, whose weight gradient a GPU makes without an accumulator."""
    case = PLAIN._replace(rows=256, hidden=64, vocab=515, chunk_size=chunk_size)
    assert_by_the_rule(learn, case, seed, torch.bfloat16, **VARIANTS["everything"])


@pytest.mark.gpu
def test_a_step_is_captured_in_a_cuda_graph(seed):
    """Nothing waits that need not count: the captured step gives the eager step's numbers for new values too."""
    made = leaves(PLAIN._replace(ignored="none"), seed, torch.bfloat16, False)
    wrt, targets = (made["hidden"], made["weight"]), made["targets"].view(4, -1)
    response, advantages = torch.rand(targets.shape, device=DEVICE) < 0.7, torch.randn(4, device=DEVICE)
    old = torch.randn(targets.shape, device=DEVICE) - 6.0

    def step(compact: bool) -> tuple[torch.Tensor, ...]:
        hidden = wrt[0].view(*targets.shape, -1)
        out = linear_policy_loss(
            hidden, wrt[1], targets, advantages, response_mask=response, old_logps=old, compact=compact
        )
        return out.loss.detach(), *torch.autograd.grad(out.loss, wrt)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step(False)
    with torch.no_grad():
        wrt[0].copy_(torch.randn_like(wrt[0]))
        response.copy_(torch.rand(targets.shape, device=DEVICE) < 0.5)
    graph.replay()
    torch.testing.assert_close(captured, step(True))


class NoWaiting(TorchDispatchMode):
    """Counts the operators that make a GPU's caller wait for its results."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith(("index", "masked_select")) and any(
            isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)
            for t in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in ("nonzero", "_local_scalar_dense", "masked_select", "unique", "repeat_interleave") or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waiting(monkeypatch) -> NoWaiting:
    """Sees what waits on any device; checks of values, which a CPU alone makes, are left out."""
    row_kernels("triton")
    mode, tolist = NoWaiting(), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: mode.waits.append("tolist") or tolist(tensor))
    for module in (fused, logprobs_fused):
        monkeypatch.setattr(module, "check_targets", lambda *_: None)
    return mode


@pytest.mark.parametrize("see_all", (False, True), ids=("learning", "see_all"))
@pytest.mark.parametrize(
    ("options", "compacted"),
    [
        (PolicyOptions(kl_coef=0.1, entropy_coef=0.1), 1),
        (PolicyOptions(), 1),
        (PolicyOptions(ratio_level="sequence"), 2),
    ],
    ids=("entropy", "one_sweep", "sequence"),
)
def test_how_often_the_host_waits(options, compacted, see_all, waiting, seed):
    """Once a call that counts its tokens, once more for sequence ratios; never where it takes all."""
    made = head_inputs(PLAIN._replace(ignored="none"), device=DEVICE, seed=seed)
    masks = torch.rand(2, PLAIN.rows, device=DEVICE) < 0.7
    floats = [torch.randn(PLAIN.rows, device=DEVICE) for _ in range(4)]
    tokens = PolicyTokens(masks[0], masks[0] & masks[1], floats[0], floats[1], floats[2], None)
    tensors, loss = (
        (made["hidden"].view(4, 6, -1), made["weight"], None),
        PolicyTokenLoss.of(tokens, floats[3], options),
    )
    for compact in (True, False):
        loop = LoopOptions("triton", chunk_size=9, compact=compact)
        arguments = (made["targets"].view(4, 6), loss, see_all, (True, True, False), HeadOptions(), loop)
        with torch.no_grad(), waiting:
            fused.policy_loss(*tensors, *arguments)
        assert len(waiting.waits) == (compacted if compact else 0), waiting.waits
        waiting.waits.clear()


@pytest.mark.parametrize("entropy", (False, True), ids=("logps", "entropy"))
def test_how_often_the_host_waits_for_log_probabilities(entropy, waiting, seed):
    """Once in each pass, to count its rows; never with compact=False."""
    made = leaves(PLAIN, seed, torch.float32, False)
    for compact in (True, False):
        with waiting:
            found = linear_logprobs(
                *(made[n] for n in ("hidden", "weight", "targets")),
                return_entropy=entropy,
                chunk_size=9,
                compact=compact,
                backend="triton",
            )
            (found.logps.sum() + (found.entropy.sum() if entropy else 0.0)).backward()
        assert len(waiting.waits) == (2 if compact else 0), waiting.waits
        waiting.waits.clear()
