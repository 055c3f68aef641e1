"""The divergence's sums in Triton: what both views' rows of logits come to.

One sweep over the logits gives all kinds but one: with x = z - max z, e = exp(x) and S = sum e per view,

    KL(p || q) = sum e_p (x_p - x_q) / S_p - log(S_p / S_q)       entropy = log S - sum e x / S

Every lane keeps the sums of its own words under its own running maximum, so that no thread waits for another; lanes
merge at the end of a program, programs of a row in `_join`. Jensen-Shannon needs both views' S word by word: a second
sweep, which adds what is zero where the views are equal rather than taking a sum from 1. Everything is float32, and
exactly 0 for equal logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmrpt_kernels.divergence.pair_softmax import PairHead, Statistics, Sums, Wanted
from mmrpt_kernels.lm_head.row_softmax_triton import head_arguments, load_capped

# The kernels read the raw logits of both views again.
State = tuple[torch.Tensor, torch.Tensor]

# What kernels read of whole rows: max z, log S of each view; for the gradient also entropies and divergences.
TOP_P, LOG_P, TOP_Q, LOG_Q = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
ENTROPY_P, ENTROPY_Q, KL, REVERSE_KL = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
FIELDS = tl.constexpr(8)
# Fields of the second sweep: KL(p || m), KL(q || m).
MEAN_P, MEAN_Q = tl.constexpr(0), tl.constexpr(1)
MEANS = tl.constexpr(2)
# Partial sums of a view: max, sum, dots, cross.
SUMS = tl.constexpr(4)
# Words that a lane takes at a time under one maximum: 16 bytes, what a thread loads at once.
GROUP = tl.constexpr(4)

# Words that a program takes at a time, and in all; fixed, so that a row's sums are the same in every batch and chunk.
# 152k words are 19 programs a row: a chunk of a few rows still fills a GPU. Chosen by compiling
# (tests/kernels/divergence/test_divergence_compile.py), not yet timed.
BLOCK = 1024
SPAN = 8192
WARPS = 4

# The maximum of no words. Finite, because inf - inf is NaN.
LOWEST = tl.constexpr(-1e38)


def tiles() -> dict[str, int]:
    """What the sweeps over the vocabulary are launched with."""
    return {"SPAN": SPAN, "BLOCK": BLOCK, "num_warps": WARPS}


@triton.jit
def load_words(row, bias, word, vocab, inner, outer, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(z, d z / d raw) of some words of one row; z = -inf beyond the vocabulary, which has probability 0."""
    capped = load_capped(row, bias, word, word < vocab, inner, CAPPED, HAS_BIAS)
    slope = outer
    if CAPPED:
        slope = (1.0 - capped * capped) * (inner * outer)
    return tl.where(word < vocab, capped * outer, float("-inf")), slope


