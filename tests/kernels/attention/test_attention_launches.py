"""Where the attention kernels are launched and what they touch there: the tensors' device, the tensors' own memory."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from mmrpt_kernels.attention import attention_with_visual_mass, visual_mass
from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.triton import attention, backward_dkv, backward_dq, forward, mass_forward
from mmrpt_kernels.testing.aot import recorded_launches
from tests.kernels.attention.attention_checks import cumulative
from tests.kernels.devices import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="not interpreting")
ROWS, KEYS, FEW_KEYS = 21, 140, 40


def tensors(seed: int) -> list[torch.Tensor]:
    """q (1, ROWS, 4, 8), k and v (1, KEYS, 2, 8), weights (1, KEYS, 2)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, ROWS, 4, 8), (1, KEYS, 2, 8), (1, KEYS, 2, 8), (1, KEYS, 2))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def whole(q, k, v, weights):
    return sum(x.sum() for x in attention_with_visual_mass(q, k, v, weights, backend="triton"))


def packed(q, k, v, weights):
    lengths = {"cu_seqlens_q": cumulative([5, ROWS - 5]), "cu_seqlens_k": cumulative([80, KEYS - 80])}
    found = attention_with_visual_mass(q[0], k[0], v[0], weights[0], backend="triton", **lengths)
    return sum(x.sum() for x in found)


def mass_alone(q, k, v, weights):
    return visual_mass(q, k, torch.full((1, 4, ROWS), 5.0), weights, backend="triton").sum()


@pytest.mark.parametrize("call", [whole, packed, mass_alone], ids=lambda call: call.__name__)
def test_every_kernel_is_launched_on_the_device_of_its_tensors(call, monkeypatch, seed):
    """Triton launches on the current device. Under device_map="auto" that is not where the tensors of a layer are."""
    inputs = tensors(seed)
    current, launched = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.untyped_storage().data_ptr())
        yield
        current.pop()

    execute = GridExecutor.__call__

    def recorded(self, *arguments, **keywords):
        launched.append((self.fn.__name__, current[-1] if current else None))
        return execute(self, *arguments, **keywords)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", recorded)
    call(*inputs).backward()
    assert len({name for name, _ in launched}) >= 4
    here = inputs[0].untyped_storage().data_ptr()
    assert [name for name, place in launched if place != here] == []


def test_out_and_lse_are_made_once_whatever_the_number_of_groups(seed):
    """Twelve images: the visit of the keys that makes out takes four, a pass over their own keys the others."""
    q, k, v, _ = tensors(seed)
    weights, options = torch.ones(1, KEYS, 12, dtype=torch.bool), AttentionOptions(-1, 0, 0.3, 0.0)
    with recorded_launches(forward, mass_forward, arch=90) as specs:
        attention(q, k, v, weights, options)
    assert [(spec.kernel, spec.signature.get("groups")) for spec in specs] == [
        ("_forward", "i32"),
        ("_mass_forward", "i32"),
    ]
    mask = torch.ones(1, 1, ROWS, KEYS, dtype=torch.bool)  # the pass over further groups knows no mask of all pairs
    with recorded_launches(forward, mass_forward, arch=90) as specs:
        attention(q, k, v, weights, options, Masks(attn_mask=mask))
    assert [spec.kernel for spec in specs] == ["_forward"] * 3


OUTPUTS = ("out", "mass_out", "lse_out", "dq_out", "dk_out", "dv_out", "dw_out")


def fence(monkeypatch) -> list[str]:
    """Kernels write into copies of their outputs that have a fence behind them; returns the names of those written."""
    written = []

    def fenced(launch):
        def launched(kernel, grid, arguments, settings):
            own = {name: x for name, x in arguments.items() if name in OUTPUTS and x is not None}
            fences = {name: torch.cat([x.flatten(), x.new_full((4096,), 7.0)]) for name, x in own.items()}
            copies = {name: fences[name][: x.numel()].view(x.shape) for name, x in own.items()}
            launch(kernel, grid, arguments | copies, settings)
            for name, x in own.items():
                assert (fences[name][x.numel() :] == 7.0).all(), f"{kernel.__name__} wrote behind the end of {name}"
                x.data.copy_(copies[name])
            written.extend(own)

        return launched

    for module in (forward, backward_dq, backward_dkv):
        monkeypatch.setattr(module, "launch", fenced(module.launch))
    return written


@pytest.mark.parametrize("beyond", [(7, 7), (0, 9), (7, 0)], ids=str)
def test_lengths_beyond_the_tensors_lead_nowhere(beyond, monkeypatch, seed):
    """Nobody can check cu_seqlens on a GPU without waiting for it: too large an end counts as the tensor's."""
    inputs = [x.detach()[0, :FEW_KEYS] for x in tensors(seed)]
    # Rows behind the end are there to be read, and NaN.
    inputs = [torch.cat([x, x.new_full((16, *x.shape[1:]), torch.nan)])[: x.shape[0]].requires_grad_() for x in inputs]
    written = fence(monkeypatch)

    def results(rows: int, keys: int) -> list[torch.Tensor]:
        cu = {"cu_seqlens_q": torch.tensor([0, 5, rows]), "cu_seqlens_k": torch.tensor([0, 18, keys])}
        found = attention(*inputs, AttentionOptions(-1, 0, 0.3, 0.0), Masks(**cu))
        return [*found, *torch.autograd.grad(sum(x.sum() for x in found), inputs)]

    expected = results(ROWS, FEW_KEYS)
    assert set(written) == set(OUTPUTS)
    for found, wanted in zip(results(ROWS + beyond[0], FEW_KEYS + beyond[1]), expected, strict=True):
        assert torch.equal(found, wanted) and found.isfinite().all()
