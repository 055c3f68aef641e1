"""Kernels that test_aot.py compiles: one that fits, one that cannot, and one of every kind of argument."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, c, n, SIZE: tl.constexpr, ACCUMULATORS: tl.constexpr):
    """c (SIZE, SIZE) float32 = a @ b, and 1 + ACCUMULATORS running sums that all live through the loop."""
    row = tl.arange(0, SIZE)
    offsets = row[:, None] * SIZE + row[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    other = tl.zeros((SIZE, SIZE), tl.float32)
    for i in range(n):
        a_tile = tl.load(a + i * SIZE * SIZE + offsets)  # (SIZE, SIZE)
        b_tile = tl.load(b + i * SIZE * SIZE + offsets)  # (SIZE, SIZE)
        total = tl.dot(a_tile, b_tile, total)
        if ACCUMULATORS > 0:
            other = tl.dot(b_tile, a_tile, other)
    tl.store(c + offsets, total + other)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["start", "near"])
def arguments(whole, start, rows, near, stride, factor, none, SIZE: tl.constexpr):
    pass
