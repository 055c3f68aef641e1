"""What the compiler makes of the divergence's row kernels, without a GPU: registers, spills, and wide loads."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.divergence import triton_backward as backward
from mmrpt_kernels.divergence import triton_forward as forward
from mmrpt_kernels.divergence.api import KINDS
from mmrpt_kernels.divergence.pair_softmax import PairHead, Slopes, Statistics, Wanted
from mmrpt_kernels.lm_head.options import HeadOptions
from mmrpt_kernels.testing.aot import KernelSpec, check_resources, compile_kernels, recorded_launches

ROWS = 256
# Registers a thread may use so that a multiprocessor's 65,536 hold this many programs of 128 threads: enough bytes on
# their way from memory.
MOST_REGISTERS = 65_536 // (5 * 128)


def launches(
    arch: int,
    kinds: tuple[str, ...],
    *,
    softcap: float = 0.0,
    bias: bool = True,
    targets: bool = True,
    wanted: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.bfloat16,
    vocab: int = 151_936,
) -> list[KernelSpec]:
    """Specs of all kernels of a forward and a backward pass over a chunk."""

    def empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    chunk = (empty(ROWS, vocab), empty(ROWS, vocab), empty(ROWS, of=torch.int64) if targets else None)
    head = PairHead(empty(vocab) if bias else None, HeadOptions(0.9, softcap, 1.0), vocab, None)
    with recorded_launches(forward, backward, arch=arch) as specs:
        _, state = forward.sums(*chunk, head, Wanted(kinds))
        found = Statistics(*[empty(2, ROWS, of=torch.float64)] * 6)
        if "js" in kinds:
            found = found._replace(to_mean=forward.to_mean(state, found, head))
        slopes = (empty(ROWS, of=torch.float64) if kind in kinds else None for kind in KINDS[:3])
        outs = tuple(empty(ROWS, vocab, of=dtype) if want else None for want in wanted)
        backward.gradients(state, chunk[2], found, Slopes(*slopes, found.logps, found.entropy), head, outs)
    second = {"_means"} if "js" in kinds else set()
    assert {spec.kernel for spec in specs} == {"_sums", "_join", "_gradient"} | second
    return specs


def check(specs: list[KernelSpec]) -> None:
    unique = {spec.title + str(spec.signature): spec for spec in specs}
    compiled = compile_kernels(list(unique.values()), check=False)
    for one in compiled:
        spec = one.spec
        aligned = spec.signature.get("stride_p", "").endswith(":16")  # else a row begins anywhere: loads of 4 bytes
        if aligned and spec.kernel != "_join":
            assert one.registers <= MOST_REGISTERS, f"{spec.title}: {one.registers} registers"
            wide = "ld.global.v4.b32" in one.ptx
            assert wide, f"{spec.title}: no 16-byte loads"
    check_resources(compiled)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_leanest_and_the_richest_call(arch):
    check(launches(arch, ("kl",), targets=False, bias=False) + launches(arch, KINDS, softcap=30.0))


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_set_of_kinds(arch, softcap):
    """Each set of the kinds that sweep, with targets and without."""
    specs = []
    for flags in product((False, True), repeat=3):
        kinds = tuple(kind for kind, on in zip(KINDS, flags, strict=False) if on)
        specs += launches(arch, kinds or ("k3",), softcap=softcap) + launches(arch, ("k3", *kinds), bias=False)
        specs += launches(arch, kinds, softcap=softcap, targets=False) if kinds else []
    check(specs)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_other_configuration(arch):
    """One view alone, all dtypes, vocabularies that leave rows unaligned."""
    specs = launches(arch, KINDS, wanted=(True, False)) + launches(arch, KINDS, wanted=(False, True))
    for dtype in (torch.float16, torch.float32):
        specs += launches(arch, KINDS, dtype=dtype)
    for vocab in (1, 1009, 151_937):
        specs += launches(arch, KINDS, vocab=vocab)
    check(specs)
