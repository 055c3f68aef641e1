"""What the compiler makes of the fused attention, for every row of the settings, without a GPU: registers, spills,
shared memory, and the instructions of the tensor cores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.attention import config
from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.triton import backward_dkv, backward_dq, forward
from mmrpt_kernels.attention.triton.backward import backward
from mmrpt_kernels.attention.triton.launch import prepare
from mmrpt_kernels.testing.aot import Compiled, KernelSpec, check_resources, compile_kernels, recorded_launches

PRODUCTS = ("_forward", "_backward_dkv", "_backward_dq")
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def launches(
    monkeypatch,
    arch: int,
    dim: int,
    dtype: torch.dtype,
    *,
    dim_v: int | None = None,
    groups: int = 1,
    boolean: bool = True,
    window: tuple[int, int] = (-1, 0),
    softcap: float = 0.0,
    extras: tuple[str, ...] = (),
) -> list[KernelSpec]:
    """Specs of all kernels of a forward and a backward pass. extras: "padding", "mask", "packed"."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    batch, length, heads = (1, 8192, 28) if "packed" in extras else (2, 4096, 28)
    tensors = [
        empty(batch, length, heads, dim),
        empty(batch, length, 4, dim),
        empty(batch, length, 4, dim_v or dim),
        empty(batch, length, groups, of=torch.bool if boolean else torch.float32),
    ]
    cu = empty(9, of=torch.int32) if "packed" in extras else None
    masks = (
        empty(batch, length, of=torch.bool) if "padding" in extras else None,
        empty(batch, 1, length, length, of=torch.bool) if "mask" in extras else None,
        cu,
        cu,
    )
    for module in (forward, backward_dkv, backward_dq):
        monkeypatch.setattr(module, "architecture", lambda device: arch)
        monkeypatch.setattr(
            module,
            "classify",
            lambda w, padding, block: SimpleNamespace(
                kinds=empty(w.shape[0], -(-w.shape[1] // block), w.shape[2], of=torch.int8)
            ),
        )
    tensors = tensors if cu is None else [x[0] for x in tensors]
    problem = prepare(*tensors, AttentionOptions(*window, dim**-0.5, softcap), masks)
    with recorded_launches(forward, backward_dkv, backward_dq, arch=arch) as specs:
        out, mass, lse, normalizers = forward.forward(problem)
        backward(problem, (out, mass, normalizers), (out, mass, lse))
    assert {spec.kernel for spec in specs} == {*PRODUCTS, "_row_terms"}
    return specs


def compiled(specs: list[KernelSpec]) -> list[Compiled]:
    return compile_kernels(list({spec.title: spec for spec in specs}.values()), check=False)


def test_every_row_of_the_table_is_compiled_here():
    rows = {(arch, size, dim) for arch in (80, 90, 100) for size in (2, 4) for dim in (64, 128, 256)}
    assert set(config.FORWARD) == set(config.KEYS) == set(config.ROWS) == rows


# Everything at once that costs registers.
RICH = {"softcap": 30.0, "window": (1000, 0), "groups": 3, "boolean": False, "extras": ("padding",)}
SIZES = (64, 128, 256)


def check(made: list[Compiled], arch: int) -> None:
    """No spills, shared memory within limits; tensor cores at work in half precision."""
    check_resources(made)
    for one in made:
        constants, dtype = one.spec.constants, one.spec.signature["q"][1:]
        if dtype != "fp32" and one.spec.kernel in PRODUCTS:
            # A product with fewer than 64 rows is too small for a warp group: it runs on the older instruction.
            tall = constants["BLOCK_N" if one.spec.kernel == "_backward_dkv" else "BLOCK_M"] >= 64
            assert (INSTRUCTION[arch] if tall else "mma.sync") in one.ptx, one.spec.title


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_row_spills_in_half_precision(arch, monkeypatch):
    """Causal, grouped heads, one boolean group."""
    specs = [spec for dim in SIZES for spec in launches(monkeypatch, arch, dim, torch.bfloat16)]
    check(compiled(specs), arch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_row_of_a_rich_call_spills(arch, dtype, monkeypatch):
    check(compiled([spec for dim in SIZES for spec in launches(monkeypatch, arch, dim, dtype, **RICH)]), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_row_spills_in_float32(arch, monkeypatch):
    check(compiled([spec for dim in SIZES for spec in launches(monkeypatch, arch, dim, torch.float32)]), arch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        {"extras": ("packed",), "groups": 2},
        {"extras": ("mask",), "window": (-1, -1)},
        {"groups": 12, "boolean": False},
        {"dim_v": 64},
        {"window": (-1, -1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_other_call_spills(arch, dtype, call, monkeypatch):
    """Packed, masked, many groups, values of another size, no causality; head sizes between those of the table."""
    specs = [spec for dim in (80, 96, 128) for spec in launches(monkeypatch, arch, dim, dtype, **call)]
    check(compiled(specs), arch)
