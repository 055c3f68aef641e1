"""Attention that reports, for every query row, how much of its attention falls on weighted keys."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from mmrpt_kernels import backends
from mmrpt_kernels.attention import flash_attn, portable, reference, sdpa
from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.common.autocast import cast_for_autocast
from mmrpt_kernels.common.checks import (
    check,
    check_dtype,
    check_range,
    check_reverse_mode,
    check_same_device,
    check_shape,
)
from mmrpt_kernels.common.dtypes import FLOAT_DTYPES
from mmrpt_kernels.common.packing import read_segments

IMPLEMENTATIONS: dict[str, ModuleType] = {"portable": portable, "reference": reference}
if not backends.TRITON_MISSING:
    from mmrpt_kernels.attention import triton

    IMPLEMENTATIONS["triton"] = triton


class AttentionWithMass(NamedTuple):
    """What `attention_with_visual_mass` returns."""

    out: torch.Tensor  # (B, T, Hq, Dv), dtype of q; packed (sum T, Hq, Dv)
    mass: torch.Tensor  # (B, Hq, T[, G]), packed (Hq, sum T[, G]); "mean": (B, T[, G]), packed (sum T[, G])
    lse: torch.Tensor  # (B, Hq, T), packed (Hq, sum T), natural log, -inf in rows that attend nothing


def attention_with_visual_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    head_reduction: str = "none",
    mass_requires_grad: bool = True,
    backend: str | None = None,
) -> AttentionWithMass:
    """Attention, and for every row the share of it that falls on weighted keys, in one pass.

        s[t, j] = softcap(scale * q_t . k_j),  p = softmax over the keys that row t may attend to
        out[t] = sum_j p[t, j] v_j,    mass[t] = sum_j p[t, j] key_weights[j],    lse[t] = log sum_j exp s[t, j]

    out, mass and lse are differentiable in q, k and v, mass also in float key_weights. Statistics are float32 (float64
    for float64 q). Masses of boolean weights lie in [0, 1], and are exactly 1 where a row sees weighted keys alone. A
    row that may attend to nothing has out 0, mass 0, lse -inf and gradients 0.

    On a GPU the vendor's attention with the mass made from its lse is fastest where the mass needs no gradient, and one
    fused kernel where it does. The table of backends assumes that it does if any input requires a gradient: whoever
    only reads the mass says so by mass_requires_grad=False, or computes under torch.no_grad().

    A key that is not finite makes the rows that attend to it NaN and no others; a value that is not finite may reach
    every row of its sequence and head (0 * NaN is NaN, as in eager attention), though no other sequence. What stands
    at padded positions has no effect.

    Args:
        q, k, v: (B, T, Hq, D), (B, S, Hkv, D), (B, S, Hkv, Dv), one dtype, float32, bfloat16, float16 or float64; Hq a
            multiple of Hkv. Packed, with cu_seqlens: (sum T, Hq, D), (sum S, Hkv, D), (sum S, Hkv, Dv).
        key_weights: (B, S) or (B, S, G), bool or float: G groups of keys at once; packed (sum S[, G]).
        causal: row t sees keys up to its own position t + S - T (bottom-right aligned, as flash-attn).
        window_size: (left, right) keys around the row's own position, -1 = no limit; causal makes right 0.
        softmax_scale: default D ** -0.5.
        softcap: c > 0 turns s into c tanh(s / c); 0 = none.
        key_padding_mask: (B, S) bool, True = may be attended; not with packed inputs.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 or int64, where each packed sequence begins, and the end.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths, for backends that size a launch by them.
        head_reduction: "none" or "mean" over the query heads.
        mass_requires_grad: False returns the mass detached, whatever the inputs require.
        backend: see `mmrpt_kernels.backends`. "sdpa+mass" takes out and lse from PyTorch's SDPA and the mass from
            `visual_mass`: causal with T == S or T == 1, or full attention, of equal head sizes and nothing more.
            "flash-attn+mass" does so with the flash-attn package, packed sequences, windows and soft caps included.

    Returns:
        AttentionWithMass(out, mass, lse).

    Raises:
        ValueError: shapes, dtypes or options that do not fit. BackendError: the backend asked for cannot serve.
    """
    q, k, v = cast_for_autocast(q, k, v)
    packed = _check_attention(q, k, v, key_weights, key_padding_mask, cu_seqlens_q, cu_seqlens_k)
    _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _options(q.shape[-1], causal, window_size, softmax_scale, softcap)
    traits = _traits(q, k, v, options, packed, key_padding_mask is not None)
    traits |= _gradient_trait(mass_requires_grad, q, k, key_weights)
    masks = Masks(key_padding_mask=key_padding_mask, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    found = _attend(
        *(q, k, v, key_weights, options, masks),
        traits=traits,
        head_reduction=head_reduction,
        backend=backend,
        max_seqlens=(max_seqlen_q, max_seqlen_k),
    )
    return found if mass_requires_grad else found._replace(mass=found.mass.detach())


def masked_attention_with_visual_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    attn_mask: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    head_reduction: str = "none",
    backend: str | None = None,
) -> AttentionWithMass:
    """`attention_with_visual_mass` under any mask (blocks of image tokens that see each other, say).

    A band and a padding mask cost less than a mask of all pairs: use `attention_with_visual_mass` where they will do.

    Args:
        attn_mask: (B, 1, T, S) or (1, 1, T, S) bool, True = may be attended.
        others: as in `attention_with_visual_mass`, not packed.

    Raises:
        ValueError: shapes, dtypes or options that do not fit. BackendError: the backend asked for cannot serve.
    """
    q, k, v = cast_for_autocast(q, k, v)
    _check_attention(q, k, v, key_weights, None, None, None)
    check_dtype("attn_mask", attn_mask, (torch.bool,))
    batch = 1 if attn_mask.dim() == 4 and attn_mask.shape[0] == 1 else q.shape[0]
    check_shape("attn_mask", attn_mask, (batch, 1, q.shape[1], k.shape[1]), "(B or 1, 1, T, S): one mask for all heads")
    check_same_device(q=q, attn_mask=attn_mask)
    options = _options(q.shape[-1], False, (-1, -1), softmax_scale, softcap)
    traits = _traits(q, k, v, options, False, False) | {"attn_mask"} | _gradient_trait(True, q, k, key_weights)
    inputs = (q, k, v, key_weights, options, Masks(attn_mask=attn_mask))
    return _attend(*inputs, traits=traits, head_reduction=head_reduction, backend=backend)


def visual_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    key_weights: torch.Tensor,
    *,
    query_mask: torch.Tensor | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    head_reduction: str = "none",
    backend: str | None = None,
) -> torch.Tensor:
    """The mass alone, for any attention that reports its lse: only keys of non-zero weight are visited.

        mass[t] = sum_j exp(s[t, j] - lse[t]) key_weights[j]

    Differentiable in q, k and float key_weights. lse is a statistic of q and k: its part of the gradient is counted
    towards them (every key is visited in the backward pass), and lse itself receives none. So it does not matter
    whether the attention that made it can differentiate it.

    Args:
        lse: (B, Hq, T) float, natural log, of attention under the same options; packed (Hq, sum T). Rows of -inf have
            mass 0.
        query_mask: (B, T) bool, packed (sum T,): rows wanted; the others are not computed and have mass 0.
        others: as in `attention_with_visual_mass`.

    Returns:
        mass as in `AttentionWithMass`. Boolean weights: in [0, 1].

    Raises:
        ValueError: shapes, dtypes or options that do not fit. BackendError: the backend asked for cannot serve.
    """
    q, k = cast_for_autocast(q, k)
    packed = _check_attention(q, k, None, key_weights, key_padding_mask, cu_seqlens_q, cu_seqlens_k)
    _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rows = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    check_shape("lse", lse, rows, "(B, Hq, T), packed (Hq, sum T): one value per head and row")
    check_dtype("lse", lse, FLOAT_DTYPES)
    if query_mask is not None:
        check_shape("query_mask", query_mask, q.shape[:-2], "(B, T), packed (sum T,): True = row wanted")
        check_dtype("query_mask", query_mask, (torch.bool,))
    check_same_device(q=q, lse=lse, query_mask=query_mask)
    options = _options(q.shape[-1], causal, window_size, softmax_scale, softcap)
    traits = _traits(q, k, k, options, packed, key_padding_mask is not None)
    chosen = backends.select("visual_mass", device=q.device, dtype=q.dtype, requested=backend, traits=traits)
    if chosen != "reference":
        check_reverse_mode("visual_mass", q, k, key_weights)
    masks = Masks(key_padding_mask, None, query_mask, cu_seqlens_q, cu_seqlens_k)
    weights = key_weights if key_weights.dim() == q.dim() - 1 else key_weights[..., None]
    mass, _ = IMPLEMENTATIONS[chosen].mass_and_lse(q, k, lse, weights, options, masks)
    return _shape_mass(mass, q, key_weights, head_reduction)


def _attend(
    q, k, v, key_weights, options, masks, *, traits, head_reduction, backend, max_seqlens=(None, None)
) -> AttentionWithMass:
    """Dispatch of checked arguments."""
    chosen = backends.select("attention", device=q.device, dtype=q.dtype, requested=backend, traits=traits)
    if chosen != "reference":
        check_reverse_mode("attention_with_visual_mass", q, k, v, key_weights)
    weights = key_weights if key_weights.dim() == q.dim() - 1 else key_weights[..., None]
    if chosen in ("sdpa+mass", "flash-attn+mass"):
        if chosen == "sdpa+mass":
            out, lse = sdpa.attention(q, k, v, options)
        else:
            out, lse = flash_attn.attention(q, k, v, options, masks, max_seqlens)
        chosen = backends.first_choice("visual_mass", device=q.device, dtype=q.dtype, traits=traits)
        mass, lse = IMPLEMENTATIONS[chosen].mass_and_lse(q, k, lse, weights, options, masks)
    else:
        out, mass, lse = IMPLEMENTATIONS[chosen].attention(q, k, v, weights, options, masks)
    return AttentionWithMass(out, _shape_mass(mass, q, key_weights, head_reduction), lse)


def _shape_mass(mass: torch.Tensor, q: torch.Tensor, key_weights: torch.Tensor, head_reduction: str) -> torch.Tensor:
    """Mass (..., Hq, T, G) without the group dimension where the caller had none, and reduced over heads."""
    check(
        head_reduction in ("none", "mean"),
        f"head_reduction: got {head_reduction!r}, expected 'none' or 'mean'; reduce anything else from 'none' yourself",
    )
    if key_weights.dim() != q.dim() - 1:
        mass = mass[..., 0]
    if head_reduction == "none":
        return mass
    return mass.mean(dim=1 if q.dim() == 4 else 0)


def _options(
    dim: int, causal: bool, window_size: tuple[int, int], softmax_scale: float | None, softcap: float
) -> AttentionOptions:
    """Checked options; causality becomes a right window of 0, as in flash-attn."""
    left, right = window_size
    check(
        left >= -1 and right >= -1,
        f"window_size: got {window_size}, expected (left, right) with -1 = no limit or a count >= 0 of keys to each "
        "side; use (-1, -1) for full attention",
    )
    check_range("softcap", softcap, 0.0, None)
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    return AttentionOptions(left, 0 if causal else right, scale, float(softcap))


def _traits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions, packed: bool, padded: bool
) -> frozenset[str]:
    """What the call needs, in the words of `backends.Row.lacks`."""
    num_rows, num_keys, dim, dim_v = q.shape[-3], k.shape[-3], q.shape[-1], v.shape[-1]
    present = {
        "packed": packed,
        "dense": not packed,
        "key_padding_mask": padded,
        "window": options.window_left >= 0 or options.window_right > 0,
        "softcap": options.softcap > 0.0,
        "scale_not_positive": options.scale <= 0.0,
        "causal_suffix": options.window_right == 0 and num_rows not in (1, num_keys),
        "value_dim": dim != dim_v,
        "head_size_not_8s": dim % 8 != 0,
        "head_size_over_256": max(dim, dim_v) > 256,
    }
    return frozenset(trait for trait, there in present.items() if there)


def _gradient_trait(mass_requires_grad: bool, *inputs: torch.Tensor) -> frozenset[str]:
    """Whether somebody may ask for the gradient of the mass."""
    wanted = mass_requires_grad and torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return frozenset({"mass_gradient"}) if wanted else frozenset()


def _check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    key_weights: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> bool:
    """Shapes, dtypes and devices; returns whether the inputs are packed."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        check_shape("q", q, (None, None, None), "(sum T, Hq, D): packed, as cu_seqlens are given")
        check_shape("k", k, (None, None, q.shape[2]), "(sum S, Hkv, D), D as in q")
        check(
            key_padding_mask is None,
            "key_padding_mask: got a mask with cu_seqlens, expected None; pack only the tokens that count",
        )
    else:
        check_shape("q", q, (None, None, None, None), "(B, T, Hq, D); packed inputs come with cu_seqlens")
        check_shape("k", k, (q.shape[0], None, None, q.shape[3]), "(B, S, Hkv, D), B and D as in q")
    heads, heads_kv = q.shape[-2], k.shape[-2]
    check(
        heads_kv > 0 and heads % heads_kv == 0,
        f"k: got {heads_kv} heads for {heads} query heads, expected a divisor of {heads}; "
        "query head h uses key head h // (Hq / Hkv)",
    )
    check(q.shape[-1] > 0, "q: got head size 0, expected D >= 1; pass q (B, T, Hq, D)")
    check_dtype("q", q, FLOAT_DTYPES)
    check_dtype("k", k, (q.dtype,))
    if v is not None:
        check_shape("v", v, (*k.shape[:-1], None), "(B, S, Hkv, Dv), packed (sum S, Hkv, Dv): all but Dv as k")
        check_dtype("v", v, (q.dtype,))
    if key_padding_mask is not None:
        check_shape("key_padding_mask", key_padding_mask, k.shape[:2], "(B, S): True = may be attended")
        check_dtype("key_padding_mask", key_padding_mask, (torch.bool,))
    check_same_device(q=q, k=k, v=v, key_weights=key_weights, key_padding_mask=key_padding_mask)
    _check_weights(key_weights, k)
    return packed


