"""The vendor's attention: out and lse from the fastest of PyTorch's SDPA kernels that reports its lse.

CPU: the flash kernel. CUDA: cuDNN's where PyTorch itself prefers it, else flash. `torch.nn.attention.sdpa_kernel` may
switch cuDNN's off. No kernel here knows of a mass: `visual_mass` makes it from the lse.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.attention.portable_dense import statistics_dtype

__all__ = ["attention"]

# Older releases of cuDNN erred at lengths that are no multiple of 128 (PyTorch avoids them too).
CUDNN_VERSION = 91501
CUDNN_HEAD_SIZE = 128


@torch.compiler.assume_constant_result
def _kernel_name(device_type: str, index: int | None, dim: int) -> str:
    """ "cpu", "cudnn" or "flash"; a constant of a compiled graph."""
    if device_type == "cpu":
        return "cpu"
    preferred = torch.cuda.get_device_capability(index)[0] in (9, 10) and dim <= CUDNN_HEAD_SIZE
    preferred = preferred and torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cudnn.is_available()
    return "cudnn" if preferred and torch.backends.cudnn.version() >= CUDNN_VERSION else "flash"


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, D), lse (B, Hq, T). Autograd is the kernel's own: out is differentiable, lse is not."""
    aten = torch.ops.aten
    q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v))
    name = _kernel_name(q.device.type, q.device.index, q.shape[-1])
    if name == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif name == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        lse = lse.reshape(q.shape[:3])  # its own has a last dimension of 1
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse


@torch.library.custom_op("mmrpt_kernels::sdpa_lse", mutates_args=())
def _differentiable_lse(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float
) -> torch.Tensor:
    """lse (B, Hq, T), with the gradient that the kernel does not give it."""
    return lse.clone()


@_differentiable_lse.register_fake
def _(q, k, lse, causal, scale) -> torch.Tensor:
    return torch.empty_like(lse)


def _save(ctx, inputs, output) -> None:
    q, k, _, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k)


def _differentiate(ctx, dlse):
    """dq = scale dlse P k is an attention with k for values; dk = scale P^T (dlse q) is the gradient of its values."""
    q, k = ctx.saved_tensors
    factor = (ctx.scale * dlse).transpose(1, 2)[..., None]  # (B, T, Hq, 1)
    with torch.enable_grad():
        values = k.detach().requires_grad_()
        mean_key, _ = _attend(q.detach(), k.detach(), values, ctx.causal, ctx.scale)
    (dk,) = torch.autograd.grad(mean_key, values, (factor * q).to(q.dtype))
    return (factor * mean_key.detach()).to(q.dtype), dk, None, None, None


_differentiable_lse.register_autograd(_differentiate, setup_context=_save)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, D) and lse (B, Hq, T), both differentiable in q, k and (out) v.

    Args:
        q, k, v: (B, T, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D).
        options: causal or full, without a window or soft cap; causal with T == S or T == 1, so that every row has keys.
    """
    if q.numel() == 0 or k.numel() == 0:
        return q * 0.0, q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=statistics_dtype(q))
    causal = options.window_right == 0 and q.shape[1] > 1  # a single row sees every key
    out, lse = _attend(q, k, v, causal, options.scale)
    return out, _differentiable_lse(q, k, lse, causal, options.scale)
