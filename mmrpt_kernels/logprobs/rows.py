"""What a row kernel gives and takes, and who offers one.

Two ways from the raw logits of some rows, over a vocabulary or over one part of it, to their gradient:

    z = softcap(logit_scale * raw) / temperature        as in `mmrpt_kernels.common.head`

Two sweeps serve every loss. `statistics` gives four numbers a row (`Partials`), which plain PyTorch finishes, once for
all implementations (`finish`); between the two the partials of several parts of one vocabulary can be merged.
`gradient` then works from the merged numbers and the loss's slopes.

One sweep serves losses of log-probabilities alone, over a whole vocabulary. `exponentials` leaves exp(z - base) in the
place of the logits: up to one factor a row, which the loss decides later, that is the gradient already.

    d logp_t / d raw_j = - slope / total * matrix_j         slope = logit_scale / temperature
    matrix_j = exp(z_j - base) (1 - tanh^2)  for j != t,    matrix_t = - rest (1 - tanh^2)
    rest = sum exp(z_j - base)  for j != t,                 total = exp(z_t - base) + rest
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = [
    "FAR_BELOW",
    "Exponentials",
    "Partials",
    "RowKernels",
    "Slopes",
    "Softmax",
    "finish",
    "finish_exponentials",
    "has_slope",
    "most_above",
    "register_rows",
    "row_kernels",
]

# A word this far below its row's maximum has probability exactly 0, in float64 too; clamping there keeps 0 * -inf out.
FAR_BELOW = -1e4

# d loss / d logps (n,), d loss / d entropy (n,) or None
Slopes = tuple[torch.Tensor, torch.Tensor | None]


class Partials(NamedTuple):
    """Sums of every row over its vocabulary, or over a part of it; (n,) each, float32 (float64 for float64 logits).

    Words whose z is -inf count nothing; a row that has no others: top -inf, total 0, dots 0. A row with NaN or +inf
    gives a NaN total.
    """

    top: torch.Tensor  # max z
    total: torch.Tensor  # sum exp(z - top)
    dots: torch.Tensor  # sum (z - top) exp(z - top) <= 0; all 0 where no entropy is wanted
    chosen: torch.Tensor  # z of the target; -inf where the target is outside [0, V): a word of another part, or none


class Softmax(NamedTuple):
    """What the gradient needs to know of the whole row's softmax; (n,) each. Merged over all parts, where there are
    several: then top is at least the part's own."""

    top: torch.Tensor
    total: torch.Tensor
    entropy: torch.Tensor | None  # None where the loss has no gradient in entropies


class Exponentials(NamedTuple):
    """Sums of every row over the words that are not its target; (n,) each, float32 (float64 for float64 logits).

    base: max z, or the target's z where that is at most `most_above` lower. A row with NaN or +inf in it, or with
    nothing but -inf, has a rest or a shift of NaN, or finds no other word (rest 0) and a shift of -inf.
    """

    shift: torch.Tensor  # z of the target - base <= 0
    rest: torch.Tensor  # sum exp(z - base)
    dots: torch.Tensor  # sum (z - base) exp(z - base); all 0 where no entropy is wanted


class RowKernels(NamedTuple):
    """Arithmetic on a chunk of logits.

    statistics(raw (n, V), targets (n,) int64, options, want_entropy, keep_logits) -> Partials, state
        raw is the kernel's to overwrite, and state whatever its gradient wants to see again. keep_logits: the gradient
        will read the logits themselves, for an entropy or a soft cap.
    gradient(state, targets (n,), options, softmax, slopes, into) -> d loss / d raw (n, V)
            d z_j = d_logps ([j = target] - p_j) - d_entropy p_j (log p_j + entropy),   p_j = exp(z_j - top) / total
        Exactly zero in rows whose slopes are zero, whatever their logits are; a target outside [0, V) has no word here.
        into (n, V): where to write it, rounded to its dtype; None: over the logits' own memory, in their dtype.
    exponentials(raw, targets (n,), options, want_entropy, into) -> Exponentials, matrix (n, V)
        Of whole rows: every target in [0, V). All zeros in a row whose rest is not finite, so that a factor of 0 leaves
        nothing of it. into as above, but not float16, whose range is too short.
    product(hidden_rows (n, H), weight (V, H), bias, targets, options, want_entropy, into) -> the same, or None
        From hidden states, the logits never in memory; may wait for the device. None where it cannot: then the logits
        are made and `exponentials` reads them. The kernels' owner may have no such thing.
    """

    statistics: Callable[..., tuple[Partials, Any]]
    gradient: Callable[..., torch.Tensor]
    exponentials: Callable[..., tuple[Exponentials, torch.Tensor]]
    rounds: bool  # whether gradient and exponentials take `into`
    product: Callable[..., tuple[Exponentials, torch.Tensor] | None] | None = None


def finish(partials: Partials, vocab: int, want_entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None, Softmax]:
    """logps (n,) <= 0, entropy (n,) in [0, log vocab] or None, and what the gradient needs.

    logp = (z_t - top) - log total: both parts have one sign, so logits of any size keep their precision.

    Args:
        partials: of whole rows.
        vocab: words of the whole vocabulary.
    """
    log_total = partials.total.log()
    logps = (partials.chosen - partials.top).sub_(log_total).clamp_max_(0.0)
    entropy = None
    if want_entropy:
        entropy = log_total.sub_(partials.dots / partials.total).clamp_(0.0, math.log(vocab))
    return logps, entropy, Softmax(partials.top, partials.total, entropy)


def has_slope(slopes: Slopes) -> torch.Tensor:
    """(n,) bool: rows with a coefficient other than exactly zero."""
    d_logps, d_entropy = slopes
    return d_logps != 0 if d_entropy is None else (d_logps != 0) | (d_entropy != 0)


def most_above(want_entropy: bool) -> float:
    """How far words may lie above the target and still leave its z, known before the sweep, for the base.

    A bfloat16 or float32 exponential could be 88 above. At 16 the exponents keep an absolute precision of 2e-6, and
    targets of probability under 1e-7 are hardly ever sampled; an entropy, where logarithms of that size cancel, wants
    less of it.
    """
    return 4.0 if want_entropy else 16.0


def finish_exponentials(
    sums: Exponentials, vocab: int, want_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """logps (n,) <= 0, entropy (n,) in [0, log vocab] or None, and total (n,), which the gradient is divided by.

    logp = shift - log1p(rest + expm1(shift)): -log1p(rest) in most rows, exact for the surest of words.
    """
    log_total = (sums.rest + sums.shift.expm1()).log1p_()
    own = sums.shift.exp()
    total = sums.rest + own
    entropy = None
    if want_entropy:
        dots = sums.dots + sums.shift.clamp_min(FAR_BELOW) * own
        entropy = (log_total - dots / total).clamp_(0.0, math.log(vocab))
    return (sums.shift - log_total).clamp_max_(0.0), entropy, total


_REGISTERED: dict[str, RowKernels] = {}


def register_rows(name: str, kernels: RowKernels) -> None:
    """An implementation offers its row kernels under its backend's name; its module does so when it is imported."""
    _REGISTERED[name] = kernels


def row_kernels(name: str) -> RowKernels:
    """The row kernels of a backend whose module has been imported (the public functions see to that)."""
    if name not in _REGISTERED:
        raise RuntimeError(
            f"rows: got {name!r}, but row kernels are registered by {', '.join(_REGISTERED) or 'nobody'}; "
            f"import mmrpt_kernels.logprobs.{name} first"
        )
    return _REGISTERED[name]
