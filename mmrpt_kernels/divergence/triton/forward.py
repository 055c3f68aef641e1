"""What both views' rows of logits come to: softmax sums, entropies, the targets' log-probabilities, divergences.

One sweep over the logits gives all but two kinds: with x = z - max z, e = exp(x) and S = sum e per view,

    KL(p || q) = sum e_p (z_p - z_q) / S_p - (max z_p - max z_q) - log(S_p / S_q)       entropy = log S - sum e x / S

Every lane keeps the sums of its own words under its own running maximum, so that no thread waits for another; lanes
merge at the end of a program, programs of a row in `_finish`. Jensen-Shannon and
Hellinger need both views' S word by word: a second sweep, which adds what is zero where the views are equal rather than
taking a sum from 1. Everything is float32, and exactly 0 for equal views.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmrpt_kernels.common.head import HeadOptions, bend_factors
from mmrpt_kernels.divergence.triton.words import (
    LOWEST,
    clamped,
    load_words,
    mean_logs,
    tiles,
    transformed,
)

__all__ = [
    "ENTROPY_P",
    "ENTROPY_Q",
    "FIELDS",
    "HELLINGER",
    "KL",
    "LOGP_P",
    "LOGP_Q",
    "LOG_P",
    "LOG_Q",
    "MEANS",
    "MEAN_P",
    "MEAN_Q",
    "REVERSE_KL",
    "TOP_P",
    "TOP_Q",
    "Statistics",
    "statistics",
]

# A row's fields: max z, log S of each view, entropies, divergences, the targets' log-probabilities.
TOP_P, LOG_P, TOP_Q, LOG_Q = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
ENTROPY_P, ENTROPY_Q, KL, REVERSE_KL = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
LOGP_P, LOGP_Q = tl.constexpr(8), tl.constexpr(9)
FIELDS = tl.constexpr(10)
# Fields of the second sweep: KL(p || m), KL(q || m), squared Hellinger distance.
MEAN_P, MEAN_Q, HELLINGER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MEANS = tl.constexpr(3)
# Partial sums of a view: max, sum, dots, cross.
SUMS = tl.constexpr(4)
# Words that a lane takes at a time under one maximum: 16 bytes, what a thread loads at once.
GROUP = tl.constexpr(4)


class Statistics(NamedTuple):
    """A chunk's rows."""

    rows: torch.Tensor  # (n, FIELDS) float32
    means: torch.Tensor | None  # (n, MEANS) float32; None where neither js nor hellinger is wanted


@triton.jit
def _push(z, difference, top, total, dots, cross, CROSS: tl.constexpr):
    """GROUP more words per lane, z and difference (L, GROUP), to the lanes' (L,) running max z, sum e, sum e x and
    sum e * difference."""
    best = tl.maximum(top, tl.max(z, 1))
    gap = top - best
    keep = tl.exp(gap)
    x = z - best[:, None]
    e = tl.exp(x)
    none = e == 0.0  # not 0 * inf: a word of probability 0 adds nothing
    dots = keep * (dots + gap * total) + tl.sum(tl.where(none, 0.0, e * x), 1)
    total = keep * total + tl.sum(e, 1)
    if CROSS:
        cross = keep * cross + tl.sum(tl.where(none, 0.0, e * difference), 1)
    return best, total, dots, cross


@triton.jit
def _merge(top, total, dots, cross):
    """The sums (L,) of L parts of a row as one: scalars."""
    best = tl.max(top, 0)
    gap = tl.where(total == 0.0, 0.0, top - best)
    scale = tl.exp(gap)
    return best, tl.sum(scale * total, 0), tl.sum(scale * (dots + gap * total), 0), tl.sum(scale * cross, 0)


@triton.jit
def _store_sums(partials, parts, top, total, dots, cross):
    """One view's sums of a program's words to partials (SUMS, parts)."""
    best, all_total, all_dots, all_cross = _merge(top, total, dots, cross)
    tl.store(partials, best)
    tl.store(partials + parts, all_total)
    tl.store(partials + 2 * parts, all_dots)
    tl.store(partials + 3 * parts, all_cross)


