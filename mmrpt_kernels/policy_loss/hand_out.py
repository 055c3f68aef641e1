"""The backward of a loss whose gradients were made in its forward."""

from __future__ import annotations

import torch

__all__ = ["as_factor", "hand_out"]


def as_factor(d_loss: torch.Tensor) -> torch.Tensor | float:
    """The incoming scalar as what a gradient of any dtype can be multiplied by and be rounded once.

    Rounded to bfloat16 first, as torch does with a 0-d tensor, a factor of 1 / 12 would be 0.2 % too large in every
    entry. With a dimension it takes part in choosing the dtype that the kernel multiplies in; on a CPU that would take
    a float32 copy of the gradient, and reading the number is free.
    """
    return d_loss.reshape(1) if d_loss.device.type != "cpu" else d_loss.item()


def hand_out(ctx, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The saved gradients times the incoming scalar, in place: a copy of d weight would double the peak memory.

    So they are handed out once, and a second backward through the same graph raises.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused loss: got create_graph=True, but it has first derivatives only; "
            "take linear_logprobs with backend='reference' and a plain loss for second derivatives"
        )
    if ctx.handed_out:
        raise RuntimeError(
            "fused loss: got a second backward through one call, but its gradients are scaled in place and handed out "
            "once; call the loss again, or sum the losses first and call backward once"
        )
    ctx.handed_out = True
    grads, factor = ctx.saved_tensors, as_factor(d_loss)
    if not (isinstance(factor, float) and factor == 1.0):
        for grad in grads:
            if grad is not None:
                grad.mul_(factor)
    # float16's were kept in float32 for a loss scale to come first.
    return tuple(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
