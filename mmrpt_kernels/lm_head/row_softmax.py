"""The protocol of row kernels, from a chunk of raw logits to their softmax and its gradient, and what finishes them.

    z = softcap(logit_scale * (raw + bias)) / temperature          raw = hidden @ weight.T, float32

One sweep serves losses of log-probabilities alone, over a whole vocabulary. `exponentials` writes a matrix that is the
gradient up to one factor a row, which the loss gives later:

    d logp_t / d raw_j = - slope / total * matrix_j                 slope = logit_scale / temperature
    matrix_j = exp(z_j - base) (1 - tanh^2)  for j != t,            matrix_t = - rest (1 - tanh^2)
    rest = sum exp(z_j - base)  for j != t,                         total = exp(z_t - base) + rest

Two sweeps serve every loss, and a vocabulary cut into parts: `statistics` gives four sums a row, which can be merged
over parts; `gradient` then works from the merged sums and the loss's slopes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch

# A word this far below its row's maximum has probability exactly 0, in float64 too; clamping there avoids 0 * -inf.
FAR_BELOW = -1e4

# d loss / d logps (n,), and d loss / d entropy (n,) or None where the loss does not depend on entropies
Slopes = tuple[torch.Tensor, torch.Tensor | None]


class Partials(NamedTuple):
    """Sums of every row over a vocabulary or a part of it; (n,) each, float32 (float64 for float64 logits).

    Words whose z is -inf add nothing. A row that has no others: top -inf, total 0, dots 0. A row with NaN or +inf has a
    NaN total.
    """

    top: torch.Tensor  # max z
    total: torch.Tensor  # sum exp(z - top)
    dots: torch.Tensor  # sum (z - top) exp(z - top) <= 0; 0 where no entropy is wanted
    chosen: torch.Tensor  # z of the target; -inf where the target is outside [0, V): in another part, or no word


class Softmax(NamedTuple):
    """What `gradient` reads of the whole row's softmax, (n,) each; merged over all parts of a vocabulary."""

    top: torch.Tensor
    total: torch.Tensor
    entropy: torch.Tensor | None  # None where the loss has no gradient in entropies


class Exponentials(NamedTuple):
    """Sums of every row over the words other than its target; (n,) each, float32 (float64 for float64 logits).

    base: max z, or the target's z where max z is at most `max_above_target` higher. A row with NaN or +inf in it, or
    with nothing but -inf, has a NaN rest or shift, or rest 0 and shift -inf.
    """

    shift: torch.Tensor  # z of the target - base <= 0
    rest: torch.Tensor  # sum exp(z - base)
    dots: torch.Tensor  # sum (z - base) exp(z - base); 0 where no entropy is wanted


class RowKernels(NamedTuple):
    """Arithmetic on a chunk of raw logits (n, V), float32 (float64), last dimension contiguous, rows at any stride.

    bias: (V,) in the logits' dtype, or None. targets: (n,) int64.

    exponentials(logits, bias, targets, options, want_entropy, out) -> Exponentials
        Whole rows: every target in [0, V). Writes the matrix to out (n, V), float32, bfloat16 or the logits themselves;
        all zeros in a row whose rest is not finite, so that a factor of 0 leaves nothing of it.
    statistics(logits, bias, targets, options, want_entropy, keep_logits) -> Partials, state
        May overwrite logits; state is what `gradient` reads again. keep_logits: the gradient will need z itself, for an
        entropy or a soft cap.
    gradient(state, bias, targets, options, softmax, slopes, out)
        Writes d loss / d raw to out (n, V) of any float dtype, or the logits themselves, with
        d z_j = d_logps ([j = target] - p_j) - d_entropy p_j (log p_j + entropy),   p_j = exp(z_j - top) / total
        Exactly zero in rows whose slopes are zero, whatever their logits are. A target outside [0, V) has no word here.
    """

    exponentials: Callable[..., Exponentials]
    statistics: Callable[..., tuple[Partials, Any]]
    gradient: Callable[..., None]


def row_kernels(backend: str) -> RowKernels:
    """The row kernels of backend "portable", "triton" or "cuda", imported on first use."""
    return import_module(f"mmrpt_kernels.lm_head.row_softmax_{backend}").ROW_KERNELS


def has_slope(slopes: Slopes) -> torch.Tensor:
    """(n,) bool: rows with a coefficient other than exactly zero."""
    d_logps, d_entropy = slopes
    return d_logps != 0 if d_entropy is None else (d_logps != 0) | (d_entropy != 0)


def max_above_target(want_entropy: bool) -> float:
    """How far max z may lie above the target's z for that to serve as the base, which is known before the sweep.

    Exponentials could be 88 above in bfloat16 and float32. At 16 the exponents keep an absolute precision of 2e-6, and
    targets of probability under 1e-7 are hardly ever sampled; an entropy, where logarithms of that size cancel, needs a
    closer base.
    """
    return 4.0 if want_entropy else 16.0


def finish_exponentials(
    sums: Exponentials, vocab: int, want_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """logps (n,) <= 0, entropy (n,) in [0, log vocab] or None, and total (n,), which the gradient is divided by.

    logp = shift - log1p(rest + expm1(shift)): -log1p(rest) in most rows, exact for words of probability near 1.
    """
    log_total = (sums.rest + sums.shift.expm1()).log1p_()
    own = sums.shift.exp()
    total = sums.rest + own
    entropy = None
    if want_entropy:
        dots = sums.dots + sums.shift.clamp_min(FAR_BELOW) * own
        entropy = (log_total - dots / total).clamp_(0.0, math.log(vocab))
    return (sums.shift - log_total).clamp_max_(0.0), entropy, total


def finish_partials(
    partials: Partials, vocab: int, want_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None, Softmax]:
    """logps (n,) <= 0, entropy (n,) in [0, log vocab] or None, and what `gradient` needs; partials of whole rows.

    logp = (z_t - top) - log total: both terms have one sign, so that logits of any size keep their precision.
    """
    log_total = partials.total.log()
    logps = (partials.chosen - partials.top).sub_(log_total).clamp_max_(0.0)
    entropy = None
    if want_entropy:
        entropy = log_total.sub_(partials.dots / partials.total).clamp_(0.0, math.log(vocab))
    return logps, entropy, Softmax(partials.top, partials.total, entropy)
