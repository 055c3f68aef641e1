"""The triton side pass: the mass from a known lse, forward and backward, against the definition; its lists; its code.

Without a GPU Triton's interpreter runs the kernels, and the compiler says what they would need.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.attention import reference, visual_mass
from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.triton import key_blocks, mass_forward, query_list, side_backward
from mmrpt_kernels.attention.triton.mass_op import mass_from_lse
from mmrpt_kernels.testing import AttentionCase, attention_inputs
from mmrpt_kernels.testing.aot import compile_kernels, recorded_launches
from tests.kernels.attention.test_attention import (
    CASES,
    cumulative,
    for_the_interpreter,
    grouped,
    half_precision,
    keywords_of,
    options_of,
    packed_batch,
    three_ways,
    with_gradients,
)
from tests.kernels.devices import by_case_and_device, on, on_devices

GPU_CASES = (
    AttentionCase("long", 1, 1031, 1031, 4, 2, 128, groups=2),
    AttentionCase("long_window", 2, 700, 900, 4, 2, 96, window_size=(300, 0), padding="left", weights="float"),
    AttentionCase("wide_heads", 1, 515, 515, 2, 1, 256, softcap=20.0, score_size=4.0),
    AttentionCase("odd_head_size", 1, 390, 777, 4, 4, 80, padding="right"),
)


def cases(*names: str) -> list:
    every = [for_the_interpreter(case) for case in CASES if case.name != "many_blocks"]
    return [case for case in every if case.name in names] if names else every


def problem(case: AttentionCase, seed: int, dtype: torch.dtype = torch.float64):
    """[q, k, weights], the lse that attention reports, and the masks: padding, and about 60 % of the rows wanted."""
    inputs = attention_inputs(case, dtype=dtype, seed=seed)
    q, k, v, weights, padding = inputs.values()
    lse = reference.attention(q, k, v, grouped(weights, q), options_of(case), key_padding_mask=padding)[2]
    wanted = torch.rand(q.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.6
    return [q, k, weights], lse, {"query_mask": wanted, "key_padding_mask": padding}


@by_case_and_device(cases(), GPU_CASES)
def test_it_meets_the_definition(case, device, seed):
    tensors, lse, masks = problem(case, seed)
    options = options_of(case)

    def definition(q, k, w, dtype):
        return reference.mass_from_lse(q, k, lse, grouped(w, q), options, **masks, dtype=dtype)

    def implementation(q, k, w):
        return on(device, lambda q, k, w, lse, **m: mass_from_lse(q, k, lse, grouped(w, q), options, **m))(
            q, k, w, lse, **masks
        )

    three_ways(implementation, definition, tensors, seed, lse, given=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_case_and_device(cases("grouped_heads", "softcap", "window_padding_groups", "float_groups"), GPU_CASES)
def test_half_precision_errs_no_more_than_eager(case, device, dtype, seed):
    tensors, lse, masks = problem(case, seed, dtype)
    options = options_of(case)

    def definition(q, k, w, dtype):
        return reference.mass_from_lse(q, k, lse, grouped(w, q), options, **masks, dtype=dtype)

    def implementation(q, k, w):
        return on(device, lambda q, k, w, lse, **m: mass_from_lse(q, k, lse, grouped(w, q), options, **m))(
            q, k, w, lse, **masks
        )

    half_precision(implementation, definition, tensors, seed, lse)


@on_devices
@pytest.mark.parametrize("keywords", [{}, {"window_size": (3, 0)}, {"causal": False, "softcap": 2.0}], ids=str)
def test_packed_meets_the_definition(keywords, device, seed):
    (q, k, v, weights), lengths_q, lengths_k = packed_batch(seed)
    cu = {"cu_seqlens_q": cumulative(lengths_q), "cu_seqlens_k": cumulative(lengths_k)}
    left, right = keywords.get("window_size", (-1, -1))
    causal = keywords.get("causal", True)
    options = AttentionOptions(left, 0 if causal else right, q.shape[-1] ** -0.5, keywords.get("softcap", 0.0))
    lse = reference.attention(q, k, v, weights, options, **cu)[2]
    wanted = torch.rand(q.shape[0], generator=torch.Generator().manual_seed(seed)) < 0.7

    def definition(q, k, w, dtype):
        return reference.mass_from_lse(q, k, lse, w, options, query_mask=wanted, **cu, dtype=dtype)

    def implementation(q, k, w):
        return on(device, lambda q, k, w, lse, **m: mass_from_lse(q, k, lse, w, options, **m))(
            q, k, w, lse, query_mask=wanted, **cu
        )

    three_ways(implementation, definition, [q, k, weights], seed, lse, given=True)


@on_devices
def test_only_weighted_blocks_and_wanted_rows_are_read(device, seed):
    """What stands at keys without weight, and in rows that nobody asked for, is NaN: it must not matter."""
    case = AttentionCase("read", 1, 150, 150, 2, 1, 16, weights="none_visual")
    (q, k, weights), lse, masks = problem(case, seed, torch.float32)
    weights[:, 40:90] = True
    wanted = masks["query_mask"]
    call = on(device, lambda *t, **m: visual_mass(*t, backend="triton", **m))
    clean = call(q, k, lse, weights, query_mask=wanted)
    assert (clean[:, :, wanted[0]] > 0).any() and (clean[:, :, ~wanted[0]] == 0).all()
    k[:, :40], k[:, 90:], q[~wanted] = torch.nan, torch.nan, torch.nan
    assert torch.equal(call(q, k, lse, weights, query_mask=wanted), clean)


@on_devices
def test_padding_and_rows_without_keys_stay_clean(device, seed):
    case = AttentionCase("padding", 2, 30, 30, 2, 1, 16, padding="left", weights="float")
    tensors, lse, masks = problem(case, seed, torch.float32)
    padding = masks["key_padding_mask"]

    def call(q, k, w):
        return on(device, lambda *t, **m: visual_mass(*t, backend="triton", **m))(
            q, k, lse, w, key_padding_mask=padding
        )

    clean = with_gradients(call, tensors, seed)
    tensors[1][~padding] = torch.nan
    found = with_gradients(call, tensors, seed)
    dead = lse == -torch.inf
    assert dead.any() and (found["result0"][dead] == 0).all()
    for name in clean:
        assert torch.equal(found[name], clean[name]), name


@on_devices
def test_boolean_masses_stay_in_range_whatever_the_lse(device, seed):
    case = AttentionCase("range", 1, 40, 40, 2, 2, 16, weights="all_visual")
    (q, k, weights), lse, _ = problem(case, seed, torch.float32)
    call = on(device, lambda *t: visual_mass(*t, backend="triton"))
    assert torch.equal(call(q, k, lse - 0.5, weights), torch.ones_like(lse))
    float_mass = call(q, k, lse - 0.5, weights.float())
    torch.testing.assert_close(float_mass, torch.full_like(lse, 0.5).exp(), rtol=1e-5, atol=1e-5)


@on_devices
def test_inputs_of_any_strides(device, seed):
    case = AttentionCase("strides", 2, 21, 33, 2, 2, 8, groups=2, weights="float")
    (q, k, weights), lse, _ = problem(case, seed, torch.float32)

    def call(q, k, w):
        return on(device, lambda *t: visual_mass(*t, backend="triton"))(q, k, lse, w)

    expected = with_gradients(call, [q, k, weights], seed)
    for turn in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):

        def turned(q, k, w, turn=turn):
            assert not turn(q).is_contiguous() and not turn(w).is_contiguous()
            found = visual_mass(
                *(turn(x.to(device)) for x in (q, k)), turn(lse.to(device)), turn(w.to(device)), backend="triton"
            )
            return found.cpu()

        for name, value in with_gradients(turned, [q, k, weights], seed).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.gpu
def test_results_do_not_depend_on_the_order_of_execution(seed):
    tensors, lse, masks = problem(GPU_CASES[1], seed, torch.float32)

    def call(q, k, w):
        return on("cuda", lambda *t, **m: visual_mass(*t, backend="triton", **keywords_of(GPU_CASES[1], None) | m))(
            q, k, lse, w, **masks
        )

    first = with_gradients(call, tensors, seed)
    for _ in range(3):
        for name, value in with_gradients(call, tensors, seed).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(seed):
    keys = 2**31 // (32 * 128) + 5000
    k = torch.empty(1, keys, 32, 128, dtype=torch.bfloat16, device="cuda").normal_()
    q = torch.randn(1, 3, 32, 128, dtype=torch.bfloat16, device="cuda")
    weights = torch.zeros(1, keys, dtype=torch.bool, device="cuda")
    weights[:, -300:-100] = True
    lse = torch.full((1, 32, 3), 14.0, device="cuda")
    found = visual_mass(q, k, lse, weights)
    tail = visual_mass(q, k[:, -400:].contiguous(), lse, weights[:, -400:].contiguous())
    torch.testing.assert_close(found, tail)


@on_devices
def test_opcheck(device, seed):
    tensors, lse, masks = problem(cases("float_groups")[0], seed, torch.float32)
    q, k, weights = (x.to(device).requires_grad_() for x in tensors)
    wanted = masks["query_mask"].to(device)
    arguments = (q, k, lse.to(device), weights, wanted, None, None, None, -1, 0, 0.3, 0.0)
    torch.library.opcheck(torch.ops.mmrpt_kernels.triton_visual_mass.default, arguments)


# ---- the lists that the kernels walk ----


@on_devices
@pytest.mark.parametrize("padded", [False, True])
def test_key_blocks_are_classified(padded, device, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.rand(2, 10, 3, generator=generator) < 0.5).float().repeat_interleave(16, 1)[:, :-5]
    weights[0, 3, 0], weights[1, 20, 1] = torch.nan, 0.5
    padding = torch.rand(2, 155, generator=generator) < 0.8 if padded else None
    found = key_blocks.classify(weights.to(device), None if padding is None else padding.to(device), 16)
    for b in range(2):
        for g in range(3):
            expected = []
            for start in range(0, 155, 16):
                block = weights[b, start : start + 16, g]
                block = block if padding is None else block[padding[b, start : start + 16]]
                expected.append(0 if (block == 0).all() else 1 if (block == 1).all() else 2)
            assert found.kinds[b, :, g].tolist() == expected
            busy = [n for n, kind in enumerate(expected) if kind]
            before = found.before[b, g].tolist()
            assert before == [sum(m < n for m in busy) for n in range(len(expected) + 1)]
            assert found.visit[b, g, : before[-1]].tolist() == busy


@on_devices
@pytest.mark.parametrize("window", [(-1, 0), (3, 0), (2, 4), (-1, -1)], ids=str)
def test_wanted_rows_are_listed_with_their_keys(window, device, seed):
    """More rows than one step of the kernel's walk, packed in sequences of all sizes, empty ones included."""
    generator = torch.Generator().manual_seed(seed)
    lengths_q = torch.randint(0, 40, (150,), generator=generator).tolist() + [0]
    lengths_k = torch.randint(0, 40, (150,), generator=generator).tolist() + [7]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    assert total_q > query_list.CHUNK
    wanted = torch.rand(1, total_q, generator=generator) < 0.7
    options = AttentionOptions(*window, 1.0, 0.0)
    packing = (cu_q.to(device), cu_k.to(device))
    found = query_list.list_queries(1, total_q, total_k, wanted.to(device), packing, options, torch.device(device))
    expected = []
    for sequence, (num_rows, num_keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        for t in range(num_rows):
            position = t + num_keys - num_rows
            low = max(0, position - window[0]) if window[0] >= 0 else 0
            high = min(num_keys, position + window[1] + 1) if window[1] >= 0 else num_keys
            row, start = int(cu_q[sequence]) + t, int(cu_k[sequence])
            if wanted[0, row] and low < high:
                expected.append((row, start + low, start + high))
    count = int(found.counts[0])
    listed = (x[0, :count].tolist() for x in (found.rows, found.first, found.last))
    assert list(zip(*listed, strict=True)) == expected


# ---- what the compiler makes of the kernels ----


def launches(arch: int, dim: int, dtype: torch.dtype, worst: bool) -> list:
    """Specs of all kernels of a forward and a backward pass; `worst`: everything that costs registers is on."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    q, k, lse = empty(2, 4096, 28, dim), empty(2, 4096, 4, dim), empty(2, 28, 4096, of=torch.float32)
    weights = empty(2, 4096, 3, of=torch.float32) if worst else empty(2, 4096, 1, of=torch.bool)
    padding = empty(2, 4096, of=torch.bool) if worst else None
    options = AttentionOptions(-1, 0, dim**-0.5, 30.0 if worst else 0.0)
    with recorded_launches(key_blocks, query_list, mass_forward, side_backward, arch=arch) as specs:
        listed = query_list.list_queries(2, 4096, 4096, padding, None, options, q.device)
        settings = mass_forward.side_settings(arch, dtype, dim)
        mass = mass_forward.mass_forward(q, k, lse, weights, padding, listed, options, settings)
        settings = side_backward.side_backward_settings(arch, dtype, dim)
        side_backward.side_mass_backward(q, k, lse, weights, mass, mass, padding, listed, options, settings)
    assert {spec.kernel for spec in specs} >= {"_list_kernel", "_classify_kernel", "_mass_kernel", "_keys_kernel"}
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
def test_no_configuration_spills(arch, dims, dtype):
    specs = [spec for dim in dims for worst in (False, True) for spec in launches(arch, dim, dtype, worst)]
    compiled = compile_kernels(list({spec.title: spec for spec in specs}.values()))
    products = [one for one in compiled if one.spec.kernel in ("_mass_kernel", "_rows_kernel", "_keys_kernel")]
    assert len(products) >= 4 * len(dims)
    if dtype != torch.float32:
        instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
        assert all(instruction in one.ptx for one in products)