@triton.jit
def _sums(
    raw_p,
    raw_q,
    partials,
    stride_p,
    stride_q,
    vocab,
    parts,
    inner,
    outer,
    CAPPED: tl.constexpr,
    WITH_KL: tl.constexpr,
    WITH_REVERSE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, part): the sums of SPAN words of both views. raw (n, V); partials (n, 2, SUMS, parts) float32."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    raw_p += row * stride_p
    raw_q += row * stride_q
    lanes: tl.constexpr = BLOCK // GROUP
    top_p = tl.full((lanes,), LOWEST, tl.float32)
    total_p = tl.zeros((lanes,), tl.float32)
    dots_p = tl.zeros((lanes,), tl.float32)
    cross_p = tl.zeros((lanes,), tl.float32)
    top_q = tl.full((lanes,), LOWEST, tl.float32)
    total_q = tl.zeros((lanes,), tl.float32)
    dots_q = tl.zeros((lanes,), tl.float32)
    cross_q = tl.zeros((lanes,), tl.float32)
    tile = tl.arange(0, lanes)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # (lanes, GROUP)
    for start in range(part * SPAN, min((part + 1) * SPAN, vocab), BLOCK):
        word = start + tile
        z_p, _ = load_words(raw_p, word, vocab, inner, outer, CAPPED)
        z_q, _ = load_words(raw_q, word, vocab, inner, outer, CAPPED)
        top_p, total_p, dots_p, cross_p = _push(z_p, z_p - z_q, top_p, total_p, dots_p, cross_p, WITH_KL)
        top_q, total_q, dots_q, cross_q = _push(z_q, z_q - z_p, top_q, total_q, dots_q, cross_q, WITH_REVERSE)
    partials += row * (2 * SUMS) * parts + part
    _store_sums(partials, parts, top_p, total_p, dots_p, cross_p)
    _store_sums(partials + SUMS * parts, parts, top_q, total_q, dots_q, cross_q)


@triton.jit
def _load_sums(partials, part, parts):
    """One view's sums (PARTS,) of a row's parts, from partials (SUMS, parts); missing parts hold no words."""
    there = part < parts
    top = tl.load(partials + part, mask=there, other=LOWEST)
    total = tl.load(partials + parts + part, mask=there, other=0.0)
    dots = tl.load(partials + 2 * parts + part, mask=there, other=0.0)
    cross = tl.load(partials + 3 * parts + part, mask=there, other=0.0)
    return top, total, dots, cross


@triton.jit
def _log_prob(raw, target, vocab, top, log_total, inner, outer, CAPPED: tl.constexpr):
    """The target's log-probability, <= 0: both of its parts are; 0 for a negative target, NaN for one that is no word
    (the host cannot look at targets on a GPU without waiting for it)."""
    value = tl.load(raw + target, mask=(target >= 0) & (target < vocab), other=float("nan"))
    z, _ = transformed(value, inner, outer, CAPPED)
    return tl.where(target < 0, 0.0, clamped((z - top) - log_total, float("-inf"), 0.0))


