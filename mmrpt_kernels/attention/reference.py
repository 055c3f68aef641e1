"""The definition of attention with visual mass in plain PyTorch: one (T, S) matrix of probabilities, float64.

    s[t, j]     = softcap(scale * q_t . k_j)         softcap(x) = c tanh(x / c), or x without a cap
    lse[t]      = log sum_{j allowed for t} exp s[t, j]
    p[t, j]     = exp(s[t, j] - lse[t]),   0 where not allowed, 0 everywhere in a row that may attend to nothing
    out[t]      = sum_j p[t, j] v_j
    mass[t, g]  = sum_j p[t, j] w[j, g]

Slow and obvious on purpose; gradients are autograd's. The tests' only truth.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.common.dtypes import statistics_dtype


def _allowed(q: torch.Tensor, k: torch.Tensor, options: AttentionOptions, masks: Masks) -> torch.Tensor:
    """(B or 1, 1, T, S) bool: keys of the row's own sequence that causality, the window and the masks allow.

    A dense batch is one sequence.
    """
    row, key = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    cu_q, cu_k = (torch.arange(2, device=q.device) * x.shape[1] for x in (q, k))
    if masks.cu_seqlens_q is not None:
        cu_q, cu_k = masks.cu_seqlens_q.long(), masks.cu_seqlens_k.long()
    row_sequence = torch.searchsorted(cu_q, row, right=True) - 1
    key_sequence = torch.searchsorted(cu_k, key, right=True) - 1
    # Position of a row among its sequence's keys, bottom-right aligned.
    row_position = (row - cu_q[row_sequence] + (cu_k.diff() - cu_q.diff())[row_sequence])[:, None]
    key_position = (key - cu_k[key_sequence])[None, :]
    allowed = row_sequence[:, None] == key_sequence[None, :]
    if options.window_left >= 0:
        allowed = allowed & (key_position >= row_position - options.window_left)
    if options.window_right >= 0:
        allowed = allowed & (key_position <= row_position + options.window_right)
    allowed = allowed[None, None]
    if masks.key_padding_mask is not None:
        allowed = allowed & masks.key_padding_mask[:, None, None, :]
    return allowed if masks.attn_mask is None else allowed & masks.attn_mask


def _scores(q: torch.Tensor, k: torch.Tensor, options: AttentionOptions, dtype: torch.dtype) -> torch.Tensor:
    """(B, Hq, T, S): softcap(scale * q . k), query head h with key head h // (Hq / Hkv)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = options.scale * torch.einsum("bthd,bshd->bhts", q.to(dtype), k.to(dtype))
    return options.softcap * torch.tanh(scores / options.softcap) if options.softcap > 0 else scores


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    options: AttentionOptions,
    masks: Masks = Masks(),  # noqa: B008
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, Dv) as q, mass (B, Hq, T, G) and lse (B, Hq, T) in float32 (float64 for float64 q).

    Args:
        q, k, v: (B, T, Hq, D), (B, S, Hkv, D), (B, S, Hkv, Dv); packed: (sum T, Hq, D) and so on, with cu_seqlens.
        key_weights: (B, S, G), packed (sum S, G), bool or float.
        dtype: of the computation; the tests' yardstick uses float32.
    """
    if masks.cu_seqlens_q is not None:
        q, k, v, key_weights = (x[None] for x in (q, k, v, key_weights))
    allowed = _allowed(q, k, options, masks)
    scores = _scores(q, k, options, dtype).masked_fill(~allowed, -torch.inf)
    dead = ~allowed.any(-1, keepdim=True)
    # A row of -inf has NaN gradients in softmax: replace rows without keys by 0 before it, set 0 after it.
    probs = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)
    lse = torch.logsumexp(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead[..., 0], -torch.inf)
    v = v.to(dtype).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    out = torch.einsum("bhts,bshd->bthd", probs, v).to(q.dtype)
    mass = torch.einsum("bhts,bsg->bhtg", probs, key_weights.to(dtype))
    if not key_weights.is_floating_point():
        mass = mass.clamp(0.0, 1.0)
    mass, lse = mass.to(statistics_dtype(q)), lse.to(statistics_dtype(q))
    return (out, mass, lse) if masks.cu_seqlens_q is None else (out[0], mass[0], lse[0])


def mass_from_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    options: AttentionOptions,
    masks: Masks = Masks(),  # noqa: B008
    *,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """mass (B, Hq, T, G) = sum_j exp(s[t, j] - lse[t]) w[j, g] from a given lse; shapes as in `attention`.

    lse is a statistic of q and k, so the gradient in q and k counts its part: d lse / d s[t, j] = p[t, j]. lse itself
    receives no gradient.

    Args:
        lse: (B, Hq, T), packed (Hq, sum T).
    """
    packed, query_mask = masks.cu_seqlens_q is not None, masks.query_mask
    wide = statistics_dtype(q)
    if packed:
        q, k, key_weights, lse = (x[None] for x in (q, k, key_weights, lse))
        query_mask = None if query_mask is None else query_mask[None]
    allowed = _allowed(q, k, options, masks)
    if query_mask is not None:
        allowed = allowed & query_mask[:, None, :, None]
    # Outside the mask a score may be NaN or exceed lse by far: set it to 0 first, as NaN * 0 is NaN in the gradient.
    scores = _scores(q, k, options, dtype).masked_fill(~allowed, 0.0)
    lse = lse.detach().to(dtype)[..., None].masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    probs = torch.exp((scores - lse).masked_fill(~allowed, -torch.inf))
    live_part = (probs.detach() * (scores - scores.detach())).sum(-1, keepdim=True)  # zero; its gradient is d lse
    probs = torch.exp((scores - lse - live_part).masked_fill(~allowed, -torch.inf))
    mass = torch.einsum("bhts,bsg->bhtg", probs, key_weights.to(dtype))
    if not key_weights.is_floating_point():
        mass = mass.clamp(0.0, 1.0)
    return (mass[0] if packed else mass).to(wide)


def mass_and_lse(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`mass_from_lse` and the lse that went in, as the other backends have it."""
    return mass_from_lse(*inputs), inputs[2]
