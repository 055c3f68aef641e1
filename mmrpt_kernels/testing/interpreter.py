"""Triton's interpreter, mended where tests need it."""

from __future__ import annotations

import functools


@functools.cache
def mend_interpreter() -> None:
    """Let the interpreter multiply bfloat16 tiles and round to bfloat16. Does nothing without triton.

    It stores them as 16-bit integers (numpy has no such float), and its product takes them for integers: wrong numbers
    without a word (seen in Triton 3.6). Its cast from float32 cuts the last 16 bits off, where a GPU rounds to the
    nearest, ties to even: half of the precision, and all errors to one side.
    """
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    product, truncate = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != "uint16":
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return product(self, widened(a), widened(b), *rest)

    def create_fp_trunc(self, handle: TensorHandle, dtype) -> TensorHandle:
        if (handle.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, handle, dtype)
        bits = handle.data.copy().view("uint32")
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        rounded[handle.data != handle.data] = 0x7FC0  # NaN, which a carry would turn into a number
        return TensorHandle(rounded.astype("uint16"), dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_trunc = create_fp_trunc
