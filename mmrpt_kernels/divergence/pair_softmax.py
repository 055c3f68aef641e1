"""The protocol of the divergence's row kernels, and the arithmetic on a row's few numbers that all of them share.

A row kernel sees the raw logits of both views over the vocabulary, or over one part of it, and gives sums (`Sums`).
Plain PyTorch finishes them (`finish`); between the two the sums of several parts of one vocabulary can be merged.
Jensen-Shannon compares the views' probabilities word by word, which are known only then: a second sweep.

    z = softcap(logit_scale * (raw + bias)) / temperature          as in `mmrpt_kernels.lm_head.options`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch

from mmrpt_kernels.lm_head.options import HeadOptions
from mmrpt_kernels.lm_head.vocab_parallel import Shard

# The logarithm of no probability: finite, as it is multiplied, and its exponential is 0 in float64.
NO_WORD = -1e4


class PairHead(NamedTuple):
    """What both views' logits have in common besides a weight. With a shard, bias is of this rank's words."""

    bias: torch.Tensor | None  # (V,) in the statistics dtype
    options: HeadOptions
    vocab: int  # words of the whole vocabulary
    shard: Shard | None


class Wanted(NamedTuple):
    """What a sweep over the logits is for."""

    kinds: tuple[str, ...]
    entropy: bool = True  # sum the entropies
    learns: bool = False  # gradients follow


class Sums(NamedTuple):
    """Of every row over its words, or a part of them: (2, n) each, view p first, in the statistics dtype.

    x = z - top, e = exp(x). Words whose z is -inf add nothing; a row of no others: top -inf or a very low number,
    sums 0. A row with NaN or +inf: a NaN total.
    """

    top: torch.Tensor  # max z
    total: torch.Tensor  # sum e
    dots: torch.Tensor  # sum e x; anything where no entropy is wanted
    cross: torch.Tensor  # sum e (x - x of the other view); anything where that view's Kullback-Leibler is not wanted
    chosen: torch.Tensor  # z of the target; -inf where it is none of these words


class Statistics(NamedTuple):
    """Of whole rows, (2, n) each, view p first; float64, because differences of them are taken."""

    top: torch.Tensor
    total: torch.Tensor
    log_total: torch.Tensor
    entropy: torch.Tensor  # in [0, log V]; anything where it was not wanted
    kl: torch.Tensor  # KL(p || q), KL(q || p), >= 0; anything where not wanted
    logps: torch.Tensor  # <= 0; 0 where the target is negative or there are no targets, NaN where it is no word
    to_mean: torch.Tensor | None = None  # KL(p || m), KL(q || m) with m = (p + q) / 2; None without js


class RowValues(NamedTuple):
    """What n rows give, or the gradients of it, in the statistics dtype."""

    divergence: torch.Tensor | None  # (n, K); None, here and below: no gradient
    logps_p: torch.Tensor | None  # (n,); None without targets
    logps_q: torch.Tensor | None  # (n,)
    entropy_p: torch.Tensor | None  # (n,)
    entropy_q: torch.Tensor | None  # (n,)


class Slopes(NamedTuple):
    """d loss / d what a row comes to, (n,) or (2, n) with p first, float64; None: zero in all rows."""

    kl: torch.Tensor | None
    reverse_kl: torch.Tensor | None
    js: torch.Tensor | None
    logps: torch.Tensor | None  # (2, n), k3's part in it; 0 where there is no target
    entropy: torch.Tensor | None  # (2, n)


class PairKernels(NamedTuple):
    """Arithmetic on some rows' raw logits, (n, V) of each view in the statistics dtype, which it may overwrite.

    targets: (n,) int64 or None; outside [0, V) they are none of these words.

    sums(raw_p, raw_q, targets, head, wanted) -> Sums, state           state: what the other two read again
    to_mean(state, statistics, head) -> (2, n) of any float dtype, `Statistics.to_mean` of these words alone
    gradients(state, targets, statistics, slopes, head, outs)
        Writes d loss / d raw of each view to outs, (n, V) of any float dtype or None where it is not wanted; outs may
        be the raw logits themselves, and a lone one those of either view.
    """

    sums: Callable[..., tuple[Sums, Any]]
    to_mean: Callable[..., torch.Tensor]
    gradients: Callable[..., None]


def pair_kernels(backend: str) -> PairKernels:
    """The kernels of backend "portable" or "triton", imported on first use."""
    return import_module(f"mmrpt_kernels.divergence.pair_softmax_{backend}").PAIR_KERNELS


def merge(own: Sums, shard: Shard) -> Sums:
    """Sums of whole rows from those of every rank's words; one collective of 10 n numbers, the same on all ranks."""
    tops, totals, dots, cross, chosen = shard.gather(torch.stack(own)).unbind(1)  # (ranks, 2, n)
    top = tops.amax(0)
    shifts = tops - top.clamp_min(torch.finfo(top.dtype).min)  # not inf - inf
    scales, empty = shifts.exp(), totals == 0
    dots = (dots + shifts * totals).masked_fill_(empty, 0.0)
    cross = (cross + (shifts - shifts.flip(1)) * totals).masked_fill_(empty, 0.0)
    summed = ((part * scales).sum(0) for part in (totals, dots, cross))
    return Sums(top, *summed, chosen.amax(0))


