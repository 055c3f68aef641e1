"""Divergence between the next-token distributions of two views, from hidden states, without (N, V) logits."""

from mmrpt_kernels.divergence.api import TokenDivergence, linear_token_divergence

__all__ = ["TokenDivergence", "linear_token_divergence"]