@triton.jit
def log_to_mean(difference):
    """log(p / m) and log(q / m), m = (p + q) / 2, from log p - log q; exactly 0 where that is 0, and never inf - inf.

    log(p / m) = -log((1 + exp(-r)) / 2); for r < 0 the same is r - log((1 + exp(r)) / 2).
    """
    both = -tl.log(0.5 + 0.5 * tl.exp(-tl.abs(difference)))
    return both + tl.where(difference < 0.0, difference, 0.0), both - tl.where(difference > 0.0, difference, 0.0)


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
    raw_p, raw_q, bias, partials, stride_p, stride_q, vocab, parts, inner, outer,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, WITH_KL: tl.constexpr, WITH_REVERSE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
        z_p, _ = load_words(raw_p, bias, word, vocab, inner, outer, CAPPED, HAS_BIAS)
        z_q, _ = load_words(raw_q, bias, word, vocab, inner, outer, CAPPED, HAS_BIAS)
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
def _store_row(
    out, rows, raw, bias, target, vocab, top, total, dots, cross, gap, inner, outer,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One view's `Sums` of a row, to out (5, 2, rows) at the row and view; gap: max z less the other view's."""
    here = (target >= 0) & (target < vocab)
    z = load_capped(raw, bias, target, here, inner, CAPPED, HAS_BIAS) * outer
    tl.store(out, top)
    tl.store(out + 2 * rows, total)
    tl.store(out + 4 * rows, dots)
    tl.store(out + 6 * rows, cross - gap * total)
    tl.store(out + 8 * rows, tl.where(here, z, float("-inf")))


@triton.jit(do_not_specialize_on_alignment=["targets"])  # a chunk's may start anywhere, and one is read
def _join(
    partials, raw_p, raw_q, bias, targets, out, stride_p, stride_q, vocab, parts, inner, outer,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TARGETS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (row,): partials (n, 2, SUMS, parts) to out (5, 2, n); targets (n,) int64."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    partials += row * (2 * SUMS) * parts
    part = tl.arange(0, PARTS)
    top_p, total_p, dots_p, cross_p = _merge(*_load_sums(partials, part, parts))
    top_q, total_q, dots_q, cross_q = _merge(*_load_sums(partials + SUMS * parts, part, parts))
    target = row * 0 - 1
    if HAS_TARGETS:
        target = tl.load(targets + row)
    at_p, at_q = raw_p + row * stride_p, raw_q + row * stride_q
    gap = top_p - top_q
    _store_row(
        out + row, rows, at_p, bias, target, vocab, top_p, total_p, dots_p, cross_p, gap, inner, outer, CAPPED, HAS_BIAS
    )
    _store_row(
        out + rows + row, rows, at_q, bias, target, vocab, top_q, total_q, dots_q, cross_q, -gap, inner, outer, CAPPED,
        HAS_BIAS,
    )  # fmt: skip


@triton.jit
def _means(
    raw_p, raw_q, bias, rows, partials, stride_p, stride_q, vocab, parts, inner, outer,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, part), the second sweep: partials (n, MEANS, parts) from raw (n, V) and rows (n, FIELDS)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    raw_p += row * stride_p
    raw_q += row * stride_q
    rows += row * FIELDS
    top_p, log_p = tl.load(rows + TOP_P), tl.load(rows + LOG_P)
    top_q, log_q = tl.load(rows + TOP_Q), tl.load(rows + LOG_Q)
    mean_p = tl.zeros((BLOCK,), tl.float32)
    mean_q = tl.zeros((BLOCK,), tl.float32)
    for start in range(part * SPAN, min((part + 1) * SPAN, vocab), BLOCK):
        word = start + tl.arange(0, BLOCK)
        z_p, _ = load_words(raw_p, bias, word, vocab, inner, outer, CAPPED, HAS_BIAS)
        z_q, _ = load_words(raw_q, bias, word, vocab, inner, outer, CAPPED, HAS_BIAS)
        lp, lq = (z_p - top_p) - log_p, (z_q - top_q) - log_q
        p, q = tl.exp(lp), tl.exp(lq)
        to_mean_p, to_mean_q = log_to_mean(lp - lq)
        mean_p += tl.where(p == 0.0, 0.0, p * to_mean_p)
        mean_q += tl.where(q == 0.0, 0.0, q * to_mean_q)
    partials += row * MEANS * parts + part
    tl.store(partials + MEAN_P * parts, tl.sum(mean_p, 0))
    tl.store(partials + MEAN_Q * parts, tl.sum(mean_q, 0))


def of_head(head: PairHead) -> dict:
    """What every kernel takes of the head."""
    return {"bias": head.bias, **head_arguments(head.bias, head.options)}


def of_rows(found: Statistics) -> torch.Tensor:
    """What kernels read of whole rows, (n, FIELDS)."""
    views = (found.top, found.log_total)
    return torch.stack([*(each[v] for v in (0, 1) for each in views), *found.entropy, *found.kl], -1).float()


def sums(raw_p, raw_q, targets, head: PairHead, wanted: Wanted) -> tuple[Sums, State]:
    """`PairKernels.sums` of float32 logits, last dimension contiguous."""
    (count, vocab), tile = raw_p.shape, tiles()
    parts = triton.cdiv(vocab, tile["SPAN"])
    views = {"raw_p": raw_p, "raw_q": raw_q, "stride_p": raw_p.stride(0), "stride_q": raw_q.stride(0)}
    common = {**views, "vocab": vocab, "parts": parts, **of_head(head)}
    partials, joined = raw_p.new_empty(count, 2, SUMS.value, parts), raw_p.new_empty(5, 2, count)
    flags = {"WITH_KL": "kl" in wanted.kinds, "WITH_REVERSE": "reverse_kl" in wanted.kinds}
    alone = {"HAS_TARGETS": targets is not None, "PARTS": triton.next_power_of_2(parts), "num_warps": 1}
    with torch.cuda.device_of(raw_p):
        _sums[(count, parts)](partials=partials, **common, **flags, **tile)
        _join[(count,)](partials=partials, targets=targets, out=joined, **common, **alone)
    return Sums(*joined), (raw_p, raw_q)


def to_mean(state: State, found: Statistics, head: PairHead) -> torch.Tensor:
    """`PairKernels.to_mean`, the second sweep."""
    (raw_p, raw_q), (count, vocab), tile = state, state[0].shape, tiles()
    parts = triton.cdiv(vocab, tile["SPAN"])
    means = raw_p.new_empty(count, MEANS.value, parts)
    strides = {"stride_p": raw_p.stride(0), "stride_q": raw_q.stride(0), "vocab": vocab, "parts": parts}
    with torch.cuda.device_of(raw_p):
        _means[(count, parts)](
            raw_p=raw_p, raw_q=raw_q, rows=of_rows(found), partials=means, **strides, **of_head(head), **tile
        )
    return means.sum(-1).t().contiguous()
