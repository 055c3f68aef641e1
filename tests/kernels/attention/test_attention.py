"""Attention with visual mass: the portable backend's two engines against the float64 definition, and the laws."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import peak_bytes
from mmrpt_kernels.attention import (
    attention_with_visual_mass,
    masked_attention_with_visual_mass,
    portable,
    portable_dense,
    reference,
    visual_mass,
)
from mmrpt_kernels.attention.masks import AttentionOptions, tiles
from mmrpt_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    assert_close_to_truth,
    attention_inputs,
    poisoned_memory,
)

CASES = (
    *ATTENTION_CASES,
    AttentionCase("window_of_one", 1, 23, 23, 2, 1, 8, window_size=(0, 0)),
    AttentionCase("window_suffix", 2, 13, 47, 4, 2, 8, window_size=(6, 0)),
    AttentionCase("window_more_queries", 1, 29, 11, 2, 2, 8, causal=False, window_size=(3, 2)),
    AttentionCase("left_window_alone", 1, 31, 17, 2, 2, 8, causal=False, window_size=(4, -1)),
    AttentionCase("one_query_not_causal", 2, 1, 1, 2, 2, 8, causal=False),
    AttentionCase("window_padding_groups", 2, 37, 37, 4, 2, 8, window_size=(9, 0), groups=3, padding="left"),
    AttentionCase(
        "softcap_padding_value_dim", 3, 27, 27, 4, 1, 8, dim_v=20, softcap=3.0, padding="right", score_size=5.0
    ),
    AttentionCase("float_padding_decode", 3, 1, 40, 4, 2, 16, weights="float", padding="left"),
    AttentionCase("many_blocks", 1, 1031, 1031, 2, 1, 8, window_size=(300, 0)),
)
# Where the order of samples and heads matters: sharing of key heads, strides.
MANY_HEADS = ("grouped_heads", "window_padding_groups", "seven_query_heads")
NO_BAND = AttentionOptions(-1, -1, 1.0, 0.0)
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(params=["fused", "plain"])
def engine(request, monkeypatch) -> str:
    """Both engines of the portable backend, the plain one also where the fused one would be taken."""
    if request.param == "plain":
        monkeypatch.setattr(portable_dense, "FLASH_AVAILABLE", False)
    return request.param


def for_the_interpreter(case: AttentionCase) -> AttentionCase:
    """The case with one key head, at most two query heads, and a second sample only where padding tells them apart: the
    interpreter's time is their number, and MANY_HEADS are kept as they are."""
    if case.name in MANY_HEADS:
        return case
    heads = min(2, case.heads_q // case.heads_kv)
    return case._replace(batch=1 if case.padding == "none" else 2, heads_q=heads, heads_kv=1)


def options_of(case: AttentionCase) -> AttentionOptions:
    left, right = case.window_size
    return AttentionOptions(left, 0 if case.causal else right, case.dim**-0.5, case.softcap)


def keywords_of(case: AttentionCase, padding: torch.Tensor | None) -> dict:
    return {
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "key_padding_mask": padding,
    }


def grouped(weights: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return weights if weights.dim() == q.dim() - 1 else weights[..., None]


def with_gradients(call, tensors: list[torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The results of call(*tensors) and the gradients of a random mixture of all of them, -inf entries left out.

    The first result's share is scaled by its width, so that dP = dout v^T is of order 1.
    """
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    mixture = 0.0
    for result in results:
        factors = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
        part = (result.masked_fill(result == -torch.inf, 0.0) * factors).double().sum()
        mixture = mixture + (part if result is not results[0] else part * result.shape[-1] ** -0.5)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(mixture, wanted)
    named = {f"result{i}": result.detach() for i, result in enumerate(results)}
    return named | {f"gradient{i}": gradient for i, gradient in enumerate(gradients)}


def three_ways(
    implementation, definition, tensors: list[torch.Tensor], seed: int, lse: torch.Tensor, given: bool = False
):
    """The error rule on results and gradients: float64 truth, the definition in float32 on the rounded inputs.

    Two subtractions leave their rounding in the gradients: s - lse, and dP - delta with dP up to about 4 here. With a
    given lse the first one is in the results too.
    """
    size = max([4.0, *lse[lse.isfinite()].abs().tolist()])
    dtype = torch.float32
    low = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    widened = [t.double() if t.is_floating_point() else t for t in low]
    truth = with_gradients(lambda *t: definition(*t, dtype=torch.float64), widened, seed)
    eager = with_gradients(lambda *t: definition(*t, dtype=torch.float32), low, seed)
    with poisoned_memory():
        actual = with_gradients(implementation, low, seed)
    assert actual.keys() == truth.keys()
    for name in truth:
        floor = size if given or name.startswith("gradient") else 1.0
        assert_close_to_truth(actual[name], eager[name], truth[name].double(), name=name, dtype=dtype, floor=floor)


def half_precision(
    implementation, definition, tensors: list[torch.Tensor], seed: int, lse: torch.Tensor, gradients: bool = True
):
    """The error rule for half-precision inputs: what returns in their dtype against eager's in it, and the float32
    statistics against eager's in float32, whose scores err by eps of float32 times their size.

    No floor for the former: what is subtracted is float32. Eager may err by 32 eps; 2 * 33 eps of bfloat16 is half of
    the largest entry, so that zeros are refused whatever eager made.
    """
    dtype = tensors[0].dtype
    call = with_gradients if gradients else lambda f, t, _: {f"result{i}": x for i, x in enumerate(f(*t))}
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    truth = call(lambda *t: definition(*t, dtype=torch.float64), wide, seed)
    eager = call(lambda *t: definition(*t, dtype=dtype), tensors, seed)
    in_float32 = call(lambda *t: definition(*t, dtype=torch.float32), tensors, seed)
    actual = call(implementation, tensors, seed)
    assert actual.keys() == truth.keys() and dtype in {x.dtype for x in actual.values()}
    size = max([4.0, *lse[lse.isfinite()].abs().tolist()])
    for name, found in actual.items():
        true = truth[name].double()
        if found.dtype == torch.float32:
            assert_close_to_truth(found, in_float32[name], true, name=name, dtype=torch.float32, floor=size)
        else:
            assert_close_to_truth(found, eager[name], true, name=name, dtype=dtype, eager_cap=32.0)


@by_name
def test_portable_meets_the_definition(case, engine, seed):
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    padding, options = inputs.pop("key_padding_mask"), options_of(case)

    def definition(q, k, v, w, dtype):
        return reference.attention(q, k, v, grouped(w, q), options, key_padding_mask=padding, dtype=dtype)

    def implementation(q, k, v, w):
        return portable.attention(q, k, v, grouped(w, q), options, key_padding_mask=padding)

    lse = definition(*inputs.values(), dtype=torch.float64)[2]
    three_ways(implementation, definition, list(inputs.values()), seed, lse)


@by_name
def test_visual_mass_meets_the_definition(case, seed):
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    padding, options = inputs["key_padding_mask"], options_of(case)
    q, k, v, weights = (inputs[name] for name in ("q", "k", "v", "key_weights"))
    lse = reference.attention(q, k, v, grouped(weights, q), options, key_padding_mask=padding)[2]
    wanted = torch.rand(q.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.6
    masks = {"query_mask": wanted, "key_padding_mask": padding}

    def definition(q, k, w, dtype):
        return reference.mass_from_lse(q, k, lse, grouped(w, q), options, **masks, dtype=dtype)

    def implementation(q, k, w):
        return portable.mass_from_lse(q, k, lse, grouped(w, q), options, **masks, block_rows=7)

    three_ways(implementation, definition, [q, k, weights], seed, lse, given=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["grouped_heads", "three_groups", "softcap", "left_padding"])
def test_half_precision_inputs_keep_float32_statistics(name, dtype, seed):
    case = next(case for case in CASES if case.name == name)
    inputs = attention_inputs(case, dtype=dtype, seed=seed)
    keywords = keywords_of(case, inputs.pop("key_padding_mask"))
    actual = attention_with_visual_mass(**inputs, **keywords)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    truth = attention_with_visual_mass(**wide, **keywords, backend="reference")
    assert actual.out.dtype == dtype
    assert actual.mass.dtype == actual.lse.dtype == torch.float32
    assert_close_to_truth(actual.out, truth.out.to(dtype), truth.out, name="out")
    torch.testing.assert_close(actual.mass.double(), truth.mass, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.lse.double(), truth.lse, rtol=1e-5, atol=1e-5)


GRADCHECK_CASES = (
    AttentionCase("everything", 2, 5, 7, 4, 2, 3, dim_v=2, window_size=(3, 0), softcap=1.5, groups=2, weights="float"),
    AttentionCase("dead_rows", 2, 6, 4, 2, 1, 3, weights="float", padding="one_row_empty"),
    AttentionCase("fused_route", 1, 6, 6, 2, 2, 3, weights="float", padding="left"),
    AttentionCase("boolean", 1, 4, 6, 2, 1, 3, groups=2),
)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=lambda case: case.name)
def test_gradcheck(case, backend, seed):
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    keywords = keywords_of(case, inputs.pop("key_padding_mask"))
    leaves = [t.requires_grad_(t.is_floating_point()) for t in inputs.values()]

    def call(*tensors):
        out, mass, lse = attention_with_visual_mass(*tensors, **keywords, backend=backend)
        return out, mass, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=lambda case: case.name)
def test_mass_from_lse_has_the_gradient_of_the_mass_itself(case, seed):
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    keywords = keywords_of(case, inputs.pop("key_padding_mask"))
    q, k, v, weights = inputs.values()

    def whole(q, k, w):
        return attention_with_visual_mass(q, k, v, w, **keywords, backend="reference").mass

    lse = attention_with_visual_mass(q, k, v, weights, **keywords).lse
    expected = with_gradients(whole, [q, k, weights], seed)
    for backend in ("portable", "reference"):
        found = with_gradients(
            lambda q, k, w, b=backend: visual_mass(q, k, lse, w, **keywords, backend=b), [q, k, weights], seed
        )
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


@by_name
def test_laws_of_boolean_masses(case, engine, seed):
    """In [0, 1]; the masses of a partition sum to 1; exactly 1 where only weighted keys are seen; 0 in dead rows."""
    inputs = attention_inputs(case, seed=seed)
    keywords = keywords_of(case, inputs.pop("key_padding_mask"))
    part = torch.randint(4, inputs["k"].shape[:2], generator=torch.Generator().manual_seed(seed))
    members = torch.nn.functional.one_hot(part, 4).bool()
    members = torch.cat([members, torch.ones_like(members[..., :1])], dim=-1)
    found = attention_with_visual_mass(inputs["q"], inputs["k"], inputs["v"], members, **keywords)
    dead = found.lse == -torch.inf
    assert (found.mass >= 0).all() and (found.mass <= 1).all()
    assert torch.equal(found.mass[..., 4], (~dead).float()), "a row that sees weighted keys alone has mass 1"
    partition = found.mass[..., :4].double().sum(-1)
    assert (partition - (~dead).double()).abs().max() <= 8 * torch.finfo(torch.float32).eps
    assert (found.out.transpose(1, 2)[dead] == 0).all() and torch.isfinite(found.out).all()


@by_name
def test_block_size_changes_nothing(case, engine, seed):
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    padding = inputs.pop("key_padding_mask")
    options, weights = options_of(case), grouped(inputs.pop("key_weights"), inputs["q"])
    tensors = [*inputs.values(), weights]
    whole, *others = (
        with_gradients(
            lambda *t, rows=rows: portable.attention(*t, options, key_padding_mask=padding, block_rows=rows),
            tensors,
            seed,
        )
        for rows in (4096, 1, 17)
    )
    for other in others[-1 if case.q_len > 200 else 0 :]:
        for name in whole:
            torch.testing.assert_close(other[name], whole[name], rtol=1e-9, atol=1e-11)


def packed_batch(seed: int, dim_v: int = 8) -> tuple[list[torch.Tensor], list[int], list[int]]:
    lengths_q, lengths_k = [5, 0, 17, 1, 4, 3], [5, 4, 17, 9, 0, 2]
    generator = torch.Generator().manual_seed(seed)
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    shapes = ((total_q, 4, 8), (total_k, 2, 8), (total_k, 2, dim_v), (total_k, 2))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tensors, lengths_q, lengths_k


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("keywords", [{}, {"causal": False}, {"window_size": (3, 0)}, {"softcap": 2.0}], ids=str)
def test_packed_equals_one_sequence_at_a_time(keywords, engine, seed):
    tensors, lengths_q, lengths_k = packed_batch(seed, dim_v=12)
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    packing = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 17, "max_seqlen_k": 17}

    def packed(q, k, v, w, backend="portable"):
        found = attention_with_visual_mass(q, k, v, w, **packing, **keywords, backend=backend)
        mass = visual_mass(q, k, found.lse.detach(), w, **packing, **keywords, backend=backend)
        return *found, mass

    def singly(q, k, v, w):
        parts = []
        for i in range(len(lengths_q)):
            rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            one = (q[None, rows], k[None, keys], v[None, keys], w[None, keys])
            out, mass, lse = attention_with_visual_mass(*one, **keywords, backend="reference")
            parts.append((out[0], mass[0].transpose(0, 1), lse[0].T, mass[0].transpose(0, 1)))
        out, mass, lse, again = (torch.cat(part) for part in zip(*parts, strict=True))
        return out, mass.transpose(0, 1), lse.T, again.transpose(0, 1)

    expected = with_gradients(singly, tensors, seed)
    for backend in ("portable", "reference"):
        found = with_gradients(lambda *t, b=backend: packed(*t, backend=b), tensors, seed)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=lambda m, w=(backend, name): f"{w}: {m}")


def test_packed_equals_padded(engine, seed):
    lengths = [7, 3, 12]
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, 12, 2, 8, generator=generator) for _ in range(3))
    weights = torch.rand(3, 12, generator=generator) < 0.5
    real = torch.arange(12) < torch.tensor(lengths)[:, None]
    padded = attention_with_visual_mass(q, k, v, weights, key_padding_mask=real)
    cu = cumulative(lengths)
    packed = attention_with_visual_mass(q[real], k[real], v[real], weights[real], cu_seqlens_q=cu, cu_seqlens_k=cu)
    torch.testing.assert_close(packed.out, padded.out[real])
    torch.testing.assert_close(packed.mass, padded.mass.transpose(1, 2)[real].T)
    torch.testing.assert_close(packed.lse, padded.lse.transpose(1, 2)[real].T)


@pytest.mark.parametrize("batch_of_mask", [1, 2])
def test_any_mask_meets_the_definition(batch_of_mask, engine, seed):
    case = AttentionCase("mask", 2, 33, 41, 4, 2, 8, groups=2)
    inputs = attention_inputs(case, dtype=torch.float64, seed=seed)
    mask = torch.rand(batch_of_mask, 1, 33, 41, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[:, :, 5] = False
    options = AttentionOptions(-1, -1, case.dim**-0.5, 0.0)
    inputs.pop("key_padding_mask")
    found = masked_attention_with_visual_mass(**inputs, attn_mask=mask)
    assert (found.lse[:, :, 5] == -torch.inf).all() and (found.mass[:, :, 5] == 0).all()
    three_ways(
        lambda *t: portable.attention(*t, options, attn_mask=mask),
        lambda *t, dtype: reference.attention(*t, options, attn_mask=mask, dtype=dtype),
        list(inputs.values()),
        seed,
        found.lse,
    )


def test_any_mask_over_many_blocks(engine, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, rows, 2, 4, generator=generator) for rows in (1300, 9, 9))
    mask = torch.rand(1, 1, 1300, 9, generator=generator) < 0.2
    weights = torch.arange(9)[None] < 5
    found = masked_attention_with_visual_mass(q, k, v, weights, mask)
    truth = masked_attention_with_visual_mass(q.double(), k.double(), v.double(), weights, mask, backend="reference")
    torch.testing.assert_close(found.mass.double(), truth.mass, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.out.double(), truth.out, rtol=1e-5, atol=1e-5)
    only_weighted = (mask.any(-1) & ~(mask & ~weights).any(-1)).expand_as(found.mass)
    assert only_weighted.any() and (found.mass[only_weighted] == 1.0).all()


@pytest.mark.parametrize("device, fewest, most", [("cpu", 512, 512), ("cuda", 10, 40)])
def test_tiles_are_of_the_device(device, fewest, most):
    """Scores of 8,192 rows and keys in 28 heads: CPU tiles that stay in the cache, elsewhere not 6,000 launches."""
    size = portable_dense.block_size(0, 28 * 8192 * 4, torch.device(device))
    assert fewest <= len(tiles(8192, 8192, NO_BAND, size, whole=False, explicit_mask=False)) <= most
    assert portable_dense.block_size(7, 28 * 8192 * 4, torch.device(device)) == 7
    assert portable_dense.block_size(0, 2**40, torch.device(device)) == portable_dense.MIN_BLOCK_ROWS


@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
def test_memory_is_linear_in_the_sequence(train, engine, seed):
    """Far below the (Hq, T, S) matrix that eager attention holds, several times over."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2048, 8, 16, generator=generator).requires_grad_(train) for _ in range(3))
    weights = torch.arange(2048)[None] < 1024

    def call():
        found = attention_with_visual_mass(q, k, v, weights)
        mass = visual_mass(q, k, found.lse.detach(), weights)
        if train:
            return torch.autograd.grad(found.out.sum() + found.mass.sum() + mass.sum(), (q, k, v))
        return found, mass

    assert peak_bytes(call, torch.device("cpu")) < 8 * 2048 * 2048 * 4 / 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("keywords", [{}, {"window_size": (9, 0)}, {"softcap": 5.0}], ids=str)
def test_bad_keys_reach_only_rows_that_attend_to_them(bad, keywords, engine, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, 40, 2, 8, generator=generator) for _ in range(3))
    weights = torch.rand(3, 40, generator=generator) < 0.5
    clean = attention_with_visual_mass(q, k, v, weights, **keywords)
    k[1, 25, 0] = bad
    found = attention_with_visual_mass(q, k, v, weights, **keywords)
    touched = torch.zeros(3, 2, 40, dtype=torch.bool)
    touched[1, 0, 25 : 35 if "window_size" in keywords else 40] = True
    for name in ("mass", "lse"):
        torch.testing.assert_close(getattr(found, name)[~touched], getattr(clean, name)[~touched])
    torch.testing.assert_close(found.out.transpose(1, 2)[~touched], clean.out.transpose(1, 2)[~touched])
    if bad is torch.nan:
        assert found.mass[touched].isnan().all() and found.lse[touched].isnan().all()


def test_what_stands_at_padded_positions_reaches_nobody(engine, seed):
    case = AttentionCase("left", 3, 30, 30, 4, 2, 16, padding="left", weights="float")
    inputs = attention_inputs(case, seed=seed)
    padding = inputs.pop("key_padding_mask")

    def call(*tensors):
        return attention_with_visual_mass(*tensors, key_padding_mask=padding)

    clean = with_gradients(call, list(inputs.values()), seed)
    inputs["k"][~padding], inputs["v"][~padding] = torch.nan, torch.inf
    found = with_gradients(call, list(inputs.values()), seed)
    for name in clean:
        torch.testing.assert_close(found[name], clean[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["portable", "reference", "sdpa+mass"])
def test_no_groups_at_all(backend, seed):
    """Attention alone: the mass has no columns."""
    q, k, v, *_ = attention_inputs(AttentionCase("none", 2, 9, 9, 4, 2, 8), seed=seed).values()
    found = attention_with_visual_mass(q, k, v, torch.zeros(2, 9, 0, dtype=torch.bool), backend=backend)
    expected = attention_with_visual_mass(q, k, v, torch.zeros(2, 9, dtype=torch.bool), backend=backend)
    assert found.mass.shape == (2, 4, 9, 0)
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.lse, expected.lse)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty_inputs(shape):
    batch, rows, keys = shape
    q, k = torch.randn(batch, rows, 2, 4, requires_grad=True), torch.randn(batch, keys, 2, 4, requires_grad=True)
    found = attention_with_visual_mass(q, k, k, torch.ones(batch, keys, dtype=torch.bool))
    assert found.out.shape == (batch, rows, 2, 4) and (found.out == 0).all()
    assert found.mass.shape == (batch, 2, rows) and (found.mass == 0).all() and (found.lse == -torch.inf).all()
    mass = visual_mass(q, k, found.lse, torch.ones(batch, keys, dtype=torch.bool))
    (found.out.sum() + found.mass.sum() + mass.sum()).backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()
