"""Attention with visual mass as PyTorch code meets it: registration, compiler, autocast, checkpoints, errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmrpt_kernels.attention import attention_with_visual_mass, visual_mass
from tests.kernels.devices import INTERPRETING, on_devices

ROWS, KEYS, HEADS, DIM = 12, 12, 4, 8


def tensors(seed: int, dtype: torch.dtype = torch.float32, small: bool = False) -> tuple[torch.Tensor, ...]:
    """small: for Triton's interpreter."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, groups = (1, 2, 2) if small else (2, HEADS, 3)
    q = torch.randn(batch, ROWS, heads, DIM, generator=generator)
    k, v = (torch.randn(batch, KEYS, heads // 2, DIM, generator=generator) for _ in range(2))
    weights = torch.rand(batch, KEYS, groups, generator=generator)
    return tuple(t.to(dtype).requires_grad_() for t in (q, k, v, weights))


def loss_of(q, k, v, weights, **keywords) -> torch.Tensor:
    found = attention_with_visual_mass(q, k, v, weights, **keywords)
    again = visual_mass(q, k, found.lse.detach(), weights, **keywords)
    return found.out.square().sum() + found.mass.square().sum() + found.lse.sin().sum() + again.square().sum()


def gradients(call, leaves) -> list[torch.Tensor]:
    return list(torch.autograd.grad(call(*leaves), leaves))


PORTABLE_OPERATORS = ("attention_with_mass", "visual_mass")
OPERATORS = [(*PORTABLE_OPERATORS, packed, boolean) for packed in (False, True) for boolean in (False, True)]
OPERATORS += [("triton_attention", "triton_visual_mass", False, False)]


@pytest.mark.parametrize(("attend", "mass", "packed", "boolean"), OPERATORS)
@on_devices
def test_opcheck(attend, mass, packed, boolean, device, seed):
    made = tensors(seed)
    if attend == "triton_attention":
        pytest.importorskip("mmrpt_kernels.attention.triton")
        made = tensors(seed, torch.float16, small=True)
    q, k, v, weights = (t.detach().to(device).requires_grad_() for t in made)
    weights = weights.detach() > 0.5 if boolean else weights
    padding, cu = torch.ones(k.shape[:2], dtype=torch.bool, device=device), None
    wanted = torch.rand(q.shape[:2], device=device)
    if packed:
        q, k, v, weights, wanted = (
            t.detach().flatten(0, 1).requires_grad_(t.requires_grad) for t in (q, k, v, weights, wanted)
        )
        padding, cu = None, torch.tensor([0, 5, 24], dtype=torch.int32, device=device)
    rest = (cu, cu, -1, 0, 0.3, 0.0)
    attend, mass = (getattr(torch.ops.mmrpt_kernels, name).default for name in (attend, mass))
    torch.library.opcheck(attend, (q, k, v, weights, padding, None, None, *rest))
    lse = attend(q, k, v, weights, padding, None, None, *rest)[2].detach()
    torch.library.opcheck(mass, (q, k, lse, weights, padding, None, wanted < 0.6, *rest))


@pytest.mark.parametrize(
    ("backend", "keywords"),
    [("portable", {}), ("portable", {"softcap": 2.0, "window_size": (5, 0)}), ("sdpa+mass", {}), ("triton", {})],
    ids=str,
)
def test_compiles_without_graph_break(backend, keywords, seed, fresh_compiler):
    leaves = tensors(seed, small=backend == "triton")
    if backend == "triton" and not INTERPRETING:
        pytest.skip("not interpreting")

    def call(q, k, v, weights):
        if backend == "portable":
            return loss_of(q, k, v, weights, **keywords)
        return sum(x.square().sum() for x in attention_with_visual_mass(q, k, v, weights, backend=backend))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, leaves), gradients(call, leaves))


def test_compiles_packed_with_inductor(seed, fresh_compiler):
    leaves = [t.detach().flatten(0, 1).requires_grad_() for t in tensors(seed)]
    cu = torch.tensor([0, 5, 5, 24], dtype=torch.int32)

    def call(*t):
        return attention_with_visual_mass(*t, cu_seqlens_q=cu, cu_seqlens_k=cu, head_reduction="mean").mass.sum()

    torch.testing.assert_close(gradients(torch.compile(call, fullgraph=True), leaves), gradients(call, leaves))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, seed):
    leaves = tensors(seed)
    expected = gradients(loss_of, leaves)
    for leaf in leaves:
        leaf.grad = None
    checkpoint(loss_of, *leaves, use_reentrant=reentrant).backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected)


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_autocast_casts_inputs_and_keeps_float32_inside(backend, seed):
    q, k, v, weights = tensors(seed)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_with_visual_mass(q, k, v, weights, backend=backend)
        mass = visual_mass(q, k, found.lse, weights, backend=backend)
        (found.out.float().sum() + found.mass.sum() + mass.sum()).backward()
    rounded = (t.detach().bfloat16() for t in (q, k, v))
    expected = attention_with_visual_mass(*rounded, weights.detach(), backend="reference")
    assert found.out.dtype == torch.bfloat16 and found.mass.dtype == mass.dtype == torch.float32
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.mass, expected.mass, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass, expected.mass, rtol=1e-5, atol=1e-6)
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (q, k, v, weights))


def test_mean_over_heads(seed):
    leaves = tensors(seed, torch.float64)
    whole = attention_with_visual_mass(*leaves)
    mean = attention_with_visual_mass(*leaves, head_reduction="mean")
    torch.testing.assert_close(mean.mass, whole.mass.mean(1))
    assert mean.mass.shape == (2, ROWS, 3) and whole.mass.shape == (2, HEADS, ROWS, 3)
    one = attention_with_visual_mass(*leaves[:3], leaves[3][..., 0], head_reduction="mean")
    torch.testing.assert_close(one.mass, mean.mass[..., 0])


def test_mass_of_an_attention_that_only_reports_its_lse(seed):
    """FlexAttention, say: its lse, our mass, and the gradient of the whole."""
    q, k, v, weights = tensors(seed)
    flex = torch.nn.attention.flex_attention
    heads_first = [t.detach().transpose(1, 2) for t in (q, k, v)]
    _, aux = flex.flex_attention(
        *heads_first,
        score_mod=lambda score, b, h, i, j: torch.where(i >= j, score, -torch.inf),
        enable_gqa=True,
        return_aux=flex.AuxRequest(lse=True),
    )
    found = gradients(lambda q, k, w: visual_mass(q, k, aux.lse, w).square().sum(), (q, k, weights))
    expected = gradients(lambda q, k, w: attention_with_visual_mass(q, k, v, w).mass.square().sum(), (q, k, weights))
    torch.testing.assert_close(found, expected)


def test_forward_mode_raises_where_it_would_be_dropped():
    q, weights = torch.randn(1, 8, 2, 16), torch.arange(8).expand(1, 8) < 4
    lse = attention_with_visual_mass(q, q, q, weights).lse
    calls = (
        lambda x, backend: attention_with_visual_mass(x, q, q, weights, backend=backend).mass,
        lambda x, backend: visual_mass(x, q, lse, weights, backend=backend),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="reverse-mode derivatives only"):
            torch.func.jvp(lambda x: call(x, "portable"), (q,), (q,))  # noqa: B023
        assert torch.func.jvp(lambda x: call(x, "reference"), (q,), (q,))[1].any()  # noqa: B023
