"""The fused triton attention, forward and backward, against the definition, and its laws.

Without a GPU Triton's interpreter runs the kernels on small shapes; with one the same cases run for real, and larger
ones. What the compiler makes of the kernels is in test_attention_triton_compile.py.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from mmrpt_kernels.attention import (
    attention_with_visual_mass,
    config,
    masked_attention_with_visual_mass,
    reference,
)
from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.triton import attention, backward_dkv, tiles
from mmrpt_kernels.common.tanh import tanh
from mmrpt_kernels.testing import AttentionCase, attention_inputs
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
from tests.kernels.devices import INTERPRETING, by_case_and_device, on, on_devices

MORE_CASES = (
    AttentionCase("eleven_groups", 1, 19, 21, 4, 2, 8, groups=11),
    AttentionCase("eleven_float_groups", 1, 19, 21, 2, 1, 8, groups=11, weights="float", padding="right"),
    AttentionCase("head_size_80", 1, 18, 35, 2, 1, 80, weights="float"),
    AttentionCase("heads_wider_than_values", 1, 20, 20, 2, 2, 40, dim_v=8, groups=2),
    AttentionCase("seven_query_heads", 1, 17, 17, 7, 1, 8),
)
GPU_CASES = (
    AttentionCase("long", 1, 1031, 1031, 4, 2, 128, groups=2),
    AttentionCase("long_window", 2, 700, 900, 4, 2, 96, window_size=(300, 0), padding="left", weights="float"),
    AttentionCase("wide_heads", 1, 515, 515, 2, 1, 256, softcap=20.0, score_size=4.0),
    AttentionCase("odd_head_size", 1, 390, 777, 4, 4, 80, padding="right"),
    AttentionCase("long_not_causal", 1, 801, 1203, 7, 1, 64, causal=False, weights="float"),
)
# The interpreter takes too long for these.
TOO_LONG = ("many_blocks",)


def cases(*names: str) -> list[AttentionCase]:
    every = [for_the_interpreter(case) for case in (*CASES, *MORE_CASES) if case.name not in TOO_LONG]
    return [case for case in every if case.name in names] if names else every


def triton_attention(device: str, **keywords):
    """(q, k, v, weights) -> (out, mass, lse) through the public function."""
    return on(device, lambda *tensors, **k: attention_with_visual_mass(*tensors, backend="triton", **k, **keywords))


@triton.jit
def apply_tanh(x, out, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tanh(tl.load(x + index, mask=index < n, other=0.0)), mask=index < n)


@triton.jit
def visit(places, num_tiles, heads, section):
    tile, head = tiles.place_of_program(tl.program_id(0), num_tiles, heads, section)
    place = places + tile * heads + head
    tl.store(place, tl.load(place) + 1)


@by_case_and_device(cases(), (*GPU_CASES, *(c for c in CASES if c.name in TOO_LONG)))
def test_it_meets_the_definition(case, device, seed):
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    padding, options = inputs.pop("key_padding_mask"), options_of(case)

    def definition(q, k, v, w, dtype):
        return reference.attention(q, k, v, grouped(w, q), options, key_padding_mask=padding, dtype=dtype)

    def implementation(q, k, v, w):
        return on(device, lambda q, k, v, w, **m: attention(q, k, v, grouped(w, q), options, **m))(
            q, k, v, w, key_padding_mask=padding
        )

    lse = definition(*inputs.values(), dtype=torch.float64)[2]
    three_ways(implementation, definition, list(inputs.values()), seed, lse)


@pytest.mark.skipif(not INTERPRETING, reason="a GPU's tiles are its table's")
@pytest.mark.parametrize("tile", [(32, 16, 4, 1), (16, 32, 4, 1, 16)], ids=str)
@pytest.mark.parametrize("name", ["two_sided_window", "more_queries_than_keys", "value_dim", "float_groups"])
def test_tiles_of_other_shapes(name, tile, monkeypatch, seed):
    """Also products that take the head size in slices."""
    monkeypatch.setattr(config, "INTERPRETER", config.Settings(*tile))
    test_it_meets_the_definition(cases(name)[0], "cpu", seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_case_and_device(
    [
        *cases("softcap", "float_groups"),
        AttentionCase("half", 2, 19, 27, 2, 1, 16, window_size=(9, 0), groups=3, padding="left"),
    ],
    (*cases("grouped_heads", "window_padding_groups"), *GPU_CASES),
)
def test_half_precision_errs_no_more_than_eager(case, device, dtype, seed):
    inputs = attention_inputs(case, dtype=dtype, seed=seed)
    padding, options = inputs.pop("key_padding_mask"), options_of(case)

    def definition(q, k, v, w, dtype):
        return reference.attention(q, k, v, grouped(w, q), options, key_padding_mask=padding, dtype=dtype)

    def implementation(q, k, v, w):
        return on(device, lambda q, k, v, w, **m: attention(q, k, v, grouped(w, q), options, **m))(
            q, k, v, w, key_padding_mask=padding
        )

    lse = definition(*inputs.values(), dtype=torch.float64)[2]
    half_precision(implementation, definition, list(inputs.values()), seed, lse)


@on_devices
@pytest.mark.parametrize("keywords", [{}, {"window_size": (3, 0)}, {"causal": False, "softcap": 2.0}], ids=str)
def test_packed_meets_the_definition(keywords, device, seed):
    """Sequences of length 0, 1 and others, whose key blocks are shared with their neighbours."""
    tensors, lengths_q, lengths_k = packed_batch(seed, dim_v=12)
    cu = {"cu_seqlens_q": cumulative(lengths_q), "cu_seqlens_k": cumulative(lengths_k)}
    left, right = keywords.get("window_size", (-1, -1))
    right = 0 if keywords.get("causal", True) else right
    options = AttentionOptions(left, right, 8**-0.5, keywords.get("softcap", 0.0))
    lse = reference.attention(*tensors, options, **cu)[2]
    three_ways(
        lambda *t: on(device, lambda *t, **m: attention(*t, options, **m))(*t, **cu),
        lambda *t, dtype: reference.attention(*t, options, **cu, dtype=dtype),
        tensors,
        seed,
        lse,
    )


@on_devices
@pytest.mark.parametrize("batch_of_mask", [1, 2])
def test_any_mask_meets_the_definition(batch_of_mask, device, seed):
    case = AttentionCase("mask", 2, 33, 41, 2, 1, 8, groups=2)
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    inputs.pop("key_padding_mask")
    mask = torch.rand(batch_of_mask, 1, 33, 41, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[:, :, 5] = False
    options = AttentionOptions(-1, -1, case.dim**-0.5, 0.0)
    lse = reference.attention(*inputs.values(), options, attn_mask=mask)[2]
    assert (lse[:, :, 5] == -torch.inf).all()
    three_ways(
        lambda *t: on(device, lambda *t, **m: attention(*t, options, **m))(*t, attn_mask=mask),
        lambda *t, dtype: reference.attention(*t, options, attn_mask=mask, dtype=dtype),
        list(inputs.values()),
        seed,
        lse,
    )


@on_devices
def test_a_mask_and_padding_seen_through_odd_strides(device, seed):
    case = AttentionCase("mask", 2, 17, 20, 2, 1, 8)
    inputs = attention_inputs(case, seed=seed)
    inputs.pop("key_padding_mask")
    row = torch.rand(1, 1, 1, 20, generator=torch.Generator().manual_seed(seed)) < 0.5
    call = on(device, lambda *t, attn_mask: masked_attention_with_visual_mass(*t, attn_mask, backend="triton"))
    expected = call(*inputs.values(), attn_mask=row.expand(2, 1, 17, 20).contiguous())
    for mask in (row.expand(1, 1, 17, 20), row.expand(2, 1, 17, 20).mT.contiguous().mT):
        for found, wanted in zip(call(*inputs.values(), attn_mask=mask), expected, strict=True):
            assert torch.equal(found, wanted)
    padded = triton_attention(device, causal=False)(*inputs.values(), key_padding_mask=row[0, 0].expand(2, 20))
    for found, wanted in zip(padded, expected, strict=True):
        torch.testing.assert_close(found, wanted)


LAW_CASES = cases(
    "one_token", "suffix", "more_queries_than_keys", "two_sided_window", "softcap", "an_empty_sample", "peaked",
    "window_of_one", "left_window_alone", "everything_visual",
)  # fmt: skip


@by_case_and_device(LAW_CASES, (*cases(), *GPU_CASES))
def test_laws_of_boolean_masses(case, device, seed):
    """In [0, 1]; the masses of a partition sum to 1; exactly 1 where only weighted keys are seen; 0 in dead rows."""
    inputs = attention_inputs(case, seed=seed)
    keywords = keywords_of(case, inputs.pop("key_padding_mask"))
    keys = inputs["k"].shape[:2]
    part = torch.randint(4, keys, generator=torch.Generator().manual_seed(seed))
    part[:, : keys[1] // 2] = 0  # a run of one group, as images make it: some blocks are full
    members = torch.nn.functional.one_hot(part, 4).bool()
    members = torch.cat([members, torch.ones_like(members[..., :1])], dim=-1)
    out, mass, lse = triton_attention(device)(inputs["q"], inputs["k"], inputs["v"], members, **keywords)
    dead = lse == -torch.inf
    assert (mass >= 0).all() and (mass <= 1).all()
    assert torch.equal(mass[..., 4], (~dead).float()), "a row that sees weighted keys alone has mass 1"
    partition = mass[..., :4].double().sum(-1)
    assert (partition - (~dead).double()).abs().max() <= 8 * torch.finfo(torch.float32).eps
    assert (out.transpose(1, 2)[dead] == 0).all() and torch.isfinite(out).all()
    if case.causal and case.padding == "none" and case.q_len == case.k_len > 1:
        # Rows that see the first run alone: blocks full of weight, then the mixed one at its end, yet exactly 1.
        assert (mass[..., : keys[1] // 2, 0] == 1.0).all()


@on_devices
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_gradients_of_some_results_alone(which, device, seed):
    case = AttentionCase("some", 2, 21, 21, 2, 1, 8, dim_v=12, weights="float", padding="left")
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    padding, options = inputs.pop("key_padding_mask"), options_of(case)

    def chosen(call):
        return lambda *t, **k: tuple(result for i, result in enumerate(call(*t, **k)) if i in which)

    def definition(q, k, v, w, dtype):
        return reference.attention(q, k, v, grouped(w, q), options, key_padding_mask=padding, dtype=dtype)

    def implementation(q, k, v, w):
        return on(device, lambda q, k, v, w, **m: attention(q, k, v, grouped(w, q), options, **m))(
            q, k, v, w, key_padding_mask=padding
        )

    def used(call):
        """Inputs that no chosen result depends on get the zero gradient that torch leaves out."""
        return lambda *t, **k: (*chosen(call)(*t, **k), sum(x.double().sum() * 0.0 for x in t if x.is_floating_point()))

    lse = definition(*inputs.values(), dtype=torch.float64)[2]
    three_ways(used(implementation), used(definition), list(inputs.values()), seed, lse)


@on_devices
@pytest.mark.parametrize("wanted", [4, 10**6])
def test_query_heads_spread_over_programs(wanted, device, monkeypatch, seed):
    """Whatever the split of a key head's query heads, dk, dv and dw come out alike."""
    monkeypatch.setattr(backward_dkv, "PROGRAMS_WANTED", wanted)
    case = AttentionCase("split", 1, 9, 17, 6, 1, 8, weights="float", groups=2)
    test_it_meets_the_definition(case, device, seed)


