"""The attention kernels are compiled once for a model and a kind of call, whatever its lengths.

Triton compiles a kernel again where an integer becomes 1, or a multiple of 16, or a pointer leaves a multiple of 16
bytes, unless its decorator lists the argument. No kernel runs here, with a GPU or without: every launch is written down
as Triton would specialise it, and what it would have filled holds anything.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.attention import attention_with_visual_mass, masked_attention_with_visual_mass, visual_mass
from mmrpt_kernels.attention.triton import (
    backward_dkv,
    backward_dq,
    forward,
    key_blocks,
    mass_forward,
    query_list,
)
from mmrpt_kernels.testing.aot import recorded_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
MODULES = (forward, backward_dkv, backward_dq, key_blocks, query_list, mass_forward)
# Multiples of 16, of 8 and others; some longer than the window.
LENGTHS = (17, 18, 24, 31, 32, 33, 48, 57, 64, 95)


def tensors(num_rows: int, num_keys: int, groups: int = 2, boolean: bool = False) -> list[torch.Tensor]:
    """q (2, T, 4, 16), k and v (2, S, 2, 16), weights (2, S, groups)."""
    shapes = ((2, num_rows, 4, 16), (2, num_keys, 2, 16), (2, num_keys, 2, 16))
    made = [torch.randn(shape, device=DEVICE, dtype=torch.float16).requires_grad_() for shape in shapes]
    weights = torch.rand(2, num_keys, groups, device=DEVICE)
    return [*made, weights < 0.5 if boolean else weights.requires_grad_()]


def plain(length: int) -> None:
    found = attention_with_visual_mass(*tensors(length, length, 1, boolean=True), backend="triton")
    (found.out.sum() + found.mass.square().sum()).backward()


def everything(length: int) -> None:
    padding = torch.ones(2, length + 3, dtype=torch.bool, device=DEVICE)
    options = {"window_size": (40, 0), "softcap": 5.0, "key_padding_mask": padding, "backend": "triton"}
    found = attention_with_visual_mass(*tensors(length, length + 3), **options)
    sum(x.square().sum() for x in found).backward()


def packed(length: int) -> None:
    inputs = [x.detach().flatten(0, 1).requires_grad_(x.requires_grad) for x in tensors(length, length)]
    cu = torch.tensor([0, 5, 2 * length], dtype=torch.int32, device=DEVICE)
    found = attention_with_visual_mass(*inputs, cu_seqlens_q=cu, cu_seqlens_k=cu, backend="triton")
    sum(x.square().sum() for x in found).backward()


def masked(length: int) -> None:
    mask = torch.ones(2, 1, length, length, dtype=torch.bool, device=DEVICE)
    found = masked_attention_with_visual_mass(*tensors(length, length), mask, backend="triton")
    sum(x.square().sum() for x in found).backward()


def a_growing_cache(length: int) -> None:
    """A cache (B, Hkv, S, D), as transformers has it."""
    q, k, v, weights = tensors(1, 128 + length)
    k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    padding = torch.ones(2, 128 + length, dtype=torch.bool, device=DEVICE)
    attention_with_visual_mass(q.detach(), k, v, weights.detach(), key_padding_mask=padding, backend="triton")


def mass_alone(length: int) -> None:
    q, k, _, weights = tensors(length, length)
    lse, wanted = torch.full((2, 4, length), 3.0, device=DEVICE), torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    mass = visual_mass(q, k, lse, weights, query_mask=wanted, key_padding_mask=wanted, backend="triton")
    mass.square().sum().backward()


@pytest.mark.parametrize(
    "call", [plain, everything, packed, masked, a_growing_cache, mass_alone], ids=lambda f: f.__name__
)
def test_ten_lengths_compile_no_more_than_one(call, seed):
    """Exception: how a mask of all pairs is read depends on whether its rows and samples begin at multiples of 16."""
    variants = {}
    for length in LENGTHS:
        with recorded_launches(*MODULES, arch=90) as specs:
            call(length)
        for spec in specs:
            settings = {name: value for name, value in spec.constants.items() if name.isupper()}
            variants.setdefault((spec.kernel, str(settings)), set()).add(str(spec))
    assert variants
    for (kernel, settings), specs in variants.items():
        most = 3 if call is masked else 1
        assert len(specs) <= most, f"{kernel} {settings} is compiled {len(specs)} times:\n" + "\n".join(specs)
