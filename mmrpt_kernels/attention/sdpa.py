"""out and lse from the fastest of PyTorch's SDPA kernels that reports its lse.

CPU: the flash kernel. CUDA: cuDNN's where PyTorch itself prefers it, else flash; in float32, which these two lack, the
memory-efficient one. `torch.nn.attention.sdpa_kernel` may switch cuDNN's off. No kernel here knows of a mass:
`visual_mass` makes it from the lse.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.masks import AttentionOptions
from mmrpt_kernels.common.dtypes import statistics_dtype

# Older releases of cuDNN erred at lengths that are no multiple of 128 (PyTorch avoids them too).
CUDNN_VERSION = 91501
CUDNN_HEAD_SIZE = 128


@torch.compiler.assume_constant_result
def _kernel_name(device_type: str, index: int | None, dtype: torch.dtype, dim: int) -> str:
    """ "cpu", "cudnn", "flash" or "efficient"; a constant of a compiled graph."""
    if device_type == "cpu" or dtype == torch.float32:
        return "cpu" if device_type == "cpu" else "efficient"
    preferred = torch.cuda.get_device_capability(index)[0] in (9, 10) and dim <= CUDNN_HEAD_SIZE
    preferred = preferred and torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cudnn.is_available()
    return "cudnn" if preferred and torch.backends.cudnn.version() >= CUDNN_VERSION else "flash"


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, D), differentiable by the kernel's own backward pass, and lse (B, Hq, T), which is not.

    Args:
        q, k, v: (B, T, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D).
        options: causal or full, without a window or soft cap; causal with T == S or T == 1, so that every row has keys.
    """
    if q.numel() == 0 or k.numel() == 0:
        return q * 0.0, q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=statistics_dtype(q))
    causal = options.window_right == 0 and q.shape[1] > 1  # a single row sees every key
    name = _kernel_name(q.device.type, q.device.index, q.dtype, q.shape[-1])
    q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v))
    out, lse = KERNELS[name](q, k, v, causal, options.scale)
    return out.transpose(1, 2), lse.detach()


def _cpu(q, k, v, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _flash(q, k, v, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def _cudnn(q, k, v, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse.reshape(q.shape[:3])  # its own has a last dimension of 1


def _efficient(q, k, v, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # it knows no grouped heads
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]  # its own is padded to a multiple of 32 rows


KERNELS = {"cpu": _cpu, "flash": _flash, "cudnn": _cudnn, "efficient": _efficient}
