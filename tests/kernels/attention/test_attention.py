"""Attention with visual mass: every backend against the float64 definition, forward and backward.

Without a GPU Triton's interpreter runs the kernels on small shapes; with one the same cases run for real in half
precision, and larger ones.
"""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.attention import attention_with_visual_mass, masked_attention_with_visual_mass, visual_mass
from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.testing import AttentionCase, attention_inputs
from tests.kernels.attention.attention_checks import (
    GPU_CASES,
    PACKED_OPTIONS,
    PLAIN,
    PORTABLE,
    SDPA,
    SDPA_GPU,
    TRITON,
    TRITON_GPU,
    by_run,
    by_run_and_case,
    case_named,
    definition_of,
    half_precision,
    keywords_of,
    mass_definition_of,
    options_from,
    options_of,
    packed_batch,
    problem_of,
    three_ways,
    with_gradients,
)

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@by_run_and_case(PORTABLE, PLAIN, TRITON, SDPA)
def test_attention_meets_the_definition(run, case, seed):
    tensors, padding, options, lse = problem_of(case, seed)
    keywords = keywords_of(case, padding)
    definition = definition_of(options, Masks(padding))
    three_ways(lambda *t: run.attend(*t, **keywords), definition, tensors, seed, lse, given=run is SDPA)


