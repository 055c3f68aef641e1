"""Triton kernels for attention with visual mass: what api.py calls."""

from mmrpt_kernels.attention.triton.fused import attention

__all__ = ["attention"]
