"""Ahead-of-time compilation: what it reports, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.testing.aot import (
    SHARED_LIMIT,
    Compiled,
    CompileError,
    KernelSpec,
    ResourceError,
    check_resources,
    compile_kernels,
    recorded_launches,
)
from tests.kernels import aot_kernels

SIGNATURE = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "n": "i32"}


@pytest.fixture(autouse=True)
def kernels_importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])


def spec(arch: int, size: int = 64, accumulators: int = 0, **settings) -> KernelSpec:
    constants = {"SIZE": size, "ACCUMULATORS": accumulators}
    return KernelSpec("aot_kernels", "product", arch, SIGNATURE, constants, **settings)


def test_every_architecture_without_a_gpu():
    compiled = compile_kernels([spec(80), spec(90), spec(100)])
    for one, instruction in zip(compiled, ("mma.sync", "wgmma.mma_async", "tcgen05.mma"), strict=True):
        assert instruction in one.ptx and f".target sm_{one.spec.arch}" in one.ptx
        assert 16 <= one.registers <= 255 and one.spill_bytes == 0
        assert 64 * 64 * 2 <= one.shared_bytes <= SHARED_LIMIT[one.spec.arch]


def test_a_kernel_that_spills_is_refused_and_named():
    # Two (128, 128) float32 sums in 128 threads are 256 registers a thread.
    with pytest.raises(ResourceError, match=r"product sm_80 .*SIZE=128.*spills \d+ bytes per thread at 255 registers"):
        compile_kernels([spec(80), spec(80, size=128, accumulators=1)])
    fitting, spilling = compile_kernels([spec(80), spec(80, size=128, accumulators=1)], check=False)
    assert fitting.spill_bytes == 0 and spilling.spill_bytes > 0


def test_too_much_shared_memory_is_refused():
    greedy = Compiled(spec(80), 64, 0, SHARED_LIMIT[80] + 1, "")
    with pytest.raises(ResourceError, match="needs 166913 bytes of shared memory, a block has 166912"):
        check_resources([greedy])
    check_resources([greedy._replace(spec=spec(90))])


def test_what_does_not_compile_says_why():
    with pytest.raises(CompileError, match="arange's range must be a power of 2"):
        compile_kernels([spec(90, size=48)])
    with pytest.raises(CompileError, match=r"no such arguments: \['X'\]"):
        compile_kernels([spec(90)._replace(constants={"SIZE": 64, "ACCUMULATORS": 0, "X": 1})])


ARGUMENTS = ("whole", "start", "rows", "near", "stride", "factor", "none", "SIZE")
NUMBERS = (1, 3, 32, 2**31)
ASK_TRITON = f"""
import json, torch
from aot_kernels import arguments
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
bind = create_function_from_signature(arguments.signature, arguments.params, make_backend(GPUTarget("cuda", 90, 32)))
pieces = [torch.zeros(64)[start:] for start in (0, 1)]
print(json.dumps([bind(x, x, n, n, n, 1.0, None, SIZE=16)[1] for x in pieces for n in {NUMBERS}]))
"""


def in_tritons_words(spec: KernelSpec, name: str) -> tuple:
    """(type, "D" for a multiple of 16 bytes) or ("constexpr", value)."""
    if name in spec.constants:
        return "constexpr", spec.constants[name] or ""
    kind, _, multiple = spec.signature[name].partition(":")
    pointer = kind.startswith("*")
    return kind, "D" if (multiple != "1" if pointer else multiple == "16") else ""


def test_launches_are_recorded_as_triton_specialises_them():
    """Against the function with which Triton looks a launch's kernel up, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run([sys.executable, "-c", ASK_TRITON], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with recorded_launches(aot_kernels, arch=90) as specs:
        for start in (0, 1):
            for pieces in (torch.zeros(64)[start:], torch.zeros(64, device="meta")[start:]):
                for number in NUMBERS:
                    aot_kernels.arguments[(1,)](pieces, pieces, number, number, number, 1.0, None, SIZE=16)
    recorded = [[in_tritons_words(spec, name) for name in ARGUMENTS] for spec in specs]
    count = len(NUMBERS)
    expected = [[(kind, key or "") for kind, key in launch] for launch in json.loads(run.stdout)]
    assert recorded[:count] == recorded[count : 2 * count] == expected[:count]
    assert recorded[2 * count : 3 * count] == recorded[3 * count :] == expected[count:]
