"""Ahead-of-time compilation: what it reports, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mmrpt_kernels.testing.aot import (
    SHARED_LIMIT,
    Compiled,
    CompileError,
    KernelSpec,
    ResourceError,
    check_resources,
    compile_kernels,
    table,
)

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
    assert len(table(compiled).splitlines()) == 4 and "sm_100" in table(compiled)


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
