"""Triton kernels for attention with visual mass: what api.py calls."""

from mmrpt_kernels.attention.triton.attention_op import attention
from mmrpt_kernels.attention.triton.mass_op import mass_and_lse

__all__ = ["attention", "mass_and_lse"]
