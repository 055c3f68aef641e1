"""What the compiler makes of Triton's row kernels, without a GPU: no spills, few registers, wide loads and variants."""

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


def empty(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    """A tensor without memory whose first element is element `start` of an allocation."""
    whole = torch.empty(start + shape[0], *shape[1:], dtype=dtype, device="meta")
    return whole[start:]


def launches(
    arch: int,
    vocab: int,
    options: HeadOptions = PLAIN,
    entropy: bool = True,
    has_bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    rows: tuple[int, int] = (0, 4096),
) -> list[KernelSpec]:
    """The kernels for one chunk of rows, and a gradient and exponentials in `dtype`; float32 goes over the logits.

    rows: the chunk's first row and number of rows, within vectors and an output that have more.
    """
    start, count = rows
    logits, bias = empty(count, vocab), empty(vocab) if has_bias else None
    targets, one = empty(count, dtype=torch.int64, start=start), empty(count, start=start)
    out = logits if dtype == torch.float32 else empty(count, vocab, dtype=dtype, start=start)
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


@pytest.mark.parametrize("entropy", YES_AND_NO)
@pytest.mark.parametrize("vocab", (151_936, 32_004, 32_003), ids=("multiple of 16", "multiple of 4", "odd"))
def test_chunks_of_any_rows_compile_no_more_than_one(vocab, entropy):
    """Triton compiles a kernel again where an integer becomes 1 or a multiple of 16, or a pointer leaves a multiple of
    16 bytes, unless its decorator lists the argument: numbers of rows, and where a chunk begins in the vectors.

    Of a vocabulary whose rows are no multiples of 16 bytes an output begins at one or not, which makes two variants.
    """
    variants: dict[str, set[str]] = {}
    for chunk in itertools.product((0, 17, 34), (1, 2, 3, 8, 16, 17, 33)):
        for spec in launches(90, vocab, entropy=entropy, rows=chunk):
            variants.setdefault(spec.kernel, set()).add(str(spec))
    assert len(variants) == 3
    for kernel, specs in variants.items():
        most = 2 if vocab % 8 and kernel != "_statistics_kernel" else 1
        assert len(specs) <= most, f"{kernel} is compiled {len(specs)} times:\n" + "\n".join(specs)
