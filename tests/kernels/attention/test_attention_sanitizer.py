"""compute-sanitizer over every attention kernel: accesses out of bounds, races in shared memory.

It watches this file as a program, which needs a GPU: python -m tests.kernels.attention.test_attention_sanitizer
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmrpt_kernels.attention import attention_with_visual_mass, masked_attention_with_visual_mass, visual_mass

ROOT = Path(__file__).resolve().parents[3]
CLEAN, DIRTY = "every attention kernel ran", 9
ROWS, KEYS, DIM = 77, 141, 40


def tensors(dtype: torch.dtype, device: str, rows: int | None = None, boolean: bool = True) -> list[torch.Tensor]:
    """q (2, rows, 4, DIM), k and v (2, KEYS, 2, DIM), weights (2, KEYS, 3)."""
    made = [
        torch.randn(2, n, heads, DIM, device=device, dtype=dtype)
        for n, heads in ((rows or ROWS, 4), (KEYS, 2), (KEYS, 2))
    ]
    weights = torch.rand(2, KEYS, 3, device=device)
    made = [x.requires_grad_() for x in made]
    return [*made, weights < 0.5 if boolean else weights.requires_grad_()]


def run(device: str = "cuda", backend: str = "triton") -> None:
    """Forward and backward: causal, banded, padded, packed, masked; a few rows; the mass from a known lse."""
    for dtype in (torch.bfloat16 if device == "cuda" else torch.float32,):
        for keywords in ({}, {"window_size": (30, 0), "softcap": 5.0}, {"causal": False}):
            q, k, v, weights = tensors(dtype, device, boolean=not keywords)
            padding = torch.rand(2, KEYS, device=device) < 0.8
            for masks in ({}, {"key_padding_mask": padding}):
                options = keywords | masks | {"backend": backend}
                found = attention_with_visual_mass(q, k, v, weights, **options)
                mass = visual_mass(q, k, found.lse.detach(), weights, **options)
                lse = found.lse.masked_fill(found.lse == -torch.inf, 0.0)
                (found.out.float().sum() + found.mass.sum() + lse.sum() + mass.sum()).backward()
        mask = torch.rand(1, 1, ROWS, KEYS, device=device) < 0.5
        found = masked_attention_with_visual_mass(q, k, v, weights, mask, backend=backend)
        (found.out.float().sum() + found.mass.sum()).backward()
        attention_with_visual_mass(*tensors(dtype, device, rows=3), backend=backend)
        cu = {
            "cu_seqlens_q": torch.tensor([0, 5, 5, ROWS], dtype=torch.int32, device=device),
            "cu_seqlens_k": torch.tensor([0, 60, 61, KEYS], dtype=torch.int32, device=device),
            "backend": backend,
        }
        packed = [x.detach()[0].requires_grad_(x.requires_grad) for x in (q, k, v, weights)]
        found = attention_with_visual_mass(*packed, **cu)
        mass = visual_mass(*packed[:2], found.lse.detach(), packed[3], **cu)
        (found.out.float().sum() + found.mass.sum() + mass.sum()).backward()


def sanitizer() -> str | None:
    """compute-sanitizer on PATH, or where CUDA puts it."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(folder))


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_kernels_are_clean(tool):
    program = sanitizer()
    if program is None:
        pytest.skip(f"compute-sanitizer is not on PATH: {tool} of the attention kernels was NOT done")
    # One allocation a tensor: in the caching allocator's large blocks a stray access would hit a neighbour unseen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    watched = [sys.executable, "-m", "tests.kernels.attention.test_attention_sanitizer"]
    command = [program, "--tool", tool, "--error-exitcode", str(DIRTY), "--target-processes", "application-only"]
    done = subprocess.run([*command, *watched], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and CLEAN in done.stdout, (done.stdout + done.stderr)[-4000:]


def test_the_watched_program_runs():
    """Its calls, on another backend: a mistake in them would show on a GPU alone."""
    run("cpu", "portable")


if __name__ == "__main__":
    torch.manual_seed(0)
    run()
    torch.cuda.synchronize()
    print(CLEAN)
