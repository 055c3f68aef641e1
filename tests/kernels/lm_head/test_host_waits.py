"""What no operator of the lm head may do: make its caller wait for the device more often than it must count.

Without a GPU Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from mmrpt_kernels.lm_head.row_softmax import row_kernels
from mmrpt_kernels.logprobs import fused as logprobs_fused
from mmrpt_kernels.policy_loss import fused, linear_policy_loss
from mmrpt_kernels.testing import HeadCase
from tests.kernels.lm_head.operators import DEVICE, ONE_VIEW, draw, name_of

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # `make gpu` runs what is marked
CASE = HeadCase("plain", 24, 16, 131, chunk_size=9)


@pytest.mark.gpu
def test_a_step_is_captured_in_a_cuda_graph(seed):
    """Nothing waits that need not count: the captured step gives the eager step's numbers for new values too."""
    made = draw(CASE._replace(ignored="none"), seed, dtype=torch.bfloat16)
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


CALLS = [(operator, {}, 1) for operator in ONE_VIEW]
CALLS += [(operator, {"return_statistics": True}, 1) for operator in ONE_VIEW[4:]]
CALLS += [(operator, {"ratio_level": "sequence"}, 2) for operator in ONE_VIEW[4:]]


@pytest.mark.parametrize(("operator", "options", "counts"), CALLS, ids=name_of)
def test_how_often_the_host_waits(operator, options, counts, waiting, seed):
    """Once a call that counts its rows, once more for sequence ratios, and once in a backward that counts its own;
    never with compact=False."""
    made = draw(CASE, seed, dtype=torch.float32)
    for compact in (True, False):
        with waiting:
            results = operator.call(made, compact=compact, backend="triton", **options)
            if operator.by_rows:
                sum(part.sum() for part in results.values()).backward()
        assert len(waiting.waits) == ((counts + operator.by_rows) if compact else 0), waiting.waits
        waiting.waits.clear()
