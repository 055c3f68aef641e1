"""The definition of `linear_logprobs`: full logits, plain PyTorch, autograd. Slow, obvious, float64-capable."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from mmrpt_kernels.common.autocast import without_autocast
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.options import HeadOptions, transform_logits


@without_autocast
def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    options: HeadOptions,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) and entropy of every row, differentiable in hidden, weight and bias.

        z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        logp = z_target - logsumexp(z)          entropy = -sum_v p_v log p_v,  p = softmax(z)

    Args:
        hidden: (..., H). weight: (V, H). targets: (...) int64. bias: (V,) or None.

    Returns:
        logps (...), entropy (...) or None, both float32 (float64 where an input is); 0 at rows of ignore_index, whose
        hidden states are never looked at.
    """
    dtype = statistics_dtype(hidden, weight, bias)
    wanted = targets != ignore_index
    rows = torch.where(wanted[..., None], hidden.to(dtype), 0.0)
    raw = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    z = transform_logits(raw, options)
    # Not torch.log_softmax: its running sum is off by 6e-6 at 152,000 words in float32.
    z = z - z.detach().amax(-1, keepdim=True)
    log_probs = z - z.exp().sum(-1, keepdim=True).log()
    chosen = log_probs.gather(-1, torch.where(wanted, targets, 0)[..., None]).squeeze(-1)
    logps = torch.where(wanted, chosen, 0.0)
    if not return_entropy:
        return logps, None
    # A word of probability 0 adds nothing (0 log 0 = 0): keep -inf out of the product.
    summands = log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    entropy = -summands.sum(-1).clamp(-math.log(weight.shape[0]), 0.0)
    return logps, torch.where(wanted, entropy, 0.0)