@on_devices
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(scale, device, seed):
    # Scores of size 1 whatever the scale: the error rule's floor is the size of the scores.
    case = AttentionCase("scale", 1, 18, 18, 2, 2, 8, weights="float", score_size=8**-0.5 / max(abs(scale), 0.5))
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    inputs.pop("key_padding_mask")
    options = AttentionOptions(-1, 0, scale, 0.0)

    def call(implementation):
        return lambda q, k, v, w, **m: implementation(q, k, v, grouped(w, q), options, **m)

    lse = call(reference.attention)(*inputs.values())[2]
    three_ways(on(device, call(attention)), call(reference.attention), list(inputs.values()), seed, lse)


@pytest.mark.skipif(not INTERPRETING, reason="a GPU's passes may use other instructions, whose sums differ by eps |s|")
@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_a_row_that_looks_at_one_key_loses_nothing_to_the_size_of_its_score(size, seed):
    """Its probability is 1 in the backward pass too. Made of an lse of size 100, or of a score summed in another order
    than the forward pass did, it would be 1 +- 100 eps."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 64, 1, 64, generator=generator)
    seen = torch.randperm(64, generator=generator)
    scale = size / keys.square().sum(-1).min().item()
    scores = scale * torch.einsum("bthd,bshd->ts", keys[:, seen], keys)
    lead = scores.gather(1, seen[:, None]) - scores.scatter(1, seen[:, None], -torch.inf)
    assert lead.min() > 20.0, "other keys must have no probability to speak of"
    values = torch.randn(1, 64, 1, 64, generator=generator).requires_grad_()
    weights = torch.randn(1, 64, 1, generator=generator).requires_grad_()
    out, mass, _ = attention(keys[:, seen], keys, values, weights, AttentionOptions(-1, -1, scale, 0.0))
    dout, dmass = (torch.randn(x.shape, generator=generator) for x in (out, mass))
    dv, dw = torch.autograd.grad([out, mass], [values, weights], [dout, dmass])
    probs = torch.softmax(scores.double(), -1)
    dv_truth = torch.einsum("ts,bthd->bshd", probs, dout.double())
    dw_truth = torch.einsum("ts,bhtg->bsg", probs, dmass.double())
    for found, truth in ((dv, dv_truth), (dw, dw_truth)):
        # The probability, the product and 63 terms that are rounded away.
        assert (found - truth).abs().max() <= 4 * torch.finfo(torch.float32).eps * truth.abs().max()


@on_devices
def test_inputs_of_any_strides(device, seed):
    case = AttentionCase("strides", 2, 21, 33, 2, 2, 8, groups=2, weights="float")
    inputs = attention_inputs(case, seed=seed)
    inputs.pop("key_padding_mask")
    expected = with_gradients(triton_attention(device), list(inputs.values()), seed)
    for turn in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):

        def turned(*tensors, turn=turn):
            assert not any(turn(x).is_contiguous() for x in tensors)
            found = attention_with_visual_mass(*(turn(x.to(device)) for x in tensors), backend="triton")
            return tuple(x.cpu() for x in found)

        for name, value in with_gradients(turned, list(inputs.values()), seed).items():
            assert torch.equal(value, expected[name]), name


@on_devices
def test_gradients_of_any_strides(device, seed):
    """A sum hands back a gradient of stride 0, a transposed loss one of odd strides."""
    case = AttentionCase("strides", 2, 21, 21, 2, 2, 8)
    inputs = attention_inputs(case, seed=seed)
    leaves = [t.to(device).requires_grad_(t.is_floating_point()) for t in inputs.values() if t is not None]
    found = attention_with_visual_mass(*leaves, backend="triton")
    plain = torch.autograd.grad(
        [found.out, found.mass, found.lse],
        leaves[:3],
        [torch.ones_like(x, memory_format=torch.contiguous_format) for x in found],
        retain_graph=True,
    )
    odd = [torch.ones(1, device=device).expand(x.shape) for x in found]
    for expected, value in zip(plain, torch.autograd.grad(found, leaves[:3], odd), strict=True):
        assert torch.equal(expected, value)


@on_devices
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("keywords", [{}, {"window_size": (9, 0)}, {"softcap": 5.0}], ids=str)
def test_bad_keys_reach_only_rows_that_attend_to_them(bad, keywords, device, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 40, 2, 8, generator=generator) for _ in range(3))
    weights = torch.rand(2, 40, generator=generator) < 0.5
    call = triton_attention(device, **keywords)
    clean = call(q, k, v, weights)
    k[1, 25, 0] = bad
    found = call(q, k, v, weights)
    touched = torch.zeros(2, 2, 40, dtype=torch.bool)
    touched[1, 0, 25 : 35 if "window_size" in keywords else 40] = True
    for after, before in zip(found, clean, strict=True):
        rows = (after.transpose(1, 2), before.transpose(1, 2)) if after.dim() == 4 else (after, before)
        assert torch.equal(rows[0][~touched], rows[1][~touched])
    if bad is torch.nan:
        assert found[1][touched].isnan().all() and found[2][touched].isnan().all()
        assert found[0].transpose(1, 2)[touched].isnan().all()


@on_devices
def test_what_stands_at_padded_positions_reaches_nobody(device, seed):
    case = AttentionCase("left", 2, 30, 30, 2, 1, 16, padding="left", weights="float")
    inputs = attention_inputs(case, seed=seed)
    padding = inputs.pop("key_padding_mask")

    def call(*tensors):
        return triton_attention(device)(*tensors, key_padding_mask=padding)

    clean = with_gradients(call, list(inputs.values()), seed)
    inputs["k"][~padding], inputs["v"][~padding] = torch.nan, torch.inf
    inputs["key_weights"][~padding] = torch.nan
    found = with_gradients(call, list(inputs.values()), seed)
    for name in clean:
        assert torch.equal(found[name], clean[name]), name


@on_devices
def test_dead_rows_take_no_part_whatever_gradient_arrives(device, seed):
    """log(mass) of a row without keys has an infinite gradient; masked out later it is NaN. Neither may spread."""
    case = AttentionCase("dead", 2, 20, 20, 2, 2, 8, padding="left", weights="float")
    inputs = attention_inputs(case, seed=seed)
    padding = inputs.pop("key_padding_mask").to(device)
    leaves = [t.to(device).requires_grad_() for t in inputs.values()]
    found = attention_with_visual_mass(*leaves, key_padding_mask=padding, backend="triton")
    dead = found.lse == -torch.inf
    assert dead.any() and not dead.all()
    gradients = []
    for at_dead in (0.0, torch.nan, torch.inf):
        arriving = [torch.ones_like(found.mass).masked_fill(dead, at_dead) for _ in range(2)]
        made = torch.autograd.grad([found.mass, found.lse], leaves[:2] + leaves[3:], arriving, retain_graph=True)
        assert all(x.isfinite().all() for x in made)
        assert (made[0].transpose(1, 2)[dead] == 0).all()
        gradients.append(made)
    for other in gradients[1:]:
        assert all(torch.equal(x, y) for x, y in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
@on_devices
def test_empty_inputs(shape, device):
    batch, rows, keys = shape
    q = torch.randn(batch, rows, 2, 4, requires_grad=True, device=device)
    k = torch.randn(batch, keys, 2, 4, requires_grad=True, device=device)
    found = attention_with_visual_mass(
        q, k, k, torch.ones(batch, keys, dtype=torch.bool, device=device), backend="triton"
    )
    assert found.out.shape == (batch, rows, 2, 4) and (found.out == 0).all()
    assert found.mass.shape == (batch, 2, rows) and (found.mass == 0).all() and (found.lse == -torch.inf).all()
    (found.out.sum() + found.mass.sum()).backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()


@on_devices
def test_no_groups_at_all(device, seed):
    case = AttentionCase("none", 1, 9, 9, 2, 2, 8)
    inputs = attention_inputs(case, seed=seed)
    q, k, v = (inputs[name].to(device).requires_grad_() for name in ("q", "k", "v"))
    found = attention_with_visual_mass(q, k, v, torch.zeros(1, 9, 0, dtype=torch.bool, device=device), backend="triton")
    expected = attention_with_visual_mass(q, k, v, torch.zeros(1, 9, dtype=torch.bool, device=device), backend="triton")
    assert found.mass.shape == (1, 2, 9, 0) and torch.equal(found.out, expected.out)
    for x, y in zip(*(torch.autograd.grad(r.out.sum(), (q, k, v)) for r in (found, expected)), strict=True):
        assert torch.equal(x, y)


@on_devices
def test_opcheck(device, seed):
    case = AttentionCase("opcheck", 1, 9, 11, 2, 1, 8, weights="float", groups=2)
    inputs = attention_inputs(case, seed=seed)
    leaves = [inputs[name].to(device).requires_grad_() for name in ("q", "k", "v", "key_weights")]
    operator = torch.ops.mmrpt_kernels.triton_attention.default
    torch.library.opcheck(operator, (*leaves, None, None, None, None, -1, 0, 0.3, 0.0))


def test_it_is_traced_whole(fresh_compiler, seed):
    if not INTERPRETING:
        pytest.skip("not interpreting")
    case = AttentionCase("traced", 1, 9, 11, 2, 1, 8)
    inputs = attention_inputs(case, seed=seed)
    inputs.pop("key_padding_mask")

    def call(*tensors):
        return tuple(attention_with_visual_mass(*tensors, backend="triton"))

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = with_gradients(call, list(inputs.values()), seed)
    for name, value in with_gradients(traced, list(inputs.values()), seed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_every_time(dtype, seed):
    inputs = attention_inputs(GPU_CASES[1], dtype=dtype, seed=seed)
    keywords = keywords_of(GPU_CASES[1], inputs.pop("key_padding_mask"))

    def call(*tensors):
        return triton_attention("cuda")(*tensors, **keywords)

    first = with_gradients(call, list(inputs.values()), seed)
    for _ in range(3):
        for name, value in with_gradients(call, list(inputs.values()), seed).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(seed):
    keys = 2**31 // (32 * 128) + 5000
    k = torch.empty(1, keys, 32, 128, dtype=torch.bfloat16, device="cuda").normal_()
    q = torch.randn(1, 3, 32, 128, dtype=torch.bfloat16, device="cuda")
    weights = torch.zeros(1, keys, dtype=torch.bool, device="cuda")
    weights[:, -300:-100] = True
    keywords = {"window_size": (390, 0), "backend": "triton"}
    found = attention_with_visual_mass(q, k, k, weights, **keywords)
    tail = (k[:, -400:].contiguous(), weights[:, -400:].contiguous())
    expected = attention_with_visual_mass(q, tail[0], tail[0], tail[1], **keywords)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


# ---- the helpers of the kernels ----


def test_tanh_is_good_to_float32():
    if not INTERPRETING:
        pytest.skip("not interpreting")
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.linspace(-1e-3, 1e-3, 101), torch.tensor([torch.inf, -89.0])])
    made = torch.empty_like(x)
    apply_tanh[(1,)](x, made, x.numel(), BLOCK=4096)
    truth = x.double().tanh()
    assert ((made.double() - truth).abs() <= 4 * 2.0**-24 * truth.abs()).all()


def test_every_pair_of_tile_and_head_is_visited_once():
    if not INTERPRETING:
        pytest.skip("not interpreting")
    for num_tiles, heads, section in ((5, 7, 3), (1, 1, 8), (4, 6, 6), (3, 8, 100), (2, 9, 1)):
        places = torch.zeros(num_tiles, heads, dtype=torch.int32)
        visit[(num_tiles * heads,)](places, num_tiles, heads, section)
        assert (places == 1).all()