def _check_weights(key_weights: torch.Tensor, k: torch.Tensor) -> None:
    """key_weights (B, S[, G]) or packed (sum S[, G]), bool or float."""
    keys = tuple(k.shape[:-2])
    grouped = key_weights.dim() == len(keys) + 1
    meaning = "(B, S) or (B, S, G), packed (sum S[, G]): one weight per key, or G per key"
    check_shape("key_weights", key_weights, (*keys, None) if grouped else keys, meaning)
    check_dtype("key_weights", key_weights, (torch.bool, *FLOAT_DTYPES))


def _check_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    """cu_seqlens of packed inputs. Their values are read where that waits for no device and breaks no graph."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        check(
            max_seqlen_q is None and max_seqlen_k is None,
            "max_seqlen: got a length without cu_seqlens, expected both or neither; leave it out for (B, T, H, D)",
        )
        return
    check(
        cu_seqlens_q is not None and cu_seqlens_k is not None,
        "cu_seqlens: got one of cu_seqlens_q and cu_seqlens_k, expected both; pass the same tensor twice for "
        "self-attention",
    )
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_shape(name, cu, (cu_seqlens_q.numel(),), "(sequences + 1,): where each sequence begins, and the end")
        check_dtype(name, cu, (torch.int32, torch.int64))
    check_same_device(q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if torch.compiler.is_compiling() or q.device.type != "cpu":
        return
    segments = read_segments(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    for name, limit, side in (("max_seqlen_q", max_seqlen_q, 0), ("max_seqlen_k", max_seqlen_k, 1)):
        longest = max((s[side].stop - s[side].start for s in segments), default=0)
        check(
            limit is None or limit >= longest,
            f"{name}: got {limit}, expected at least {longest}, the longest sequence; pass it or leave it out",
        )
