"""Argument checks of the public functions.

Every message has three parts: what was got, what was expected, how to mend it. Inner layers call none: they trust.
All checks read metadata only (shape, dtype, device), so `torch.compile` evaluates them while tracing and nothing is
synchronised with a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.autograd import forward_ad


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Raise ValueError unless `tensor` has the shape `expected`; None stands for any size.

    Args:
        name: the argument's name, for the message.
        expected: one entry a dimension, None where any size will do.
        meaning: the dimensions in words, e.g. "(B, T): one value per token".
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: got {type(tensor).__name__}, expected a tensor {meaning}; pass a torch.Tensor")
    fits = tensor.dim() == len(expected) and all(
        e is None or g == e for g, e in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = (
            "(" + ", ".join("any" if e is None else str(e) for e in expected) + (",)" if len(expected) == 1 else ")")
        )
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {wanted} = {meaning}; "
            "reshape it, or check that it belongs to the same batch as the other arguments"
        )


def check_dtype(name: str, tensor: torch.Tensor, allowed: Iterable[torch.dtype]) -> None:
    """Raise ValueError unless `tensor.dtype` is one of `allowed`."""
    allowed = tuple(allowed)
    if tensor.dtype not in allowed:
        wanted = ", ".join(str(dtype) for dtype in allowed)
        raise ValueError(
            f"{name}: got dtype {tensor.dtype}, expected one of {wanted}; convert it with {name}.to({allowed[0]})"
        )


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors given (None is skipped) are on one device."""
    first_name, first = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected {first.device} (where {first_name} is); "
                f"move it with {name}.to({first_name}.device)"
            )


def check_range(name: str, value: float, low: float | None, high: float | None, *, low_open: bool = False) -> None:
    """Raise ValueError unless low <= value <= high (low < value with `low_open`); None asks for no more than a finite
    number at that end. Comparisons alone: a number that changes between compiled calls is symbolic."""
    above = value > -math.inf if low is None else (value > low if low_open else value >= low)
    below = value < math.inf if high is None else value <= high
    if not (above and below):  # NaN fails both
        left = "(-inf" if low is None else f"{'(' if low_open else '['}{low}"
        right = "inf)" if high is None else f"{high}]"
        raise ValueError(f"{name}: got {value}, expected a number in {left}, {right}; choose a value in that range")


def check_reverse_mode(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError where a tensor has a forward-mode tangent, which a custom operator would drop in silence."""
    if forward_ad._current_level < 0:  # no forward-mode differentiation is under way
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{op}: got a forward-mode tangent (jvp, jacfwd), but it has reverse-mode derivatives only; use "
            "torch.autograd.grad, or backend='reference'"
        )


def gradients_wanted(*tensors: torch.Tensor | None) -> tuple[bool, ...]:
    """Whether autograd will ask for the gradient of each tensor."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t is not None and t.requires_grad for t in tensors)
