"""The divergence's gradient in Triton: d loss / d raw logits of both views, in one sweep.

The formulas are at the head of pair_softmax_portable.py. For view p, with g the row's incoming gradients,
r = log p - log q and E_p a mean under p,

    d z_p = p (u - E_p u) + g_reverse (p - q) + g_logp (onehot_t - p)
        u = g_kl r + g_js log(p / m) / 2 - g_entropy log p

and view q the same with p and q, and with kl and reverse_kl, exchanged. E_p u is made of what the forward sweep found.
Each part vanishes by itself where it should: a word of probability near 1 gets no gradient, not one of rounding errors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmrpt_kernels.divergence.pair_softmax import PairHead, Slopes, Statistics
from mmrpt_kernels.divergence.triton_forward import (
    ENTROPY_P,
    ENTROPY_Q,
    FIELDS,
    KL,
    LOG_P,
    LOG_Q,
    MEAN_P,
    MEAN_Q,
    MEANS,
    REVERSE_KL,
    TOP_P,
    TOP_Q,
    State,
    load_words,
    log_to_mean,
    of_head,
    of_rows,
    tiles,
)

# A row's incoming gradients: kl, reverse_kl, js, the targets' log-probabilities, the entropies.
GRADIENTS = tl.constexpr(7)


@triton.jit
def _view(
    own, other, log_own, difference, to_mean, mean, g_own, g_other, g_js, g_entropy,
    WITH_OWN: tl.constexpr, WITH_OTHER: tl.constexpr, WITH_JS: tl.constexpr,
):  # fmt: skip
    """d z (BLOCK,) of one view but for its log-probability's part; `mean` = E u, g_own of KL(own || other)."""
    u = -mean - g_entropy * log_own
    if WITH_OWN:
        u += g_own * difference
    if WITH_JS:
        u += 0.5 * g_js * to_mean
    d = tl.where(own == 0.0, 0.0, own * u)  # not 0 * log 0
    if WITH_OTHER:
        d += g_other * (own - other)
    return d


