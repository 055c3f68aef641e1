"""What only the Triton attention has: its tiles, lists and helpers, its operators, and its bits on a GPU.

What every backend must do is in test_attention.py, what the compiler makes of the kernels in
test_attention_triton_compile.py.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from mmrpt_kernels.attention import attention_with_visual_mass, config, masked_attention_with_visual_mass, visual_mass
from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.triton import backward_dkv, key_blocks, launch, query_list, tiles
from mmrpt_kernels.common.tanh import tanh
from mmrpt_kernels.testing import AttentionCase, attention_inputs
from tests.kernels.attention.attention_checks import (
    GPU_CASES,
    TRITON,
    TRITON_GPU,
    case_named,
    cumulative,
    definition_of,
    for_the_interpreter,
    keywords_of,
    problem_of,
    three_ways,
    with_gradients,
)
from tests.kernels.devices import INTERPRETING, on, on_devices

interpreted = pytest.mark.skipif(not INTERPRETING, reason="not interpreting")


@triton.jit
def apply_tanh(x, out, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tanh(tl.load(x + index, mask=index < n, other=0.0)), mask=index < n)


@triton.jit
def visit(places, num_tiles, heads, section):
    tile, head = tiles.place_of_program(tl.program_id(0), num_tiles, heads, section)
    place = places + tile * heads + head
    tl.store(place, tl.load(place) + 1)


def meets_the_definition(case: AttentionCase, seed: int) -> None:
    tensors, padding, options, lse = problem_of(case, seed)
    keywords = keywords_of(case, padding)
    three_ways(lambda *t: TRITON.attend(*t, **keywords), definition_of(options, Masks(padding)), tensors, seed, lse)


@interpreted
@pytest.mark.parametrize("tile", [(32, 16, 4, 1), (16, 32, 4, 1)], ids=str)
@pytest.mark.parametrize("name", ["two_sided_window", "more_queries_than_keys", "value_dim", "float_groups"])
def test_tiles_of_other_shapes(name, tile, monkeypatch, seed):
    monkeypatch.setattr(config, "INTERPRETER", config.Settings(*tile))
    meets_the_definition(for_the_interpreter(case_named(name)), seed)


@interpreted
@pytest.mark.parametrize("wanted", [4, 10**6])
def test_query_heads_spread_over_programs(wanted, monkeypatch, seed):
    """Whatever the split of a key head's query heads, dk, dv and dw come out alike."""
    monkeypatch.setattr(backward_dkv, "PROGRAMS_WANTED", wanted)
    meets_the_definition(AttentionCase("split", 1, 9, 17, 6, 1, 8, weights="float", groups=2), seed)


@interpreted
def test_blocks_of_every_kind_under_one_row(seed):
    """Groups whose runs begin and end in different blocks: blocks that the band cuts, of one kind, of several."""
    case = AttentionCase("kinds", 1, 150, 190, 2, 1, 8, groups=3)
    tensors, _, options, lse = problem_of(case, seed)
    tensors[3] = torch.zeros(1, 190, 3, dtype=torch.bool)
    for group, (start, stop) in enumerate(((10, 130), (64, 96), (100, 185))):
        tensors[3][:, start:stop, group] = True
    three_ways(TRITON.attend, definition_of(options), tensors, seed, lse)


