"""Which dtypes operators take, and in which their statistics are made."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def statistics_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 where any tensor is float64, else float32: the dtype of statistics and of gradient accumulators."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32
