"""What the compiler makes of the attention kernels, for every row of the settings, without a GPU: registers, spills,
shared memory, and the instructions of the tensor cores."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.attention import config
from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.triton import (
    backward_dkv,
    backward_dq,
    forward,
    key_blocks,
    launch,
    mass_forward,
    operators,
    query_list,
)
from mmrpt_kernels.attention.triton.backward import backward
from mmrpt_kernels.testing.aot import KernelSpec, check_resources, compile_kernels, recorded_launches

MODULES = (forward, backward_dkv, backward_dq, key_blocks, mass_forward, query_list)
PRODUCTS = ("_forward", "_backward_dkv", "_backward_dq", "_mass_forward")
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Everything at once that costs registers.
RICH = {"softcap": 30.0, "window": (1000, 0), "groups": 3, "boolean": False, "extras": ("padding",)}
SIZES = (64, 128, 256)


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
    """Specs of all kernels of both operators, forward and backward. extras: "padding", "mask", "packed"."""

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
    masks = Masks(
        empty(batch, length, of=torch.bool) if "padding" in extras else None,
        empty(batch, 1, length, length, of=torch.bool) if "mask" in extras else None,
        None,
        cu,
        cu,
    )
    monkeypatch.setattr(launch, "architecture", lambda device: arch)
    q, k, v, weights = tensors if cu is None else [x[0] for x in tensors]
    options = AttentionOptions(*window, dim**-0.5, softcap)
    problem = launch.prepare(q, k, v, weights, options, masks)
    with recorded_launches(*MODULES, arch=arch) as specs:
        results = forward.forward(problem)
        backward(problem, results, results)
        if "mask" not in extras:
            mass, lse = (x if cu is None else x[0] for x in results[1:])
            operators.visual_mass(q, k, lse, weights, masks, options)
            operators.backward((q, k, k[..., :0], weights), (None, mass, lse), (None, mass, lse), masks, options)
    expected = {*PRODUCTS, "_row_terms", "_classify", "_list_queries"}
    assert {spec.kernel for spec in specs} >= expected - (
        {"_mass_forward", "_list_queries"} if "mask" in extras else set()
    )
    return specs


def check(specs: list[KernelSpec], arch: int) -> None:
    """No spills, shared memory within limits, tensor cores at work."""
    compiled = compile_kernels(list({spec.title: spec for spec in specs}.values()), check=False)
    check_resources(compiled)
    for one in compiled:
        if one.spec.kernel in PRODUCTS:
            # A product with fewer than 64 rows is too small for a warp group: it runs on the older instruction.
            tall = one.spec.constants["BLOCK_N" if one.spec.kernel == "_backward_dkv" else "BLOCK_M"] >= 64
            assert (INSTRUCTION[arch] if tall else "mma.sync") in one.ptx, one.spec.title


def test_every_row_of_the_tables_is_compiled_here():
    rows = {(arch, dim) for arch in (80, 90, 100) for dim in SIZES}
    assert set(config.FORWARD) == set(config.DKV) == set(config.DQ) == set(config.MASS) == rows


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_row_spills(arch, monkeypatch):
    """Causal, grouped heads, one boolean group."""
    check([spec for dim in SIZES for spec in launches(monkeypatch, arch, dim, torch.bfloat16)], arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_row_of_a_rich_call_spills(arch, monkeypatch):
    check([spec for dim in SIZES for spec in launches(monkeypatch, arch, dim, torch.bfloat16, **RICH)], arch)


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
def test_no_other_call_spills(arch, call, monkeypatch):
    """Packed, masked, many groups, values of another size, no causality; head sizes between those of the table."""
    check([spec for dim in (80, 96, 128) for spec in launches(monkeypatch, arch, dim, torch.float16, **call)], arch)