def finish(sums: Sums, targets: torch.Tensor | None, vocab: int) -> Statistics:
    """Statistics of whole rows, without `to_mean`; targets (n,) as ids of the `vocab` words."""
    top, total, dots, cross, chosen = (each.double() for each in sums)
    log_total = total.log()
    # The logarithm of the quotient: the difference of two would round at their size, not at its own.
    kl = (cross / total).sub_((total / total.flip(0)).log_()).clamp_min_(0.0)
    entropy = (log_total - dots / total).clamp_(0.0, math.log(vocab))
    logps = torch.zeros_like(top)
    if targets is not None:
        logps = (chosen - top).sub_(log_total).clamp_max_(0.0)
        logps = logps.masked_fill_(targets < 0, 0.0).masked_fill_(targets >= vocab, torch.nan)
    return Statistics(top, total, log_total, entropy, kl, logps)


def log_scales(sums: Sums, found: Statistics) -> torch.Tensor:
    """(2, n) float64: log-probability of a word of these `sums`, less its x; very low where no word is possible."""
    return (sums.top.double() - found.top).sub_(found.log_total).masked_fill_(sums.total == 0, NO_WORD)


def statistics(
    kernels: PairKernels,
    raw: tuple[torch.Tensor, torch.Tensor],
    targets: torch.Tensor | None,
    wanted: Wanted,
    head: PairHead,
) -> tuple[Statistics, Any]:
    """What both views' rows of `raw` (n, V) come to, and the kernels' state; targets (n,) ids of all words.

    With a shard, `raw` is this rank's part: one collective, and a second for js.
    """
    shard = head.shard
    own = targets if targets is None or shard is None else targets - shard.start
    sums, state = kernels.sums(*raw, own, head, wanted)
    found = finish(sums if shard is None else merge(sums, shard), targets, head.vocab)
    if "js" in wanted.kinds:
        to_mean = kernels.to_mean(state, found, head).double()
        found = found._replace(to_mean=to_mean if shard is None else shard.gather(to_mean).sum(0))
    return found, state


def k3(logps: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1, d = clamp(log q_t - log p_t, -20, 20), clamped to [0, 10]; (2, n) -> (n,)."""
    d = (logps[1] - logps[0]).clamp_(-20.0, 20.0)
    return (torch.expm1(d) - d).clamp_(0.0, 10.0)


def k3_slope(logps: torch.Tensor) -> torch.Tensor:
    """d k3 / d log q_t = - d k3 / d log p_t, (2, n) -> (n,); zero where a clamp holds."""
    d = logps[1] - logps[0]
    slope = torch.expm1(d.clamp(-20.0, 20.0))
    return slope.masked_fill_((d.abs() > 20.0) | (slope - d > 10.0), 0.0)


def divergence_of(kind: str, found: Statistics) -> torch.Tensor:
    """(n,)."""
    if kind == "k3":
        return k3(found.logps)
    if kind == "js":
        return found.to_mean.sum(0).mul_(0.5).clamp_(0.0, math.log(2.0))
    return found.kl[0 if kind == "kl" else 1]


def row_values(found: Statistics, kinds: tuple[str, ...], with_targets: bool) -> RowValues:
    """The operator's outputs of some rows, float64."""
    logps = found.logps if with_targets else (None, None)
    return RowValues(torch.stack([divergence_of(kind, found) for kind in kinds], -1), *logps, *found.entropy)


def _pair(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """(2, n) of two (n,), of which either may be None for zeros."""
    if first is None and second is None:
        return None
    like = second if first is None else first
    return torch.stack([torch.zeros_like(like) if one is None else one for one in (first, second)]).double()


def slopes_of(grads: RowValues, found: Statistics, targets: torch.Tensor | None, kinds: tuple[str, ...]) -> Slopes:
    """What the gradient of n rows' logits is made of; a kind may have several columns in `grads`."""
    by_kind: dict[str, torch.Tensor] = {}
    for column, kind in enumerate(kinds if grads.divergence is not None else ()):
        grad = grads.divergence[:, column].double()
        by_kind[kind] = by_kind[kind] + grad if kind in by_kind else grad
    logps, entropy = _pair(grads.logps_p, grads.logps_q), _pair(grads.entropy_p, grads.entropy_q)
    if "k3" in by_kind:
        slope = k3_slope(found.logps).mul_(by_kind["k3"])
        slope.masked_fill_(by_kind["k3"] == 0, 0.0)  # not NaN from a row that asks for nothing
        by_k3 = torch.stack([-slope, slope])
        logps = by_k3 if logps is None else logps.add_(by_k3)
    if logps is not None:
        logps = logps.masked_fill_(targets < 0, 0.0)
    return Slopes(*(by_kind.get(kind) for kind in ("kl", "reverse_kl", "js")), logps, entropy)
