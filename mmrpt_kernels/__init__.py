"""Operators for multimodal reinforcement learning: attention that reports visual mass, fused lm heads."""

from mmrpt_kernels.backends import BackendError, print_table, table, use_backend

__version__ = "0.1.0"

__all__ = ["BackendError", "__version__", "print_table", "table", "use_backend"]
