"""Operators for multimodal reinforcement learning: attention that reports visual mass, fused lm heads."""

from mmrpt_kernels.attention import AttentionWithMass, attention_with_visual_mass, visual_mass
from mmrpt_kernels.backends import BackendError, print_table, table, use_backend
from mmrpt_kernels.divergence import TokenDivergence, linear_token_divergence
from mmrpt_kernels.lm_head.chunk_sizes import batch_invariance
from mmrpt_kernels.logprobs import LogProbs, linear_logprobs
from mmrpt_kernels.perception import PerceptionWeights, perception_weights
from mmrpt_kernels.policy_loss import PolicyLoss, linear_policy_loss, linear_token_loss

__version__ = "0.1.0"

__all__ = [
    "batch_invariance",
    "AttentionWithMass",
    "BackendError",
    "LogProbs",
    "PerceptionWeights",
    "PolicyLoss",
    "TokenDivergence",
    "__version__",
    "attention_with_visual_mass",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_token_divergence",
    "linear_token_loss",
    "perception_weights",
    "print_table",
    "table",
    "use_backend",
    "visual_mass",
]
