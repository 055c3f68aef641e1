"""What happens between the raw logits of an lm head and the softmax.

raw  = hidden @ weight.T + bias                            (N, V)
s    = logit_scale * raw
s    = softcap * tanh(s / softcap)        if softcap > 0
z    = s / temperature
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["HeadOptions", "softcap_factors", "transform_backward", "transform_logits"]


class HeadOptions(NamedTuple):
    """The defaults change nothing."""

    temperature: float = 1.0
    softcap: float = 0.0
    logit_scale: float = 1.0


def softcap_factors(options: HeadOptions) -> tuple[float, float]:
    """(inner, outer) of z = outer * tanh(inner * raw) with a soft cap, z = outer * raw without: what kernels take."""
    temperature, softcap, logit_scale = options
    return (logit_scale / softcap, softcap / temperature) if softcap > 0.0 else (1.0, logit_scale / temperature)


def transform_logits(raw: torch.Tensor, options: HeadOptions, *, inplace: bool = False) -> torch.Tensor:
    """z = softcap(logit_scale * raw) / temperature, shape and dtype of `raw`; may return `raw` itself.

    `inplace=True` overwrites `raw` (for chunks outside autograd); otherwise differentiable by autograd.
    """
    temperature, softcap, logit_scale = options
    if softcap > 0.0:
        if inplace:
            return raw.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
        return torch.tanh(raw * (logit_scale / softcap)) * (softcap / temperature)
    factor = logit_scale / temperature
    if factor == 1.0:
        return raw
    return raw.mul_(factor) if inplace else raw * factor


def transform_backward(
    grad: torch.Tensor, transformed: torch.Tensor | None, options: HeadOptions, *, inplace: bool = False
) -> torch.Tensor:
    """d loss / d raw from d loss / d z.

    Args:
        grad: d loss / d z, the shape of the logits; overwritten with `inplace=True`.
        transformed: z as `transform_logits` returned it; read only when softcap > 0 (tanh' = 1 - tanh^2), else None.
    """
    temperature, softcap, logit_scale = options
    factor = logit_scale / temperature
    if softcap > 0.0:
        slope = (transformed * (temperature / softcap)).square_().neg_().add_(1.0).mul_(factor)
        return grad.mul_(slope) if inplace else grad * slope
    if factor == 1.0:
        return grad
    return grad.mul_(factor) if inplace else grad * factor
