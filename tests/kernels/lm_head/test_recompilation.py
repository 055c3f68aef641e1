"""The lm head's Triton kernels are compiled once for a model, whatever number of tokens a call has.

Triton compiles a kernel again where an integer becomes 1, or a multiple of 16, or a pointer leaves a multiple of 16
bytes, unless its decorator lists the argument. No kernel runs here, with a GPU or without: every launch is written down
as Triton would specialise it, and what it would have filled holds anything.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


from mmrpt_kernels import linear_logprobs, linear_policy_loss, linear_token_divergence
from mmrpt_kernels.divergence import triton_backward, triton_forward
from mmrpt_kernels.lm_head import row_softmax_triton
from mmrpt_kernels.testing.aot import recorded_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# One token, multiples of 16 and others; the longest two in chunks, of which one starts at an odd row.
LENGTHS = (1, 2, 3, 5, 8, 12, 16, 17, 32, 33)
CHUNK = 17
WIDTH = 16


def head(length: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = torch.randn(length, WIDTH), torch.randn(vocab, WIDTH)
    half = [t.to(DEVICE, torch.bfloat16).requires_grad_() for t in (hidden, weight, torch.randn(vocab))]
    return *half, torch.randint(vocab, (length,), device=DEVICE)


def policy_loss(length: int, vocab: int, entropy_coef: float = 0.0) -> None:
    hidden, weight, bias, targets = head(length, vocab)
    linear_policy_loss(
        hidden[None],
        weight,
        targets[None],
        torch.randn(1, length, device=DEVICE),
        response_mask=torch.ones(1, length, dtype=torch.bool, device=DEVICE),
        bias=bias,
        entropy_coef=entropy_coef,
        temperature=1.0 + length,
        chunk_size=CHUNK,
        backend="triton",
    ).loss.backward()


def logprobs(length: int, vocab: int) -> None:
    hidden, weight, bias, targets = head(length, vocab)
    found = linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=True, chunk_size=CHUNK, backend="triton")
    (found.logps + found.entropy).sum().backward()


def divergence(length: int, vocab: int) -> None:
    hidden, weight, bias, targets = head(length, vocab)
    options = {"targets": targets, "bias": bias, "chunk_size": CHUNK, "backend": "triton"}
    found = linear_token_divergence(hidden, torch.randn_like(hidden), weight, kind=("kl", "js", "k3"), **options)
    (found.divergence.sum() + found.logps_p.sum()).backward()


CALLS = {
    "policy loss": policy_loss,
    "policy loss with entropy": lambda length, vocab: policy_loss(length, vocab, entropy_coef=0.1),
    "logprobs": logprobs,
    "divergence": divergence,
}


@pytest.mark.parametrize("vocab", (64, 52, 51), ids=("multiple of 16", "multiple of 4", "odd"))
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_ten_lengths_compile_no_more_than_one(call, vocab, seed):
    """But for vocabularies whose rows are no multiples of 16 bytes: there a chunk's matrix begins at such a multiple or
    not, as the rows before it end, and so do a divergence's second logits, which follow the first view's."""
    most = (3 if call is divergence else 2) if vocab % 8 else 1
    variants = {}
    for length in LENGTHS:
        with recorded_launches(row_softmax_triton, triton_forward, triton_backward, arch=90) as specs:
            call(length, vocab)
        for spec in specs:
            settings = {name: value for name, value in spec.constants.items() if name.isupper()}
            variants.setdefault((spec.kernel, str(settings)), set()).add(str(spec))
    assert variants
    for (kernel, settings), specs in variants.items():
        assert len(specs) <= most, f"{kernel} {settings} is compiled {len(specs)} times:\n" + "\n".join(specs)
