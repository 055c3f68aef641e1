"""Triton's interpreter, mended where tests need it."""

from __future__ import annotations

import functools

__all__ = ["mend_interpreter"]


@functools.cache
def mend_interpreter() -> None:
    """Let the interpreter multiply bfloat16 tiles. It stores them as 16-bit integers (numpy has no such float), and its
    product takes them for integers: wrong numbers without a word (seen in Triton 3.6). Does nothing without triton."""
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    product = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != "uint16":
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return product(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot
