"""Laws of attention with visual mass, on every backend: ranges, dead rows, poison, strides, empty inputs, steps."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.attention import attention_with_visual_mass, visual_mass
from mmrpt_kernels.testing import AttentionCase, attention_inputs
from tests.kernels.attention.attention_checks import (
    GPU_CASES,
    PLAIN,
    PORTABLE,
    SDPA,
    SDPA_GPU,
    TRITON,
    TRITON_GPU,
    by_run,
    by_run_and_case,
    keywords_of,
    problem_of,
    with_gradients,
)

EVERY_RUN = (PORTABLE, PLAIN, TRITON, TRITON_GPU)
OTHER_OPTIONS = pytest.mark.parametrize("keywords", [{}, {"window_size": (9, 0)}, {"softcap": 5.0}], ids=str)


@by_run_and_case(PORTABLE, PLAIN, TRITON, TRITON_GPU, SDPA, SDPA_GPU, gpu_cases=GPU_CASES)
def test_laws_of_boolean_masses(run, case, seed):
    """In [0, 1]; exactly 1 where only weighted keys are seen; a partition's sum to 1; 0 in dead rows."""
    inputs = attention_inputs(case, dtype=run.dtype, seed=seed)
    keywords = keywords_of(case, inputs.pop("key_padding_mask"))
    keys = inputs["k"].shape[:2]
    part = torch.randint(4, keys, generator=torch.Generator().manual_seed(seed))
    part[:, : keys[1] // 2] = 0  # a run of one group, as images make it: blocks of weight 1
    members = torch.nn.functional.one_hot(part, 4).bool()
    members = torch.cat([members, torch.ones_like(members[..., :1])], dim=-1)
    out, mass, lse = run.attend(inputs["q"], inputs["k"], inputs["v"], members, **keywords)
    again = None if run.backend == "sdpa+mass" else run.mass(inputs["q"], inputs["k"], lse, members, **keywords)
    dead = lse == -torch.inf
    assert (out.transpose(1, 2)[dead] == 0).all() and torch.isfinite(out).all()
    # Made from a lse, a mass is off by its rounding: eps of its size.
    size = 8 * max(1.0, lse[~dead].abs().max().item()) * torch.finfo(torch.float32).eps
    for found, limit in ((mass, size if run.backend == "sdpa+mass" else 1e-6), (again, size)):
        if found is None:
            continue
        assert (found >= 0).all() and (found <= 1).all()
        assert torch.equal(found[..., 4], (~dead).float()), "a row that sees weighted keys alone has mass 1"
        assert (found[..., :4].double().sum(-1) - (~dead).double()).abs().max() <= max(1e-6, limit)
        if case.causal and case.padding == "none" and case.q_len == case.k_len > 1:
            # Rows that see the first run alone.
            assert (found[..., : keys[1] // 2, 0] == 1.0).all()


@by_run(*EVERY_RUN, SDPA)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@OTHER_OPTIONS
def test_bad_keys_reach_only_rows_that_attend_to_them(bad, keywords, run, seed):
    if run is SDPA and keywords:
        pytest.skip("not served")
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 40, 2, 8, generator=generator).to(run.dtype) for _ in range(3))
    weights = torch.rand(2, 40, generator=generator) < 0.5
    clean = run.attend(q, k, v, weights, **keywords)
    k[1, 25, 0] = bad
    found = run.attend(q, k, v, weights, **keywords)
    touched = torch.zeros(2, 2, 40, dtype=torch.bool)
    touched[1, 0, 25 : 35 if "window_size" in keywords else 40] = True
    for after, before in zip(found, clean, strict=True):
        after, before = (x.transpose(1, 2) if x.dim() == 4 else x for x in (after, before))
        torch.testing.assert_close(after[~touched], before[~touched])
        if bad is torch.nan:
            # A mass of keys before the bad one may be known all the same.
            assert after[touched].isnan().all() or (run is SDPA and after.dim() == 3)


@by_run(*EVERY_RUN)
def test_padded_positions_have_no_effect(run, seed):
    case = AttentionCase("left", 2, 30, 30, 2, 1, 16, padding="left", weights="float")
    tensors, padding, _, lse = problem_of(case, seed, run.dtype)
    lse = lse.float()

    def call(q, k, v, w):
        return (
            *run.attend(q, k, v, w, key_padding_mask=padding),
            run.mass(q, k, lse, w, key_padding_mask=padding),
        )

    clean = with_gradients(call, tensors, seed)
    tensors[1][~padding], tensors[2][~padding] = torch.nan, torch.inf
    if run.backend == "triton":
        tensors[3][~padding] = torch.nan
    found = with_gradients(call, tensors, seed)
    assert (lse == -torch.inf).any() and (found["result3"][lse == -torch.inf] == 0).all()
    for name in clean:
        torch.testing.assert_close(found[name], clean[name], msg=lambda m, n=name: f"{n}: {m}")


@by_run(*EVERY_RUN)
def test_dead_rows_take_no_part_whatever_gradient_arrives(run, seed):
    """log(mass) of a row without keys has an infinite gradient; masked out later it is NaN. Neither may spread."""
    case = AttentionCase("dead", 2, 20, 20, 2, 2, 8, padding="left", weights="float")
    tensors, padding, *_ = problem_of(case, seed, run.dtype)
    leaves = [t.requires_grad_() for t in tensors]
    _, mass, lse = run.attend(*leaves, key_padding_mask=padding)
    dead = lse == -torch.inf
    assert dead.any() and not dead.all()
    gradients = []
    for at_dead in (0.0, torch.nan, torch.inf):
        arriving = [torch.ones_like(mass).masked_fill(dead, at_dead) for _ in range(2)]
        made = torch.autograd.grad([mass, lse], leaves[:2] + leaves[3:], arriving, retain_graph=True)
        assert all(x.isfinite().all() for x in made)
        assert (made[0].transpose(1, 2)[dead] == 0).all()
        gradients.append(made)
    for other in gradients[1:]:
        assert all(torch.equal(x, y) for x, y in zip(gradients[0], other, strict=True))


@by_run(*EVERY_RUN)
def test_only_weighted_keys_and_wanted_rows_are_read(run, seed):
    """What stands at keys without weight, and in rows that nobody asked for, is NaN: it must not matter."""
    case = AttentionCase("read", 1, 150, 150, 2, 1, 16, weights="none_visual")
    (q, k, _, weights), _, _, lse = problem_of(case, seed, run.dtype)
    weights[:, 40:90] = True
    wanted = torch.rand(1, 150, generator=torch.Generator().manual_seed(seed)) < 0.6
    clean = run.mass(q, k, lse, weights, query_mask=wanted)
    assert (clean[:, :, wanted[0]] > 0).any() and (clean[:, :, ~wanted[0]] == 0).all()
    expected = with_gradients(lambda q, k: run.mass(q, k, lse, weights, query_mask=wanted), [q, k], seed)
    q[~wanted] = torch.nan
    found = with_gradients(lambda q, k: run.mass(q, k, lse, weights, query_mask=wanted), [q, k], seed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")
    k[:, :40], k[:, 90:] = torch.nan, torch.nan
    assert torch.equal(run.mass(q, k, lse, weights, query_mask=wanted), clean)


@by_run(*EVERY_RUN)
def test_boolean_masses_stay_in_range_whatever_the_lse(run, seed):
    case = AttentionCase("range", 1, 40, 40, 2, 2, 16, weights="all_visual")
    (q, k, _, weights), _, _, lse = problem_of(case, seed, run.dtype)
    weights[:, 3] = False
    assert (run.mass(q, k, lse - 0.5, weights) <= 1).all() and (run.mass(q, k, lse - 0.5, weights)[..., 3:] == 1).any()
    float_mass = run.mass(q, k, lse - 0.5, torch.ones(1, 40))
    torch.testing.assert_close(float_mass, torch.full_like(lse, 0.5).exp().float(), rtol=1e-5, atol=1e-5)


@by_run(*EVERY_RUN)
def test_inputs_of_any_strides(run, seed):
    """(B, H, S, D) memory, as caches have it, and memory that is contiguous along nothing useful."""
    case = AttentionCase("strides", 2, 21, 33, 2, 2, 8, groups=2, weights="float")
    tensors, _, _, lse = problem_of(case, seed, run.dtype)

    def call(*tensors, turn=lambda x: x):
        q, k, v, w = (turn(x) for x in tensors)
        found = attention_with_visual_mass(*(turn(x.to(run.device)) for x in tensors), backend=run.backend)
        again = visual_mass(*(turn(x.to(run.device)) for x in (q, k, lse.float(), w)), backend=run.backend)
        return *(x.cpu() for x in found), again.cpu()

    expected = with_gradients(call, tensors, seed)
    for turn in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
        assert not any(turn(x).is_contiguous() for x in tensors)
        for name, value in with_gradients(lambda *t, turn=turn: call(*t, turn=turn), tensors, seed).items():
            torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@by_run(*EVERY_RUN)
def test_gradients_of_any_strides(run, seed):
    """A sum hands back a gradient of stride 0, a transposed loss one of odd strides."""
    case = AttentionCase("strides", 2, 21, 21, 2, 2, 8)
    inputs = attention_inputs(case, dtype=run.dtype, seed=seed)
    leaves = [t.to(run.device).requires_grad_(t.is_floating_point()) for t in inputs.values() if t is not None]
    found = attention_with_visual_mass(*leaves, backend=run.backend)
    ones = [torch.ones_like(x, memory_format=torch.contiguous_format) for x in found]
    plain = torch.autograd.grad(tuple(found), leaves[:3], ones, retain_graph=True)
    odd = [torch.ones(1, device=run.device, dtype=x.dtype).expand(x.shape) for x in found]
    for expected, value in zip(plain, torch.autograd.grad(found, leaves[:3], odd), strict=True):
        torch.testing.assert_close(expected, value)


@by_run(*EVERY_RUN, SDPA)
def test_no_groups_at_all(run, seed):
    """Attention alone: the mass has no columns."""
    q, k, v, *_ = attention_inputs(AttentionCase("none", 2, 9, 9, 4, 2, 8), dtype=run.dtype, seed=seed).values()
    nothing = with_gradients(lambda *t: run.attend(*t, torch.zeros(2, 9, 0, dtype=torch.bool)), [q, k, v], seed)
    expected = with_gradients(lambda *t: run.attend(*t, torch.zeros(2, 9, dtype=torch.bool)), [q, k, v], seed)
    assert nothing["result1"].shape == (2, 4, 9, 0)
    torch.testing.assert_close(nothing["result0"], expected["result0"])
    torch.testing.assert_close(nothing["result2"], expected["result2"])


@by_run(*EVERY_RUN, SDPA)
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty_inputs(shape, run):
    batch, rows, keys = shape
    if run is SDPA and rows == 0:
        pytest.skip("not served")
    q, k = (torch.randn(batch, n, 2, 8, dtype=run.dtype).requires_grad_() for n in (rows, keys))
    weights = torch.ones(batch, keys, dtype=torch.bool)
    out, mass, lse = run.attend(q, k, k, weights, causal=run is not SDPA)
    assert out.shape == (batch, rows, 2, 8) and (out == 0).all()
    assert mass.shape == (batch, 2, rows) and (mass == 0).all() and (lse == -torch.inf).all()
    again = 0.0 if run is SDPA else run.mass(q, k, lse, weights).sum()
    (out.sum() + mass.sum() + again).backward()
    assert (q.grad == 0).all() and (run is SDPA or (k.grad == 0).all())


@by_run(*EVERY_RUN)
def test_a_step_is_the_last_row_of_the_whole(run, seed):
    """Generation: new rows over a cache of keys."""
    case = AttentionCase("whole", 1, 160, 160, 4, 2, 16, softcap=5.0, window_size=(100, 0))
    tensors, padding, *_ = problem_of(case, seed, run.dtype)
    keywords = keywords_of(case, padding)
    whole = run.attend(*tensors, **keywords)
    for rows in (1, 2):
        step = run.attend(tensors[0][:, -rows:], *tensors[1:], **keywords)
        for found, expected in zip(step, (whole[0][:, -rows:], *(x[:, :, -rows:] for x in whole[1:])), strict=True):
            torch.testing.assert_close(found, expected)