@by_run_and_case(PORTABLE, TRITON)
def test_visual_mass_meets_the_definition(run, case, seed):
    (q, k, _, weights), padding, options, lse = problem_of(case, seed)
    wanted = torch.rand(q.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.6
    keywords = keywords_of(case, padding) | {"query_mask": wanted}
    definition = mass_definition_of(lse, options, Masks(padding, query_mask=wanted))
    three_ways(lambda q, k, w: run.mass(q, k, lse, w, **keywords), definition, [q, k, weights], seed, lse, given=True)


@HALVES
@by_run_and_case(
    *(PORTABLE, TRITON, TRITON_GPU, SDPA_GPU),
    names=("grouped_heads", "softcap", "float_groups", "window_padding_groups", "peaked"),
    gpu_cases=GPU_CASES,
)
def test_half_precision_errs_no_more_than_eager(run, case, dtype, seed):
    """Triton's interpreter takes bfloat16 only below the table, whose row for it leaves that out. A lse of size 160 is
    none to make a mass from."""
    tensors, padding, options, lse = problem_of(case, seed, dtype)
    masks, keywords = Masks(padding), keywords_of(case, padding)

    def attend(q, k, v, w):
        if run is not TRITON:
            return run.attend(q, k, v, w, **keywords)
        from mmrpt_kernels.attention import triton

        out, mass, lse = triton.attention(q, k, v, w if w.dim() == 3 else w[..., None], options, masks)
        return out, mass if w.dim() == 3 else mass[..., 0], lse

    half_precision(attend, definition_of(options, masks), tensors, seed, lse)
    if run is not SDPA_GPU and (run is not TRITON or dtype == torch.float16) and case.score_size < 10.0:
        q, k, _, weights = tensors
        call = lambda q, k, w: run.mass(q, k, lse, w, **keywords)  # noqa: E731
        half_precision(call, mass_definition_of(lse, options, masks), [q, k, weights], seed, lse)


@by_run(PORTABLE, PLAIN, TRITON)
@PACKED_OPTIONS
def test_packed_meets_the_definition(keywords, run, seed):
    """Sequences of length 0, 1 and others, whose key blocks are shared with their neighbours."""
    tensors, cu = packed_batch(seed, dim_v=12)
    options, masks = options_from(keywords, 8), Masks(**cu)
    lse = definition_of(options, masks)(*tensors)[2]
    three_ways(lambda *t: run.attend(*t, **cu, **keywords), definition_of(options, masks), tensors, seed, lse)
    q, k, _, weights = tensors
    wanted = torch.rand(q.shape[0], generator=torch.Generator().manual_seed(seed)) < 0.7
    definition = mass_definition_of(lse, options, masks._replace(query_mask=wanted))
    call = lambda q, k, w: run.mass(q, k, lse, w, query_mask=wanted, **cu, **keywords)  # noqa: E731
    three_ways(call, definition, [q, k, weights], seed, lse, given=True)


@PACKED_OPTIONS
def test_the_definition_of_packed_is_one_sequence_at_a_time(keywords, seed):
    tensors, cu = packed_batch(seed, dim_v=12)
    options = options_from(keywords, 8)
    out, mass, lse = definition_of(options, Masks(**cu))(*tensors)
    starts = zip(
        cu["cu_seqlens_q"][:-1], cu["cu_seqlens_q"][1:], cu["cu_seqlens_k"][:-1], cu["cu_seqlens_k"][1:], strict=True
    )
    for q0, q1, k0, k1 in starts:
        one = (tensors[0][None, q0:q1], *(x[None, k0:k1] for x in tensors[1:]))
        expected = definition_of(options)(*one)
        for found, wanted in zip((out[q0:q1], mass[:, q0:q1], lse[:, q0:q1]), expected, strict=True):
            torch.testing.assert_close(found, wanted[0])


@by_run(PORTABLE, PLAIN, TRITON)
@pytest.mark.parametrize("batch_of_mask, groups", [(1, 6), (2, 2)])
def test_any_mask_meets_the_definition(batch_of_mask, groups, run, seed):
    case = AttentionCase("mask", 2, 33, 41, 2, 1, 8, groups=groups)
    tensors, *_ = problem_of(case, seed)
    mask = torch.rand(batch_of_mask, 1, 33, 41, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[:, :, 5] = False
    definition = definition_of(AttentionOptions(-1, -1, case.dim**-0.5, 0.0), Masks(attn_mask=mask))
    lse = definition(*tensors)[2]
    assert (lse[:, :, 5] == -torch.inf).all()
    call = lambda *t: tuple(masked_attention_with_visual_mass(*t, mask, backend=run.backend))  # noqa: E731
    three_ways(call, definition, tensors, seed, lse)


@by_run(TRITON, PORTABLE)
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(scale, run, seed):
    # Scores of size 1 whatever the scale: the error rule's floor is the size of the scores.
    case = AttentionCase("scale", 1, 18, 18, 2, 2, 8, weights="float", score_size=8**-0.5 / max(abs(scale), 0.5))
    tensors, *_ = problem_of(case, seed)
    definition = definition_of(AttentionOptions(-1, 0, scale, 0.0))
    lse = definition(*tensors)[2]
    three_ways(lambda *t: run.attend(*t, softmax_scale=scale), definition, tensors, seed, lse)


@by_run(PORTABLE, TRITON)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_gradients_of_some_results_alone(which, run, seed):
    case = AttentionCase("some", 2, 21, 21, 2, 1, 8, dim_v=12, weights="float", padding="left")
    tensors, padding, options, lse = problem_of(case, seed)

    def used(call):
        """Inputs that no chosen result depends on get the zero gradient that torch leaves out."""
        some = lambda *t, **k: tuple(result for i, result in enumerate(call(*t, **k)) if i in which)  # noqa: E731
        return lambda *t, **k: (*some(*t, **k), sum(x.double().sum() * 0.0 for x in t if x.is_floating_point()))

    call = used(lambda *t: run.attend(*t, key_padding_mask=padding))
    three_ways(call, used(definition_of(options, Masks(padding))), tensors, seed, lse)


GRADCHECK_CASES = (
    AttentionCase("everything", 2, 5, 7, 4, 2, 3, dim_v=2, window_size=(3, 0), softcap=1.5, groups=2, weights="float"),
    AttentionCase("dead_rows", 2, 6, 4, 2, 1, 3, weights="float", padding="one_row_empty"),
    AttentionCase("fused_route", 1, 6, 6, 2, 2, 3, weights="float", padding="left"),
    AttentionCase("boolean", 1, 4, 6, 2, 1, 3, groups=2),
    AttentionCase("square", 1, 5, 5, 4, 2, 3, groups=2, weights="float"),
    AttentionCase("not_causal", 1, 5, 5, 4, 2, 3, groups=2, weights="float", causal=False),
)


@pytest.mark.parametrize("backend", ["reference", "portable", "sdpa+mass"])
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=lambda case: case.name)
def test_gradcheck(case, backend, seed):
    if backend == "sdpa+mass" and not SDPA.takes(case):
        pytest.skip("not served")
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
    whole = lambda q, k, w: attention_with_visual_mass(q, k, v, w, **keywords, backend="reference").mass  # noqa: E731
    lse = attention_with_visual_mass(q, k, v, weights, **keywords).lse
    expected = with_gradients(whole, [q, k, weights], seed)
    for backend in ("portable", "reference"):
        call = lambda q, k, w, b=backend: visual_mass(q, k, lse, w, **keywords, backend=b)  # noqa: E731
        for name, found in with_gradients(call, [q, k, weights], seed).items():
            torch.testing.assert_close(found, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_options_of_the_cases_reach_the_definition():
    """The tests above compare like with like: options_of agrees with what the public function makes of keywords."""
    for name in ("window", "softcap", "not_causal", "left_padding"):
        tensors, padding, options, lse = problem_of(case_named(name), 0, torch.float32)
        found = attention_with_visual_mass(*tensors, **keywords_of(case_named(name), padding), backend="reference")
        torch.testing.assert_close(found.lse, lse)
        assert options == options_of(case_named(name))
