"""Attention that reports, for every query row, the share of its attention that falls on weighted keys."""

from mmrpt_kernels.attention.api import (
    AttentionWithMass,
    attention_with_visual_mass,
    masked_attention_with_visual_mass,
    visual_mass,
)

__all__ = ["AttentionWithMass", "attention_with_visual_mass", "masked_attention_with_visual_mass", "visual_mass"]
