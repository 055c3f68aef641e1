"""What the compiler makes of Triton's row kernels, without a GPU: no spills, few registers and wide loads."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.lm_head import row_softmax_triton
from mmrpt_kernels.lm_head.options import HeadOptions
from mmrpt_kernels.lm_head.row_softmax import Softmax
from mmrpt_kernels.testing.aot import KernelSpec, compile_kernels, recorded_launches

PLAIN, CAPPED = HeadOptions(), HeadOptions(0.7, 30.0, 1.0)
YES_AND_NO = (True, False)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(
    arch: int,
    vocab: int,
    options: HeadOptions = PLAIN,
    entropy: bool = True,
    has_bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> list[KernelSpec]:
    """The kernels for one chunk of rows, and a gradient and exponentials in `dtype`; float32 goes over the logits."""
    count = 4096
    logits, bias = empty(count, vocab), empty(vocab) if has_bias else None
    targets, one = empty(count, dtype=torch.int64), empty(count)
    out = logits if dtype == torch.float32 else empty(count, vocab, dtype=dtype)
    softmax, slopes = Softmax(one, one, one if entropy else None), (one, one if entropy else None)
    with recorded_launches(row_softmax_triton, arch=arch) as specs:
        row_softmax_triton.statistics(logits, bias, targets, options, entropy, True)
        row_softmax_triton.gradient(logits, bias, targets, options, softmax, slopes, out)
        if dtype != torch.float16:
            row_softmax_triton.exponentials(logits, bias, targets, options, entropy, out)
    names = ["_statistics_kernel", "_gradient_kernel", "_exponentials_kernel"]
    assert [spec.kernel for spec in specs] == names[: len(specs)] and len(specs) == 3 - (dtype == torch.float16)
    return specs


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_no_row_kernel_spills(arch):
    """compile_kernels refuses spills; vocabularies that do and do not divide by 16, one shorter than a tile, one of a
    single word, which Triton compiles as a constant."""
    dtypes = (torch.bfloat16, torch.float32)
    calls = [*itertools.product((151_936, 32_003), (PLAIN, CAPPED), YES_AND_NO, YES_AND_NO, dtypes)]
    calls += [(300, CAPPED), (1, CAPPED), (151_936, PLAIN, True, True, torch.float16)]
    specs = {str(spec): spec for call in calls for spec in launches(arch, *call)}
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