@on_devices
def test_a_mask_and_padding_seen_through_odd_strides(device, seed):
    case = AttentionCase("mask", 2, 17, 20, 2, 1, 8)
    inputs = attention_inputs(case, dtype=torch.float16, seed=seed)
    inputs.pop("key_padding_mask")
    row = torch.rand(1, 1, 1, 20, generator=torch.Generator().manual_seed(seed)) < 0.5
    call = on(device, lambda *t, attn_mask: masked_attention_with_visual_mass(*t, attn_mask, backend="triton"))
    expected = call(*inputs.values(), attn_mask=row.expand(2, 1, 17, 20).contiguous())
    for mask in (row.expand(1, 1, 17, 20), row.expand(2, 1, 17, 20).mT.contiguous().mT):
        for found, wanted in zip(call(*inputs.values(), attn_mask=mask), expected, strict=True):
            assert torch.equal(found, wanted)
    run = TRITON if device == "cpu" else TRITON_GPU
    padded = run.attend(*inputs.values(), causal=False, key_padding_mask=row[0, 0].expand(2, 20))
    for found, wanted in zip(padded, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.gpu
def test_the_same_bits_every_time(seed):
    tensors, padding, _, lse = problem_of(GPU_CASES[1], seed, torch.bfloat16)
    keywords = keywords_of(GPU_CASES[1], padding)

    def call(q, k, v, w):
        return *TRITON_GPU.attend(q, k, v, w, **keywords), TRITON_GPU.mass(q, k, lse, w, **keywords)

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
    keywords = {"window_size": (390, 0), "backend": "triton"}
    found = attention_with_visual_mass(q, k, k, weights, **keywords)
    tail = (k[:, -400:].contiguous(), weights[:, -400:].contiguous())
    expected = attention_with_visual_mass(q, tail[0], tail[0], tail[1], **keywords)
    again = visual_mass(q, k, found.lse, weights, **keywords)
    for x, y in zip((*found, again), (*expected, expected.mass), strict=True):
        torch.testing.assert_close(x, y)


# ---- the lists that the kernels walk ----


@on_devices
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_key_blocks_are_classified_and_listed(together, padded, device, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.rand(2, 10, 3, generator=generator) < 0.5).float().repeat_interleave(16, 1)[:, :-5]
    weights[0, 3, 0], weights[1, 20, 1] = torch.nan, 0.5
    padding = torch.rand(2, 155, generator=generator) < 0.8 if padded else None
    moved = None if padding is None else padding.view(torch.uint8).to(device)
    found = key_blocks.classify(weights.to(device), moved, 16, together=together)
    for b in range(2):
        kinds = []
        for g in range(3):
            expected = []
            for start in range(0, 155, 16):
                block = weights[b, start : start + 16, g]
                block = block if padding is None else block[padding[b, start : start + 16]]
                expected.append(0 if (block == 0).all() else 1 if (block == 1).all() else 2)
            assert found.kinds[b, :, g].tolist() == expected
            kinds.append(expected)
        columns = [[max(column) for column in zip(*kinds, strict=True)]] if together else kinds
        for pair, column in enumerate(columns):
            uniform = (0, 1) if together else (1,)
            for which, listed in ((0, uniform), (1, (2,))):
                blocks = [n for n, kind in enumerate(column) if kind in listed]
                before = found.before[b, pair, which].tolist()
                assert before == [sum(m < n for m in blocks) for n in range(len(column) + 1)]
                assert found.lists[b, pair, which, : before[-1]].tolist() == blocks


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
    q, k, w = (torch.zeros(n, 1, 8, device=device) for n in (total_q, total_k, total_k))
    masks = Masks(cu_seqlens_q=cu_q.to(device), cu_seqlens_k=cu_k.to(device))
    problem = launch.prepare(q, k, k, w[:, 0], AttentionOptions(*window, 1.0, 0.0), masks)
    found = query_list.list_queries(problem, wanted.to(device))
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


# ---- the helpers of the kernels ----


@interpreted
def test_tanh_is_good_to_float32():
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.linspace(-1e-3, 1e-3, 101), torch.tensor([torch.inf, -89.0])])
    made = torch.empty_like(x)
    apply_tanh[(1,)](x, made, x.numel(), BLOCK=4096)
    truth = x.double().tanh()
    assert ((made.double() - truth).abs() <= 4 * 2.0**-24 * truth.abs()).all()


@interpreted
def test_every_pair_of_tile_and_head_is_visited_once():
    for num_tiles, heads, section in ((5, 7, 3), (1, 1, 8), (4, 6, 6), (3, 8, 100), (2, 9, 1)):
        places = torch.zeros(num_tiles, heads, dtype=torch.int32)
        visit[(num_tiles * heads,)](places, num_tiles, heads, section)
        assert (places == 1).all()
