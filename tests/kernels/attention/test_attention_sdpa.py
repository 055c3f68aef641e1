"""What only "sdpa+mass" has: SDPA's kernels one by one, what it refuses, and how it is traced."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmrpt_kernels.attention import attention_with_visual_mass, sdpa
from mmrpt_kernels.testing import AttentionCase, attention_inputs
from tests.kernels.attention.attention_checks import (
    GPU_CASES,
    SDPA_GPU,
    definition_of,
    half_precision,
    problem_of,
)


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