@triton.jit
def _finish(
    partials,
    raw_p,
    raw_q,
    targets,
    rows,
    stride_p,
    stride_q,
    vocab,
    parts,
    log_vocab,
    inner,
    outer,
    CAPPED: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Program (row,): partials (n, 2, SUMS, parts) to rows (n, FIELDS); targets (n,) int64."""
    row = tl.program_id(0).to(tl.int64)
    partials += row * (2 * SUMS) * parts
    rows += row * FIELDS
    part = tl.arange(0, PARTS)
    top_p, total_p, dots_p, cross_p = _merge(*_load_sums(partials, part, parts))
    top_q, total_q, dots_q, cross_q = _merge(*_load_sums(partials + SUMS * parts, part, parts))
    log_p, log_q = tl.log(total_p), tl.log(total_q)
    # One logarithm of the quotient: the difference of two would round at their size, not at its own.
    shift = (top_p - top_q) + tl.log(total_p / total_q)
    tl.store(rows + TOP_P, top_p)
    tl.store(rows + LOG_P, log_p)
    tl.store(rows + TOP_Q, top_q)
    tl.store(rows + LOG_Q, log_q)
    tl.store(rows + ENTROPY_P, clamped(log_p - dots_p / total_p, 0.0, log_vocab))
    tl.store(rows + ENTROPY_Q, clamped(log_q - dots_q / total_q, 0.0, log_vocab))
    tl.store(rows + KL, clamped(cross_p / total_p - shift, 0.0, float("inf")))
    tl.store(rows + REVERSE_KL, clamped(cross_q / total_q + shift, 0.0, float("inf")))
    if HAS_TARGETS:
        target = tl.load(targets + row)
        logp_p = _log_prob(raw_p + row * stride_p, target, vocab, top_p, log_p, inner, outer, CAPPED)
        logp_q = _log_prob(raw_q + row * stride_q, target, vocab, top_q, log_q, inner, outer, CAPPED)
        tl.store(rows + LOGP_P, logp_p)
        tl.store(rows + LOGP_Q, logp_q)


@triton.jit
def _means(
    raw_p,
    raw_q,
    rows,
    partials,
    stride_p,
    stride_q,
    vocab,
    parts,
    inner,
    outer,
    CAPPED: tl.constexpr,
    WITH_JS: tl.constexpr,
    WITH_HELLINGER: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, part), the second sweep: partials (n, MEANS, parts) from raw (n, V) and rows (n, FIELDS)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    raw_p += row * stride_p
    raw_q += row * stride_q
    rows += row * FIELDS
    top_p, log_p = tl.load(rows + TOP_P), tl.load(rows + LOG_P)
    top_q, log_q = tl.load(rows + TOP_Q), tl.load(rows + LOG_Q)
    mean_p = tl.zeros((BLOCK,), tl.float32)
    mean_q = tl.zeros((BLOCK,), tl.float32)
    hellinger = tl.zeros((BLOCK,), tl.float32)
    for start in range(part * SPAN, min((part + 1) * SPAN, vocab), BLOCK):
        word = start + tl.arange(0, BLOCK)
        z_p, _ = load_words(raw_p, word, vocab, inner, outer, CAPPED)
        z_q, _ = load_words(raw_q, word, vocab, inner, outer, CAPPED)
        lp, lq = (z_p - top_p) - log_p, (z_q - top_q) - log_q
        root_p, root_q = tl.exp(0.5 * lp), tl.exp(0.5 * lq)
        if WITH_JS:
            p, q = root_p * root_p, root_q * root_q
            to_mean_p, to_mean_q = mean_logs(lp - lq)
            mean_p += tl.where(p == 0.0, 0.0, p * to_mean_p)
            mean_q += tl.where(q == 0.0, 0.0, q * to_mean_q)
        if WITH_HELLINGER:
            hellinger += (root_p - root_q) * (root_p - root_q)
    partials += row * MEANS * parts + part
    tl.store(partials + MEAN_P * parts, tl.sum(mean_p, 0))
    tl.store(partials + MEAN_Q * parts, tl.sum(mean_q, 0))
    tl.store(partials + HELLINGER * parts, 0.5 * tl.sum(hellinger, 0))


def statistics(
    raw_p: torch.Tensor,
    raw_q: torch.Tensor,
    targets: torch.Tensor | None,
    kinds: tuple[str, ...],
    options: HeadOptions,
) -> Statistics:
    """Fields of n rows from raw logits (n, V) float32, last dimension contiguous; targets (n,) int64 or None."""
    count, vocab = raw_p.shape
    tile = tiles()
    parts = triton.cdiv(vocab, tile["SPAN"])
    rows = raw_p.new_empty(count, FIELDS.value)
    strides, scalars = (raw_p.stride(0), raw_q.stride(0)), (*bend_factors(options), options.softcap > 0.0)
    sums = raw_p.new_empty(count, 2, SUMS.value, parts)
    flags = ("kl" in kinds, "reverse_kl" in kinds)
    grid = (count, parts)
    _sums[grid](raw_p, raw_q, sums, *strides, vocab, parts, *scalars, *flags, **tile)
    lone = {"HAS_TARGETS": targets is not None, "PARTS": triton.next_power_of_2(parts), "num_warps": 1}
    _finish[(count,)](sums, raw_p, raw_q, targets, rows, *strides, vocab, parts, math.log(vocab), *scalars, **lone)
    flags = ("js" in kinds, "hellinger" in kinds)
    if not any(flags):
        return Statistics(rows, None)
    means = raw_p.new_empty(count, MEANS.value, parts)
    _means[grid](raw_p, raw_q, rows, means, *strides, vocab, parts, *scalars, *flags, **tile)
    return Statistics(rows, means.sum(-1))
