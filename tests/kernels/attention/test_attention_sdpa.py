"""The vendor's attention with our mass behind it ("sdpa+mass"), forward and backward, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmrpt_kernels import BackendError, use_backend
from mmrpt_kernels.attention import attention_with_visual_mass, masked_attention_with_visual_mass, reference, sdpa
from mmrpt_kernels.testing import AttentionCase, attention_inputs
from tests.kernels.attention.test_attention import (
    CASES,
    cumulative,
    grouped,
    half_precision,
    keywords_of,
    options_of,
    three_ways,
    with_gradients,
)

SERVED = (
    *(
        case
        for case in CASES
        if case.name
        in ("one_token", "plain", "grouped_heads", "decode", "not_causal", "three_groups", "float_weights",
            "float_groups", "nothing_visual", "everything_visual", "peaked", "odd_sizes", "one_query_not_causal")
    ),
    AttentionCase("not_causal_many_keys", 2, 7, 131, 6, 2, 16, causal=False, weights="float"),
)  # fmt: skip
GPU_CASES = (
    AttentionCase("long", 1, 1031, 1031, 4, 2, 128, groups=2),
    AttentionCase("head_size_80", 2, 390, 390, 4, 4, 80),
    AttentionCase("head_size_256", 1, 515, 515, 2, 1, 256, weights="float"),
    AttentionCase("decode", 2, 1, 777, 8, 2, 128),
    AttentionCase("not_causal", 1, 801, 1203, 7, 1, 64, causal=False, weights="float"),
)


def served(case: AttentionCase, device: str = "cpu"):
    """(q, k, v, weights) -> (out, mass, lse) through the public function; weights as given, groups last."""

    def call(*tensors):
        found = attention_with_visual_mass(
            *(x.to(device) for x in tensors), causal=case.causal, window_size=case.window_size, backend="sdpa+mass"
        )
        mass = found.mass if tensors[3].dim() == 3 else found.mass[..., None]
        return found.out.cpu(), mass.cpu(), found.lse.cpu()

    return call


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_it_meets_the_definition(case, seed):
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    inputs.pop("key_padding_mask")

    def definition(q, k, v, w, dtype):
        return reference.attention(q, k, v, grouped(w, q), options_of(case), dtype=dtype)

    lse = definition(*inputs.values(), dtype=torch.float64)[2]
    three_ways(served(case), definition, list(inputs.values()), seed, lse, given=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=lambda x: x.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_every_kernel_of_a_gpu_errs_no_more_than_eager(case, dtype, kernel, seed):
    with sdpa_kernel(kernel):
        name = sdpa._kernel_name("cuda", None, case.dim)
    if name.upper() not in kernel.name:
        pytest.skip(f"{kernel.name} is not taken on this GPU at head size {case.dim}")
    inputs = attention_inputs(case, dtype=dtype, seed=seed)
    inputs.pop("key_padding_mask")

    def definition(q, k, v, w, dtype):
        return reference.attention(q, k, v, grouped(w, q), options_of(case), dtype=dtype)

    lse = definition(*inputs.values(), dtype=torch.float64)[2]
    with sdpa_kernel(kernel):
        half_precision(served(case, "cuda"), definition, list(inputs.values()), seed, lse)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal, seed):
    inputs = attention_inputs(AttentionCase("x", 1, 5, 5, 4, 2, 3, groups=2, weights="float"), dtype=torch.float64)
    inputs.pop("key_padding_mask")
    leaves = [t.requires_grad_() for t in inputs.values()]
    call = lambda *t: tuple(attention_with_visual_mass(*t, causal=causal, backend="sdpa+mass"))  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_masses_of_boolean_weights_are_shares(case, seed):
    inputs = attention_inputs(case, seed=seed)
    inputs.pop("key_padding_mask")
    members = torch.rand(inputs["k"].shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.5
    members = torch.stack([members, ~members, torch.ones_like(members)], dim=-1)
    _, mass, lse = served(case)(inputs["q"], inputs["k"], inputs["v"], members)
    assert lse.isfinite().all() and (mass >= 0).all() and (mass <= 1).all()
    # s - lse is rounded at the size of the lse.
    limit = 8 * torch.finfo(torch.float32).eps * max(1.0, lse.abs().max().item())
    assert (mass[..., 2] - 1).abs().max() <= limit and (mass[..., :2].sum(-1) - 1).abs().max() <= 2 * limit


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_keys_reach_only_rows_that_attend_to_them(bad, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, 40, 2, 8, generator=generator) for _ in range(3))
    weights = torch.rand(3, 40, generator=generator) < 0.5
    clean = attention_with_visual_mass(q, k, v, weights, backend="sdpa+mass")
    k[1, 25, 0] = bad
    found = attention_with_visual_mass(q, k, v, weights, backend="sdpa+mass")
    touched = torch.zeros(3, 2, 40, dtype=torch.bool)
    touched[1, 0, 25:] = True
    for name in ("mass", "lse"):
        torch.testing.assert_close(getattr(found, name)[~touched], getattr(clean, name)[~touched])
    torch.testing.assert_close(found.out.transpose(1, 2)[~touched], clean.out.transpose(1, 2)[~touched])
    if bad is torch.nan:
        assert found.lse[touched].isnan().all() and found.out.transpose(1, 2)[touched].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 3, 0)], ids=str)
def test_empty_inputs(shape):
    batch, rows, keys = shape
    q, k = torch.randn(batch, rows, 2, 8, requires_grad=True), torch.randn(batch, keys, 2, 8, requires_grad=True)
    weights = torch.ones(batch, keys, dtype=torch.bool)
    found = attention_with_visual_mass(q, k, k, weights, causal=False, backend="sdpa+mass")
    assert found.out.shape == (batch, rows, 2, 8) and (found.out == 0).all()
    assert found.mass.shape == (batch, 2, rows) and (found.mass == 0).all() and (found.lse == -torch.inf).all()
    (found.out.sum() + found.mass.sum()).backward()
    assert (q.grad == 0).all()


def test_it_is_traced_whole_and_the_operator_is_sound(fresh_compiler, seed):
    inputs = attention_inputs(AttentionCase("x", 1, 9, 9, 4, 2, 8), seed=seed)
    inputs.pop("key_padding_mask")

    def call(*tensors):
        return tuple(attention_with_visual_mass(*tensors, backend="sdpa+mass"))

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = with_gradients(call, list(inputs.values()), seed)
    for name, value in with_gradients(traced, list(inputs.values()), seed).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    q, k = (inputs[name].requires_grad_() for name in ("q", "k"))
    lse = torch.randn(1, 4, 9)
    torch.library.opcheck(torch.ops.mmrpt_kernels.sdpa_lse.default, (q, k, lse, True, 0.3))


REFUSED = {
    "softcap": {"softcap": 3.0},
    "window": {"window_size": (4, 0)},
    "key_padding_mask": {"key_padding_mask": torch.ones(2, 12, dtype=torch.bool)},
    "causal_suffix": {"q": torch.zeros(2, 5, 4, 8)},
    "value_dim": {"v": torch.zeros(2, 12, 2, 4)},
}


@pytest.mark.parametrize("trait", REFUSED)
def test_what_it_does_not_serve_it_refuses_with_the_reason(trait):
    good = {name: torch.zeros(2, 12, heads, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    good["key_weights"] = torch.ones(2, 12, dtype=torch.bool)
    with pytest.raises(BackendError, match=f"'sdpa.mass', which cannot.*not support: {trait};.*one of .*portable"):
        attention_with_visual_mass(**good | REFUSED[trait], backend="sdpa+mass")


def test_halves_on_a_cpu_are_refused():
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="it takes torch.float32, torch.float64, the tensors are torch.bfloat16"):
        attention_with_visual_mass(q, q, q, torch.ones(1, 4, dtype=torch.bool), backend="sdpa+mass")


def test_packed_and_masked_calls_are_refused():
    q, weights = torch.zeros(12, 2, 8), torch.ones(12, dtype=torch.bool)
    cu = cumulative([5, 7])
    with pytest.raises(BackendError, match="does not support: packed"):
        attention_with_visual_mass(q, q, q, weights, cu_seqlens_q=cu, cu_seqlens_k=cu, backend="sdpa+mass")
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(BackendError, match="does not support: attn_mask"):
        masked_attention_with_visual_mass(q[None], q[None], q[None], weights[None], mask, backend="sdpa+mass")


def test_it_serves_by_name_and_its_mass_comes_from_the_table(seed):
    case = SERVED[2]
    inputs = attention_inputs(case, seed=seed)
    keywords = keywords_of(case, inputs.pop("key_padding_mask"))
    expected = attention_with_visual_mass(**inputs, **keywords, backend="sdpa+mass")
    with use_backend("sdpa+mass"):
        found = attention_with_visual_mass(**inputs, **keywords)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    mean = attention_with_visual_mass(**inputs, **keywords, head_reduction="mean", backend="sdpa+mass")
    torch.testing.assert_close(mean.mass, expected.mass.mean(1))
