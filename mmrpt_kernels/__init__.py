"""Operators for multimodal reinforcement learning: attention that reports visual mass, fused lm heads."""

from mmrpt_kernels.backends import BackendError, print_table, table, use_backend
from mmrpt_kernels.divergence import TokenDivergence, linear_token_divergence
from mmrpt_kernels.perception import PerceptionWeights, perception_weights

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "PerceptionWeights",
    "TokenDivergence",
    "__version__",
    "linear_token_divergence",
    "perception_weights",
    "print_table",
    "table",
    "use_backend",
]
