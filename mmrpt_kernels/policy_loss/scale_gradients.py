"""The backward of a loss whose gradients were made in its forward: they are multiplied by the incoming number."""

from __future__ import annotations

import torch

from mmrpt_kernels.common.extension import TRITON_MISSING


def scale_in_place(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """grad *= factor (0-d), rounded once.

    Rounded to bfloat16 first, as torch does with a 0-d tensor, a factor of 1 / 12 would be 0.2 % too large in every
    entry. A factor of 1, what `loss.backward()` brings, leaves the gradient unread: on a GPU a kernel finds out, where
    the host would have to wait.
    """
    if grad.device.type == "cpu":
        value = factor.item()
        if value != 1.0:
            grad.mul_(value)
    elif grad.is_cuda and not TRITON_MISSING:
        from mmrpt_kernels.policy_loss.scale_gradients_triton import scale

        scale(grad, factor)
    else:
        grad.mul_(factor.reshape(1))  # with a dimension it takes part in choosing the dtype of the product


def scale_saved_gradients(ctx, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """ctx.saved_tensors times d_loss, in place: a copy of d weight would double the peak memory. So a second backward
    through the same graph raises. ctx: needs `scaled` False and the `dtypes` of the gradients."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused loss: got create_graph=True, but it has first derivatives only; "
            "take linear_logprobs with backend='reference' and a plain loss for second derivatives"
        )
    if ctx.scaled:
        raise RuntimeError(
            "fused loss: got a second backward through one call, but its gradients are scaled in place, once; "
            "call the loss again, or sum the losses first and call backward once"
        )
    ctx.scaled, grads = True, ctx.saved_tensors
    for grad in grads:
        if grad is not None:
            scale_in_place(grad, d_loss)
    # float16's were kept in float32 for a loss scale to come first.
    return tuple(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
