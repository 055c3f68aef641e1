"""Triton kernels for attention with visual mass: what api.py calls."""

from mmrpt_kernels.attention.triton.operators import attention, mass_and_lse

__all__ = ["attention", "mass_and_lse"]
