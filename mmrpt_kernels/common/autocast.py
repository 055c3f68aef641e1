"""Autocast for custom operators: the public function casts as `F.linear` would, the implementation runs as written."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

__all__ = ["cast_for_autocast", "without_autocast"]


def cast_for_autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The float32 or half tensors in the autocast dtype when autocast is on for their device; else unchanged.

    Differentiable (a plain `.to`). float64 is left alone, as torch's own autocast does.
    """
    device_type = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors)


def without_autocast(fn: Callable) -> Callable:
    """Run `fn` with autocast off: a custom operator's body still sees the caller's autocast state, which would
    cast its float32 products down."""

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        device_type = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        with torch.autocast(device_type, enabled=False):
            return fn(*args, **kwargs)

    return wrapped
