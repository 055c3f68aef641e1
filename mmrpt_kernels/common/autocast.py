"""Autocast for custom operators: inputs are cast as `F.linear` would, the implementation runs as written.

An operator that makes float32 gradients casts inside (`autocast_dtype` in the public function, `cast_to` in the
operator): it saves no cast copy for its backward, and its gradients come in the inputs' own dtype. Those of a cast
outside would be rounded to the autocast dtype and widened again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What autocast casts to on the tensor's device; None where it is off."""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def dtypes_of(*tensors: torch.Tensor | None, cast: torch.dtype | None = None) -> tuple[torch.dtype | None, ...]:
    """The tensors' dtypes, after `cast_to`. float64 is left alone, as torch's own autocast does."""
    return tuple(None if t is None else t.dtype if cast is None or t.dtype == torch.float64 else cast for t in tensors)


def cast_to(cast: torch.dtype | None, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as autocast would have them; all unchanged where `cast` is None. Differentiable (a plain `.to`)."""
    dtypes = dtypes_of(*tensors, cast=cast)
    return tuple(None if t is None else t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True))


def cast_for_autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The float32 or half tensors in the autocast dtype when autocast is on for their device; else unchanged."""
    return cast_to(autocast_dtype(next(t for t in tensors if t is not None)), *tensors)


def without_autocast(fn: Callable) -> Callable:
    """Run `fn` with autocast off: a custom operator's body still sees the caller's autocast state, which would
    cast its float32 products down."""

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        device_type = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        with torch.autocast(device_type, enabled=False):
            return fn(*args, **kwargs)

    return wrapped
