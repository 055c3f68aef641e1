"""grad *= factor in Triton, without a pass over the gradient where the factor on the device is 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements a program: few enough programs that those of a factor of 1, which end at once, cost next to nothing.
BLOCK = 8192


@triton.jit
def _scale_kernel(grad, factor, count, BLOCK: tl.constexpr):
    """Program (block,): grad (count,) of any float dtype, factor one number, multiplied in its dtype or float32."""
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(grad + at, mask=at < count)
        tl.store(grad + at, (value.to(by.dtype) * by).to(grad.dtype.element_ty), mask=at < count)


def scale(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """grad (contiguous) *= factor (0-d, float32 or float64)."""
    with torch.cuda.device_of(grad):
        _scale_kernel[(triton.cdiv(grad.numel(), BLOCK),)](grad, factor, grad.numel(), BLOCK=BLOCK, num_warps=8)
