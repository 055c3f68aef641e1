"""Triton kernels for attention with visual mass: what api.py calls."""

from mmrpt_kernels.attention.triton.fused import attention
from mmrpt_kernels.attention.triton.mass import mass_from_lse

__all__ = ["attention", "mass_from_lse"]
