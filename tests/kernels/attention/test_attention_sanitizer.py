"""compute-sanitizer over every attention kernel: accesses out of bounds, races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.attention import sanitized_attention

ROOT = Path(__file__).resolve().parents[3]
CLEAN, DIRTY = "every attention kernel ran", 9


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
    watched = [sys.executable, "-m", "tests.kernels.attention.sanitized_attention"]
    command = [program, "--tool", tool, "--error-exitcode", str(DIRTY), "--target-processes", "application-only"]
    run = subprocess.run([*command, *watched], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and CLEAN in run.stdout, (run.stdout + run.stderr)[-4000:]


def test_the_watched_program_runs():
    """Its calls, on another backend: a mistake in them would show on a GPU alone."""
    sanitized_attention.run("cpu", "portable")