@triton.jit(do_not_specialize_on_alignment=["targets"])  # a chunk's may start anywhere, and one is read
def _gradient(
    raw_p, raw_q, bias, rows, means, grads, targets, out_p, out_q, stride_p, stride_q, stride_out_p, stride_out_q,
    vocab, inner, outer,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TARGETS: tl.constexpr, WITH_KL: tl.constexpr,
    WITH_REVERSE: tl.constexpr, WITH_JS: tl.constexpr, WANT_P: tl.constexpr, WANT_Q: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, part). raw, out (n, V), out may be raw; rows (n, FIELDS); means (n, MEANS); grads (n, 7)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    raw_p += row * stride_p
    raw_q += row * stride_q
    rows += row * FIELDS
    grads += row * GRADIENTS
    top_p, log_p = tl.load(rows + TOP_P), tl.load(rows + LOG_P)
    top_q, log_q = tl.load(rows + TOP_Q), tl.load(rows + LOG_Q)
    g_kl, g_reverse = tl.load(grads + 0), tl.load(grads + 1)
    g_js = tl.load(grads + 2)
    g_logp_p, g_logp_q = tl.load(grads + 3), tl.load(grads + 4)
    g_entropy_p, g_entropy_q = tl.load(grads + 5), tl.load(grads + 6)
    idle = (g_kl == 0.0) & (g_reverse == 0.0) & (g_js == 0.0)
    idle_p = idle & (g_logp_p == 0.0) & (g_entropy_p == 0.0)
    idle_q = idle & (g_logp_q == 0.0) & (g_entropy_q == 0.0)
    mean_p = g_entropy_p * tl.load(rows + ENTROPY_P)
    mean_q = g_entropy_q * tl.load(rows + ENTROPY_Q)
    if WITH_KL:
        mean_p += g_kl * tl.load(rows + KL)
    if WITH_REVERSE:
        mean_q += g_reverse * tl.load(rows + REVERSE_KL)
    if WITH_JS:
        mean_p += 0.5 * g_js * tl.load(means + row * MEANS + MEAN_P)
        mean_q += 0.5 * g_js * tl.load(means + row * MEANS + MEAN_Q)
    target = -1
    if HAS_TARGETS:
        target = tl.load(targets + row)
    for start in range(part * SPAN, min((part + 1) * SPAN, vocab), BLOCK):
        word = start + tl.arange(0, BLOCK)
        z_p, slope_p = load_words(raw_p, bias, word, vocab, inner, outer, CAPPED, HAS_BIAS)
        z_q, slope_q = load_words(raw_q, bias, word, vocab, inner, outer, CAPPED, HAS_BIAS)
        lp, lq = (z_p - top_p) - log_p, (z_q - top_q) - log_q
        p, q, difference = tl.exp(lp), tl.exp(lq), lp - lq
        to_mean_p, to_mean_q = log_to_mean(difference)
        if WANT_P:
            slopes = (g_kl, g_reverse, g_js, g_entropy_p)
            d = _view(p, q, lp, difference, to_mean_p, mean_p, *slopes, WITH_KL, WITH_REVERSE, WITH_JS)
            if HAS_TARGETS:
                d += g_logp_p * (tl.where(word == target, 1.0, 0.0) - p)
            d = tl.where(idle_p, 0.0, d * slope_p)
            tl.store(out_p + row * stride_out_p + word, d.to(out_p.dtype.element_ty), mask=word < vocab)
        if WANT_Q:
            slopes = (g_reverse, g_kl, g_js, g_entropy_q)
            d = _view(q, p, lq, -difference, to_mean_q, mean_q, *slopes, WITH_REVERSE, WITH_KL, WITH_JS)
            if HAS_TARGETS:
                d += g_logp_q * (tl.where(word == target, 1.0, 0.0) - q)
            d = tl.where(idle_q, 0.0, d * slope_q)
            tl.store(out_q + row * stride_out_q + word, d.to(out_q.dtype.element_ty), mask=word < vocab)


def gradients(state: State, targets, found: Statistics, slopes: Slopes, head: PairHead, outs) -> None:
    """`PairKernels.gradients`. k3's part is in the log-probabilities' slopes; rows of zeros get zeros, whatever their
    logits are."""
    (raw_p, raw_q), (out_p, out_q), (count, vocab) = state, outs, state[0].shape
    zero = torch.zeros_like(found.top[0])
    singles = [zero if slope is None else slope for slope in slopes[:3]]
    pairs = [(zero, zero) if pair is None else pair.unbind() for pair in (slopes.logps, slopes.entropy)]
    grads = torch.stack([*singles, *pairs[0], *pairs[1]], -1).float()  # (n, GRADIENTS)
    means = None if found.to_mean is None else found.to_mean.t().float().contiguous()  # (n, MEANS)
    tile = tiles()
    if vocab % 16:  # loads of one word each keep more addresses in registers
        tile["num_warps"] *= 2
    with torch.cuda.device_of(raw_p):
        _gradient[(count, triton.cdiv(vocab, tile["SPAN"]))](
            raw_p, raw_q, rows=of_rows(found), means=means, grads=grads, targets=targets, out_p=out_p, out_q=out_q,
            stride_p=raw_p.stride(0), stride_q=raw_q.stride(0), stride_out_p=1 if out_p is None else out_p.stride(0),
            stride_out_q=1 if out_q is None else out_q.stride(0), vocab=vocab, **of_head(head),
            HAS_TARGETS=targets is not None, WITH_KL=slopes.kl is not None, WITH_JS=slopes.js is not None,
            WITH_REVERSE=slopes.reverse_kl is not None, WANT_P=out_p is not None, WANT_Q=out_q is not None, **tile,
        )  # fmt: skip
