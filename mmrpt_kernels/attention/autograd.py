"""What the custom operators of every backend share: the shapes they return, what they save, how they differentiate."""

from __future__ import annotations

from typing import Any

import torch

from mmrpt_kernels.attention.portable_dense import statistics_dtype

__all__ = ["gradients_like", "make_attention_differentiable", "make_mass_differentiable", "mass_like", "results_like"]


def _statistics(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Empty, float32, or float64 for float64."""
    return like.new_empty(shape, dtype=statistics_dtype(like))


def results_like(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weights: torch.Tensor, *_: Any):
    """Empty out (..., T, Hq, Dv), mass (..., Hq, T, G) and lse (..., Hq, T)."""
    rows = q.shape[:-3] + (q.shape[-2], q.shape[-3])  # (B, Hq, T) or (Hq, sum T)
    out = q.new_empty(q.shape[:-1] + v.shape[-1:])
    return out, _statistics(q, rows + key_weights.shape[-1:]), _statistics(q, rows)


def mass_like(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, key_weights: torch.Tensor, *_: Any) -> torch.Tensor:
    """Empty mass (..., Hq, T, G)."""
    return _statistics(q, tuple(lse.shape) + key_weights.shape[-1:])


def gradients_like(key_weights: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Empty gradients of the inputs and, last, of the weights: (0,) for boolean ones, which have none."""
    contiguous = torch.contiguous_format
    made = (torch.empty_like(x, memory_format=contiguous) for x in inputs)
    if key_weights.is_floating_point():
        return *made, torch.empty_like(key_weights, memory_format=contiguous)
    return *made, inputs[0].new_empty(0)


def make_attention_differentiable(operator: Any, backward: Any, fake: Any = results_like) -> None:
    """Fakes and autograd of two custom operators.

    Args:
        operator: (q, k, v, key_weights, four masks, *settings) -> (out, mass, lse), and a fourth tensor where the
            backward pass needs more of the softmax than its lse.
        backward: (q, k, v, key_weights, dout, dmass, dlse, out, mass, softmax, four masks, *settings) -> dq, dk, dv,
            dw; softmax is the operator's last result, a gradient that did not arrive is None.
        fake: the operator's results, empty.
    """

    def save(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *output[:2], output[-1], *inputs[4:8])
        ctx.settings = inputs[8:]

    def differentiate(ctx, dout, dmass, dlse, *_):
        q, k, v, key_weights, out, mass, softmax, *masks = ctx.saved_tensors
        nothing = (None,) * (len(masks) + len(ctx.settings))
        if dout is None and dmass is None and dlse is None:
            return None, None, None, None, *nothing
        known = (dout, dmass, dlse, out, mass, softmax, *masks)
        *grads, dw = backward(q, k, v, key_weights, *known, *ctx.settings)
        return *grads, (dw if key_weights.is_floating_point() else None), *nothing

    operator.register_fake(fake)
    backward.register_fake(lambda q, k, v, key_weights, *_: gradients_like(key_weights, q, k, v))
    operator.register_autograd(differentiate, setup_context=save)


def make_mass_differentiable(operator: Any, backward: Any) -> None:
    """Fakes and autograd of two custom operators; the lse receives no gradient of its own.

    Args:
        operator: (q, k, lse, key_weights, four masks, *settings) -> mass.
        backward: (q, k, lse, key_weights, dmass, mass, four masks, *settings) -> dq, dk, dw.
    """

    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4], output, *inputs[4:8])
        ctx.settings = inputs[8:]

    def differentiate(ctx, dmass):
        q, k, lse, key_weights, mass, *masks = ctx.saved_tensors
        dq, dk, dw = backward(q, k, lse, key_weights, dmass, mass, *masks, *ctx.settings)
        nothing = (None,) * (len(masks) + len(ctx.settings))
        return dq, dk, None, (dw if key_weights.is_floating_point() else None), *nothing

    operator.register_fake(mass_like)
    backward.register_fake(lambda q, k, lse, key_weights, *_: gradients_like(key_weights, q, k))
    operator.register_autograd(differentiate, setup_context=save)
