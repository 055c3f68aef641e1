"""Device helpers that the kernels share: the head's transform, and logarithms of what two views have in common."""

from __future__ import annotations

import triton
import triton.language as tl

from mmrpt_kernels.common.tanh import tanh

__all__ = ["LOWEST", "load_words", "mean_logs", "tiles", "transformed"]

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
def transformed(raw, inner, outer, CAPPED: tl.constexpr):
    """(z, d z / d raw) of raw logits: z = outer * tanh(inner * raw) where CAPPED, else outer * raw."""
    if CAPPED:
        bent = tanh(raw * inner)
        return bent * outer, (1.0 - bent * bent) * (inner * outer)
    else:
        return raw * outer, outer


@triton.jit
def load_words(row, word, vocab, inner, outer, CAPPED: tl.constexpr):
    """(z, d z / d raw) of some words of one row; z = -inf beyond the vocabulary, which has probability 0."""
    z, slope = transformed(tl.load(row + word, mask=word < vocab, other=0.0), inner, outer, CAPPED)
    return tl.where(word < vocab, z, float("-inf")), slope


@triton.jit
def mean_logs(difference):
    """log(p / m) and log(q / m), m = (p + q) / 2, from log p - log q; exactly 0 where that is 0, and never inf - inf.

    log(p / m) = -log((1 + exp(-r)) / 2); for r < 0 the same is r - log((1 + exp(r)) / 2).
    """
    bend = -tl.log(0.5 + 0.5 * tl.exp(-tl.abs(difference)))
    return bend + tl.where(difference < 0.0, difference, 0.0), bend - tl.where(difference > 0.0, difference, 0.0)
