"""The backward of a loss whose gradients were made in its forward."""

from __future__ import annotations

import torch

__all__ = ["dtypes_of", "hand_out"]


def dtypes_of(*tensors: torch.Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Of the tensors whose gradients `hand_out` gives."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


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
    grads = ctx.saved_tensors
    if d_loss.device.type != "cpu" or d_loss.item() != 1.0:  # reading it is free on a CPU only
        for grad in grads:
            if grad is not None:
                grad.mul_(d_loss.to(grad.dtype))
    # float16's were kept in float32 for a loss scale to come first.
    return tuple(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
