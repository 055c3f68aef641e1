"""Triton's kernels are compiled once for a model, whatever number of tokens a call has.

Triton compiles a kernel again where an integer becomes 1, or a multiple of 16, or a pointer leaves a multiple of 16
bytes, unless its decorator lists the argument. No kernel runs here, with a GPU or without: every launch is written down
as Triton would specialise it, and what it would have filled holds anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.attention import attention_with_visual_mass, masked_attention_with_visual_mass, visual_mass
from mmrpt_kernels.attention.triton import backward_dkv, backward_dq, forward, key_blocks, mass_forward, query_list
from mmrpt_kernels.divergence import triton_backward, triton_forward
from mmrpt_kernels.lm_head import row_softmax_triton
from mmrpt_kernels.testing import HeadCase
from mmrpt_kernels.testing.aot import recorded_launches
from tests.kernels.lm_head.operators import DEVICE, OPERATORS, draw

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
ATTENTION = (forward, backward_dkv, backward_dq, key_blocks, query_list, mass_forward)
HEAD = (row_softmax_triton, triton_forward, triton_backward)
# One token, multiples of 16 and others; the longest two in chunks, of which one starts at an odd row.
LENGTHS = (1, 2, 3, 5, 8, 12, 16, 17, 32, 33)
OF_THE_HEAD = [o for o in OPERATORS if o.name in ("policy_loss", "policy_loss_with_entropy", "logprobs", "divergence")]


def compiles_no_more_than(most: int, call: Callable[[int], None], lengths: Iterable[int], modules: tuple) -> None:
    """Of every kernel that call(length) launches, with each set of settings."""
    variants = {}
    for length in lengths:
        with recorded_launches(*modules, arch=90) as specs:
            call(length)
        for spec in specs:
            settings = {name: value for name, value in spec.constants.items() if name.isupper()}
            variants.setdefault((spec.kernel, str(settings)), set()).add(str(spec))
    assert variants
    for (kernel, settings), specs in variants.items():
        assert len(specs) <= most, f"{kernel} {settings} is compiled {len(specs)} times:\n" + "\n".join(specs)


@pytest.mark.parametrize("vocab", (64, 52, 51), ids=("multiple of 16", "multiple of 4", "odd"))
@pytest.mark.parametrize("operator", OF_THE_HEAD, ids=lambda operator: operator.name)
def test_ten_lengths_of_the_lm_head(operator, vocab, seed):
    """But for vocabularies whose rows are no multiples of 16 bytes: there a chunk's matrix begins at such a multiple or
    not, as the rows before it end, and so do a divergence's second logits, which follow the first view's."""

    def forward_and_backward(length: int) -> None:
        case = HeadCase("any", length, 16, vocab, bias=True, temperature=1.0 + length, chunk_size=17, ignored="none")
        made = draw(case, dtype=torch.bfloat16)
        made["active"][:], made["kept"][:] = True, True
        found = operator.call(made, backend="triton")
        sum(value.sum() for name, value in found.items() if not name.startswith("seen_")).backward()

    most = {"divergence": 3, "logprobs": 2}.get(operator.name, 1) if vocab % 8 else 1
    compiles_no_more_than(most, forward_and_backward, LENGTHS, HEAD)


# Multiples of 16, of 8 and others; some longer than the window.
ATTENTION_LENGTHS = (17, 18, 24, 31, 32, 33, 48, 57, 64, 95)


def tensors(num_rows: int, num_keys: int, groups: int = 2, boolean: bool = False) -> list[torch.Tensor]:
    """q (2, T, 4, 16), k and v (2, S, 2, 16), weights (2, S, groups)."""
    shapes = ((2, num_rows, 4, 16), (2, num_keys, 2, 16), (2, num_keys, 2, 16))
    made = [torch.randn(shape, device=DEVICE, dtype=torch.float16).requires_grad_() for shape in shapes]
    weights = torch.rand(2, num_keys, groups, device=DEVICE)
    return [*made, weights < 0.5 if boolean else weights.requires_grad_()]


def attend(length: int) -> None:
    found = attention_with_visual_mass(*tensors(length, length, 1, boolean=True), backend="triton")
    (found.out.sum() + found.mass.square().sum()).backward()


def attend_with_everything(length: int) -> None:
    padding = torch.ones(2, length + 3, dtype=torch.bool, device=DEVICE)
    options = {"window_size": (40, 0), "softcap": 5.0, "key_padding_mask": padding, "backend": "triton"}
    found = attention_with_visual_mass(*tensors(length, length + 3), **options)
    sum(x.square().sum() for x in found).backward()


def attend_packed(length: int) -> None:
    inputs = [x.detach().flatten(0, 1).requires_grad_(x.requires_grad) for x in tensors(length, length)]
    cu = torch.tensor([0, 5, 2 * length], dtype=torch.int32, device=DEVICE)
    found = attention_with_visual_mass(*inputs, cu_seqlens_q=cu, cu_seqlens_k=cu, backend="triton")
    sum(x.square().sum() for x in found).backward()


def attend_masked(length: int) -> None:
    mask = torch.ones(2, 1, length, length, dtype=torch.bool, device=DEVICE)
    found = masked_attention_with_visual_mass(*tensors(length, length), mask, backend="triton")
    sum(x.square().sum() for x in found).backward()


def attend_to_a_growing_cache(length: int) -> None:
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


OF_ATTENTION = (
    attend, attend_with_everything, attend_packed, attend_masked, attend_to_a_growing_cache, mass_alone,
)  # fmt: skip


@pytest.mark.parametrize("call", OF_ATTENTION, ids=lambda call: call.__name__)
def test_ten_lengths_of_attention(call, seed):
    """Exception: how a mask of all pairs is read depends on whether its rows and samples begin at multiples of 16."""
    compiles_no_more_than(3 if call is attend_masked else 1, call, ATTENTION_LENGTHS, ATTENTION)
