"""What the compiler makes of Triton's row kernels, without a GPU: no spills, few registers, wide loads."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.common.head import HeadOptions
from mmrpt_kernels.logprobs.rows import Softmax
from mmrpt_kernels.logprobs.triton import rows

from mmrpt_kernels.testing.aot import KernelSpec, compile_kernels, recorded_launches

CAPPED = HeadOptions(0.7, 30.0, 1.0)


def launches(arch: int, vocab: int, options: HeadOptions, entropy: bool, dtype: torch.dtype) -> list[KernelSpec]:
    """The kernels for logits of 4096 rows, and a gradient and exponentials in `dtype`; float32 goes over the logits."""

    def empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    raw, targets, one = empty(4096, vocab), empty(4096, of=torch.int64), empty(4096)
    with recorded_launches(rows, arch=arch) as specs:
        rows.row_statistics(raw, targets, options, entropy, True)
        into = None if dtype == torch.float32 else empty(4096, vocab, of=dtype)
        rows.row_gradient(raw, targets, options, Softmax(one, one, one), (one, one if entropy else None), into)
        if dtype != torch.float16:
            rows.row_exponentials(raw, targets, options, entropy, into)
    names = ["_statistics_kernel", "_gradient_kernel", "_exponentials_kernel"]
    assert [spec.kernel for spec in specs] == names[: 2 if dtype == torch.float16 else 3]
    return specs


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_no_row_kernel_spills(arch):
    """compile_kernels refuses spills; vocabularies that do and do not divide by 16, one shorter than a tile, one of a
    single word, which Triton compiles as a constant."""
    calls = itertools.product((151_936, 32_003, 300), (HeadOptions(), CAPPED), (True, False), (torch.bfloat16,))
    over = itertools.product((151_936, 32_003), (HeadOptions(), CAPPED), (True, False), (torch.float32,))
    calls = [*calls, *over, (1, CAPPED, True, torch.bfloat16), (151_936, HeadOptions(), True, torch.float16)]
    specs = {spec.title + str(spec.signature): spec for call in calls for spec in launches(arch, *call)}
    for one in compile_kernels(list(specs.values())):
        # A multiprocessor has 65,536 registers: two programs of 256 threads at least, four of the exponentials.
        exponentials = one.spec.kernel == "_exponentials_kernel"
        assert one.registers <= (64 if exponentials else 128), one.spec.title
        if one.spec.signature.get("vocab", "").endswith(":16"):
            assert "ld.global.v4.b32" in one.ptx, one.spec.title
            if one.spec.kernel != "_statistics_kernel":  # which stores a number a program
                # Of the exponentials three sums and the target are stored alone; a sweep's stores are whole.
                alone = one.ptx.count("st.global.b16") + one.ptx.count("st.global.b32")
                assert "st.global.v4.b32" in one.ptx and alone == (4 if exponentials else 0), one.spec.title
