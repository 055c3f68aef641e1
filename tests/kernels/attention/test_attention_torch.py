"""What only the backends of plain torch have: the portable one its tiles and memory that is linear in the sequence,
"sdpa+mass" the kernels of a GPU one by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import peak_bytes
from mmrpt_kernels.attention import (
    attention_with_visual_mass,
    masked_attention_with_visual_mass,
    portable_dense,
    portable_mass,
    sdpa,
    visual_mass,
)
from mmrpt_kernels.attention.masks import AttentionOptions, tiles
from mmrpt_kernels.testing import AttentionCase, attention_inputs
from tests.kernels.attention.attention_checks import (
    GPU_CASES,
    PLAIN,
    PORTABLE,
    SDPA_GPU,
    by_run,
    by_run_and_case,
    definition_of,
    half_precision,
    keywords_of,
    problem_of,
    with_gradients,
)


@by_run_and_case(PORTABLE, PLAIN)
def test_block_size_changes_nothing(run, case, monkeypatch, seed):
    tensors, padding, _, lse = problem_of(case, seed)
    keywords = keywords_of(case, padding)

    def call(q, k, v, w):
        return *run.attend(q, k, v, w, **keywords), run.mass(q, k, lse, w, **keywords)

    found = []
    for rows in (4096, 17) if case.q_len > 200 else (4096, 1, 17):
        for module in (portable_dense, portable_mass):
            monkeypatch.setattr(module, "block_size", lambda *_, rows=rows: rows)
        found.append(with_gradients(call, tensors, seed))
    for other in found[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=1e-9, atol=1e-11)


@by_run(PORTABLE, PLAIN)
def test_any_mask_over_many_blocks(run, seed):
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
    size = portable_dense.block_size(28 * 8192 * 4, torch.device(device))
    found = tiles(8192, 8192, AttentionOptions(-1, -1, 1.0, 0.0), size, whole=False, explicit_mask=False)
    assert fewest <= len(found) <= most
    assert portable_dense.block_size(2**40, torch.device(device)) == portable_dense.MIN_BLOCK_ROWS


@by_run(PORTABLE, PLAIN)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
def test_memory_is_linear_in_the_sequence(train, run, seed):
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


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=lambda x: x.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in GPU_CASES if SDPA_GPU.takes(c)], ids=lambda case: case.name)
def test_every_kernel_of_a_gpu_errs_no_more_than_eager(case, dtype, kernel, seed):
    with sdpa_kernel(kernel):
        name = sdpa._kernel_name("cuda", None, dtype, case.dim)
    if name.upper() not in kernel.name:
        pytest.skip(f"{kernel.name} is not taken on this GPU at head size {case.dim}")
    tensors, _, options, lse = problem_of(case, seed, dtype)
    with sdpa_kernel(kernel):
        half_precision(lambda *t: SDPA_GPU.attend(*t, causal=case.causal), definition_of(options), tensors, seed, lse)


def test_the_lse_of_the_memory_efficient_kernel_is_cut_to_its_rows():
    """Its own is padded to 32 rows; shapes alone, where there is no GPU."""
    q, k = torch.empty(2, 8, 40, 16, device="meta"), torch.empty(2, 2, 40, 16, device="meta")
    out, lse = sdpa._efficient(q, k, k, True, 0.3)
    assert out.shape == q.shape and lse.shape == (2, 8, 40)


@pytest.mark.parametrize("backend", ["portable", "sdpa+mass"])
def test_a_mass_that_needs_no_gradient_is_detached(backend, seed):
    inputs = attention_inputs(AttentionCase("x", 1, 9, 9, 4, 2, 8), seed=seed)
    q, k, v = (inputs[name].requires_grad_() for name in ("q", "k", "v"))
    found = attention_with_visual_mass(q, k, v, inputs["key_weights"], mass_requires_grad=False, backend=backend)
    assert found.out.requires_grad and found.lse.requires_grad and not found.mass.requires_grad
