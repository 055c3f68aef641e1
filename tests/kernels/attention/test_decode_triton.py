"""Decoding on triton: a few rows over a long cache, keys split over programs, against the definition; and its code.

Without a GPU Triton's interpreter runs the kernels, and the compiler says what they would need.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.attention import attention_with_visual_mass, reference
from mmrpt_kernels.attention.config import MAX_GROUPS_DECODE
from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.triton import attention, attention_op, decode
from mmrpt_kernels.attention.triton.launch import prepare
from mmrpt_kernels.testing import AttentionCase, attention_inputs
from mmrpt_kernels.testing.aot import compile_kernels, recorded_launches
from tests.kernels.attention.test_attention import (
    grouped,
    half_precision,
    keywords_of,
    options_of,
    three_ways,
)
from tests.kernels.devices import by_case_and_device, on, on_devices

CASES = (
    AttentionCase("one_row", 1, 1, 300, 4, 2, 16),
    AttentionCase("sixteen_rows", 1, 16, 150, 3, 1, 24, dim_v=40),
    AttentionCase("many_heads_to_a_key_head", 1, 5, 129, 9, 1, 8),
    AttentionCase("window", 2, 5, 200, 2, 1, 16, window_size=(60, 0), weights="float", groups=2, padding="left"),
    AttentionCase("two_sided_window", 1, 7, 200, 2, 2, 8, causal=False, window_size=(20, 4)),
    AttentionCase("softcap", 1, 3, 200, 2, 2, 8, softcap=3.0, score_size=4.0),
    AttentionCase("eighteen_groups", 1, 2, 140, 2, 2, 8, groups=18),
    AttentionCase("a_cache_half_filled", 2, 1, 256, 2, 1, 8, padding="right"),
    AttentionCase("an_empty_sample", 2, 2, 130, 2, 2, 8, padding="one_row_empty"),
    AttentionCase("nothing_visual", 1, 1, 128, 2, 2, 8, weights="none_visual"),
    AttentionCase("peaked", 1, 4, 200, 2, 2, 16, score_size=40.0),
)
GPU_CASES = (
    AttentionCase("long_cache", 1, 1, 8191, 28, 4, 128, groups=2),
    AttentionCase("long_batch", 8, 1, 4100, 16, 8, 128, padding="left"),
    AttentionCase("drafts", 2, 16, 5000, 28, 4, 128, weights="float"),
    AttentionCase("wide_heads", 1, 3, 3000, 8, 1, 256, softcap=20.0, score_size=4.0, window_size=(1000, 0)),
    AttentionCase("odd_head_size", 2, 2, 1025, 4, 4, 80),
)


@pytest.fixture(autouse=True)
def decoding_alone(monkeypatch):
    """The fused forward pass must not help out."""

    def refused(problem):
        raise AssertionError("the fused forward pass ran")

    monkeypatch.setattr(attention_op, "forward", refused)


def decoded(device: str, options: AttentionOptions, **masks):
    """(q, k, v, weights) -> (out, mass, lse) of triton.attention on `device`."""
    run = on(device, lambda q, k, v, w, **moved: attention(q, k, v, grouped(w, q), options, **moved))
    return lambda *tensors: run(*tensors, **masks)


@by_case_and_device(CASES, GPU_CASES)
def test_it_meets_the_definition(case, device, seed):
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    padding, options = inputs.pop("key_padding_mask"), options_of(case)

    def definition(q, k, v, w, dtype):
        return reference.attention(q, k, v, grouped(w, q), options, key_padding_mask=padding, dtype=dtype)

    lse = definition(*inputs.values(), dtype=torch.float64)[2]
    three_ways(decoded(device, options, key_padding_mask=padding), definition, list(inputs.values()), seed, lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_case_and_device(CASES[:2], GPU_CASES)
def test_half_precision_errs_no_more_than_eager(case, device, dtype, seed):
    inputs = attention_inputs(case, dtype=dtype, seed=seed)
    padding, options = inputs.pop("key_padding_mask"), options_of(case)

    def definition(q, k, v, w, dtype):
        return reference.attention(q, k, v, grouped(w, q), options, key_padding_mask=padding, dtype=dtype)

    lse = definition(*inputs.values(), dtype=torch.float64)[2]
    call = decoded(device, options, key_padding_mask=padding)
    half_precision(call, definition, list(inputs.values()), seed, lse, gradients=False)


@on_devices
def test_the_number_of_splits_changes_little(device, monkeypatch, seed):
    case = AttentionCase("splits", 1, 3, 410, 4, 2, 16, groups=2, padding="left")
    inputs = attention_inputs(case, seed=seed)
    padding = inputs.pop("key_padding_mask")
    found, counted = [], []
    for splits in (1, 2, 7, 26):

        def plan(programs, blocks, device, splits=splits):
            size = -(-blocks // splits)
            counted.append(-(-blocks // size))
            return counted[-1], size

        monkeypatch.setattr(decode, "_splits", plan)
        found.append(decoded(device, options_of(case), key_padding_mask=padding)(*inputs.values()))
    assert counted[0] == 1 and len(set(counted)) >= 3
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@on_devices
@pytest.mark.parametrize("case", [c for c in CASES if c.groups == 0], ids=lambda case: case.name)
def test_laws_of_boolean_masses(case, device, seed):
    """In [0, 1]; the masses of a partition sum to 1; exactly 1 where only weighted keys are seen; 0 in dead rows."""
    inputs = attention_inputs(case, seed=seed)
    padding = inputs.pop("key_padding_mask")
    part = torch.randint(4, inputs["k"].shape[:2], generator=torch.Generator().manual_seed(seed))
    members = torch.nn.functional.one_hot(part, 4).bool()
    inputs["key_weights"] = torch.cat([members, torch.ones_like(members[..., :1])], dim=-1)
    out, mass, lse = decoded(device, options_of(case), key_padding_mask=padding)(*inputs.values())
    dead = lse == -torch.inf
    assert (mass >= 0).all() and (mass <= 1).all()
    assert torch.equal(mass[..., 4], (~dead).float()), "a row that sees weighted keys alone has mass 1"
    partition = mass[..., :4].double().sum(-1)
    assert (partition - (~dead).double()).abs().max() <= 8 * torch.finfo(torch.float32).eps
    assert (out.transpose(1, 2)[dead] == 0).all() and torch.isfinite(out).all()


@on_devices
@pytest.mark.parametrize("batch_of_mask", [1, 2])
def test_any_mask_meets_the_definition(batch_of_mask, device, seed):
    case = AttentionCase("mask", 2, 6, 170, 2, 1, 8, groups=2)
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    inputs.pop("key_padding_mask")
    mask = torch.rand(batch_of_mask, 1, 6, 170, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[:, :, 5] = False
    options = AttentionOptions(-1, -1, case.dim**-0.5, 0.0)

    def definition(q, k, v, w, dtype):
        return reference.attention(q, k, v, w, options, attn_mask=mask, dtype=dtype)

    lse = definition(*inputs.values(), dtype=torch.float64)[2]
    assert (lse[:, :, 5] == -torch.inf).all()
    three_ways(decoded(device, options, attn_mask=mask), definition, list(inputs.values()), seed, lse)


@on_devices
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_keys_reach_only_rows_that_attend_to_them(bad, device, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 8, 2, 8, generator=generator)
    k, v = (torch.randn(2, 140, 2, 8, generator=generator) for _ in range(2))
    weights = torch.rand(2, 140, 1, generator=generator) < 0.5
    call = decoded(device, AttentionOptions(-1, 0, 8**-0.5, 0.0))
    clean = call(q, k, v, weights)
    k[1, 136, 0] = bad
    out, mass, lse = call(q, k, v, weights)
    touched = torch.zeros(2, 2, 8, dtype=torch.bool)
    touched[1, 0, 4:] = True  # row t stands at key position t + 132
    assert torch.equal(out.transpose(1, 2)[~touched], clean[0].transpose(1, 2)[~touched])
    assert torch.equal(mass[~touched], clean[1][~touched]) and torch.equal(lse[~touched], clean[2][~touched])
    if bad is torch.nan:
        assert mass[touched].isnan().all() and lse[touched].isnan().all()


@on_devices
def test_a_cache_of_any_strides(device, seed):
    """(B, Hkv, S, D) memory, as caches have it, is read in place; padded positions hold NaN."""
    case = AttentionCase("strides", 2, 3, 150, 4, 2, 8, groups=2, padding="left", weights="float")
    inputs = attention_inputs(case, seed=seed)
    padding = inputs.pop("key_padding_mask")
    q, k, v, weights = inputs.values()
    options = options_of(case)
    clean = decoded(device, options, key_padding_mask=padding)(q, k, v, weights)
    k[~padding], v[~padding] = torch.nan, torch.inf
    k, v = (x.to(device).transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    weights = weights.to(device).mT.contiguous().mT
    found = attention(q.to(device), k, v, weights, options, key_padding_mask=padding.to(device))
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a.cpu(), b)


@on_devices
def test_a_step_is_the_last_row_of_the_whole(device, seed, monkeypatch):
    monkeypatch.undo()  # here the fused pass makes the whole
    case = AttentionCase("whole", 1, 160, 160, 4, 2, 16, softcap=5.0, window_size=(100, 0))
    inputs = {name: None if x is None else x.to(device) for name, x in attention_inputs(case, seed=seed).items()}
    keywords = keywords_of(case, inputs.pop("key_padding_mask"))
    whole = attention_with_visual_mass(**inputs, **keywords, backend="triton")
    inputs["q"] = inputs["q"][:, -2:]
    step = attention_with_visual_mass(**inputs, **keywords, backend="triton")
    torch.testing.assert_close(step.out, whole.out[:, -2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.mass, whole.mass[:, :, -2:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.lse, whole.lse[:, :, -2:], rtol=1e-5, atol=1e-5)


def test_who_is_served():
    def problem(rows: int, keys: int, packed: bool = False):
        q, k = torch.empty(2, rows, 4, 8, device="meta"), torch.empty(2, keys, 2, 8, device="meta")
        weights, cu = torch.empty(2, keys, 1, device="meta"), None
        if packed:
            q, k, weights = (x.flatten(0, 1) for x in (q, k, weights))
            cu = torch.empty(3, dtype=torch.int32, device="meta")
        return prepare(q, k, k, weights, AttentionOptions(-1, 0, 1.0, 0.0), (None, None, cu, cu))

    assert decode.serves(problem(1, 128)) and decode.serves(problem(16, 10_000))
    assert not decode.serves(problem(17, 10_000)) and not decode.serves(problem(1, 127))
    assert not decode.serves(problem(0, 200)) and not decode.serves(problem(1, 200, packed=True))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(seed):
    keys = 2**31 // (32 * 128) + 5000
    k = torch.empty(1, keys, 32, 128, dtype=torch.bfloat16, device="cuda").normal_()
    q = torch.randn(1, 1, 32, 128, dtype=torch.bfloat16, device="cuda")
    weights = torch.zeros(1, keys, dtype=torch.bool, device="cuda")
    weights[:, -300:-100] = True
    whole = attention_with_visual_mass(q, k, k, weights, window_size=(2000, 0))
    tail = attention_with_visual_mass(q, k[:, -3000:], k[:, -3000:], weights[:, -3000:], window_size=(2000, 0))
    for a, b in zip(whole, tail, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_a_step_gives_the_same_bits_again(seed):
    inputs = {name: x.cuda() for name, x in attention_inputs(GPU_CASES[0], seed=seed).items() if x is not None}
    first = attention_with_visual_mass(**inputs)
    for _ in range(3):
        for a, b in zip(attention_with_visual_mass(**inputs), first, strict=True):
            assert torch.equal(a, b)


# ---- what the compiler makes of the kernels ----


def launches(arch: int, dim: int, dtype: torch.dtype, worst: bool, monkeypatch) -> list:
    """Specs of both kernels; `worst`: everything that costs registers is on."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    rows = 16 if worst else 1
    q, k = empty(2, rows, 28, dim), empty(2, 8192, 4, dim)
    weights = empty(2, 8192, MAX_GROUPS_DECODE, of=torch.float32) if worst else empty(2, 8192, 1, of=torch.bool)
    masks = (empty(2, 8192, of=torch.bool), empty(2, 1, rows, 8192, of=torch.bool)) if worst else (None, None)
    options = AttentionOptions(500 if worst else -1, 0, 0.1, 30.0 if worst else 0.0)
    monkeypatch.setattr(decode, "architecture", lambda device: arch)
    with recorded_launches(decode, arch=arch) as specs:
        decode.decode(prepare(q, k, k, weights, options, (*masks, None, None)))
    assert [spec.kernel for spec in specs] == ["_split_kernel", "_merge_kernel"]
    return specs


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    "dims, dtype",
    [
        pytest.param((64, 128), torch.bfloat16, id="bfloat16"),
        pytest.param((80, 96, 256), torch.bfloat16, id="bfloat16_more", marks=pytest.mark.slow),
        pytest.param((64, 128), torch.float16, id="float16", marks=pytest.mark.slow),
        pytest.param((64, 80, 128, 256), torch.float32, id="float32", marks=pytest.mark.slow),
    ],
)
def test_no_configuration_spills(arch, dims, dtype, monkeypatch):
    specs = [spec for dim in dims for worst in (False, True) for spec in launches(arch, dim, dtype, worst, monkeypatch)]
    compiled = compile_kernels(list({spec.title: spec for spec in specs}.values()))
    split = [one for one in compiled if one.spec.kernel == "_split_kernel"]
    assert len(split) == 2 * len(dims)
    if dtype != torch.float32:
        assert all("mma.sync" in one.ptx and "cp.async" in one.ptx for one in split)
