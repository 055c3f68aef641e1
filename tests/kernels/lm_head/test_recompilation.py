"""The lm head's Triton kernels are compiled once for a model, whatever number of tokens a call has.

Triton compiles a kernel again where an integer becomes 1, or a multiple of 16, or a pointer leaves a multiple of 16
bytes, unless its decorator lists the argument. No kernel runs here, with a GPU or without: every launch is written down
as Triton would specialise it, and what it would have filled holds anything.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mmrpt_kernels.divergence import triton_backward, triton_forward
from mmrpt_kernels.lm_head import row_softmax_triton
from mmrpt_kernels.testing import HeadCase
from mmrpt_kernels.testing.aot import recorded_launches
from tests.kernels.lm_head.operators import DEVICE, OPERATORS, draw

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# One token, multiples of 16 and others; the longest two in chunks, of which one starts at an odd row.
LENGTHS = (1, 2, 3, 5, 8, 12, 16, 17, 32, 33)
CALLS = [o for o in OPERATORS if o.name in ("policy_loss", "policy_loss_with_entropy", "logprobs", "divergence")]


def forward_and_backward(operator, length: int, vocab: int) -> None:
    case = HeadCase("any", length, 16, vocab, bias=True, temperature=1.0 + length, chunk_size=17, ignored="none")
    made = draw(case, dtype=torch.bfloat16)
    made["active"][:], made["kept"][:] = True, True
    found = operator.call(made, backend="triton")
    sum(value.sum() for name, value in found.items() if not name.startswith("seen_")).backward()


@pytest.mark.parametrize("vocab", (64, 52, 51), ids=("multiple of 16", "multiple of 4", "odd"))
@pytest.mark.parametrize("operator", CALLS, ids=lambda operator: operator.name)
def test_ten_lengths_compile_no_more_than_one(operator, vocab, seed):
    """But for vocabularies whose rows are no multiples of 16 bytes: there a chunk's matrix begins at such a multiple or
    not, as the rows before it end, and so do a divergence's second logits, which follow the first view's."""
    most = {"divergence": 3, "logprobs": 2}.get(operator.name, 1) if vocab % 8 else 1
    variants = {}
    for length in LENGTHS:
        with recorded_launches(row_softmax_triton, triton_forward, triton_backward, arch=90) as specs:
            forward_and_backward(operator, length, vocab)
        for spec in specs:
            settings = {name: value for name, value in spec.constants.items() if name.isupper()}
            variants.setdefault((spec.kernel, str(settings)), set()).add(str(spec))
    assert variants
    for (kernel, settings), specs in variants.items():
        assert len(specs) <= most, f"{kernel} {settings} is compiled {len(specs)} times:\n" + "\n".join(specs)
