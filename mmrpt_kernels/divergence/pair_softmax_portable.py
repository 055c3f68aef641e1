"""The divergence's row kernels in plain PyTorch, any device.

With p = softmax(z_p), q = softmax(z_q), lp and lq their logarithms and m = log((p + q) / 2), the derivatives are

    kl           d/dz_p = p (lp - lq - KL)             d/dz_q = q - p
    reverse_kl   d/dz_p = p - q                        d/dz_q = q (lq - lp - RKL)
    js           d/dz_p = p (lp - m - KL(p||m)) / 2    d/dz_q = q (lq - m - KL(q||m)) / 2
    k3           through the targets' log-probabilities: d/d lq_t = exp(d) - 1 = - d/d lp_t
    entropy_p    d/dz_p = -p (lp + H_p)
    logps_p      d/dz_p = onehot_t - p

On a CPU the passes over the words are most of the work besides the products. So probabilities are never written out:
p = e f with e = exp(x), x = z - max z, and f one number a row, which goes into the numbers that a pass multiplies by.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from mmrpt_kernels.divergence.pair_softmax import (
    PairHead,
    PairKernels,
    Slopes,
    Statistics,
    Sums,
    Wanted,
    log_scales,
)
from mmrpt_kernels.lm_head.options import transform_backward, transform_logits

LOG_2 = math.log(2.0)


class _State(NamedTuple):
    """What the sums leave for the second sweep and for the gradient: (n, V) each, of views p and q."""

    sums: Sums
    x: tuple[torch.Tensor, torch.Tensor]  # in the raw logits' memory; 0 at words of probability zero
    e: tuple[torch.Tensor, torch.Tensor]
    difference: torch.Tensor | None  # x_p - x_q; None for k3 alone
    z: tuple[torch.Tensor | None, torch.Tensor | None]  # where a soft cap's slope needs them


def _has_empty_words(head: PairHead) -> bool:
    """Whether a word may have probability zero through a bias of -inf; then 0 * log 0 needs care (two passes more)."""
    return head.bias is not None and head.options.softcap == 0.0 and not bool(torch.isfinite(head.bias).all())


def _softmax_rows(raw: torch.Tensor, head: PairHead, careful: bool, keep: bool):
    """max z (n,), x and e (n, V), and z where it is to be kept; overwrites raw."""
    z = transform_logits(raw if head.bias is None else raw.add_(head.bias), head.options, inplace=True)
    kept = z.clone() if keep and head.options.softcap > 0.0 else None
    top = z.amax(-1)
    x = z.sub_(top.clamp_min(torch.finfo(top.dtype).min)[:, None])  # a row of -inf alone: not inf - inf
    e = x.exp()
    if careful:
        x.masked_fill_(x == -torch.inf, 0.0)
    return top, x, e, kept


def _chosen(x: torch.Tensor, top: torch.Tensor, e: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    """z (n,) of the targets (n,), -inf where they are none of these words or impossible."""
    if targets is None:
        return top
    inside = (targets >= 0) & (targets < x.shape[-1])
    at = torch.where(inside, targets, 0)[:, None]
    impossible = (e.gather(-1, at) == 0) & (x.gather(-1, at) == 0)
    return (x.gather(-1, at) + top[:, None]).masked_fill_(impossible | ~inside[:, None], -torch.inf)[:, 0]


def sums(raw_p, raw_q, targets, head: PairHead, wanted: Wanted) -> tuple[Sums, _State]:
    """`PairKernels.sums`. Sums in a tree, which a matrix product is not."""
    careful = _has_empty_words(head)
    views = [_softmax_rows(raw, head, careful, wanted.learns) for raw in (raw_p, raw_q)]
    tops, xs, es, zs = zip(*views, strict=True)
    top, totals = torch.stack(tops), torch.stack([e.sum(-1) for e in es])
    dots, crosses, difference = top, [tops[0], tops[1]], None
    if wanted.entropy:
        dots = torch.stack([torch.linalg.vecdot(e, x) for e, x in zip(es, xs, strict=True)])
    if set(wanted.kinds) - {"k3"}:
        difference = xs[0] - xs[1]
    if "kl" in wanted.kinds:
        crosses[0] = torch.linalg.vecdot(es[0], difference)
    if "reverse_kl" in wanted.kinds:
        crosses[1] = torch.linalg.vecdot(es[1], difference).neg_()
    chosen = torch.stack([_chosen(x, own, e, targets) for own, x, e, _ in views])
    found = Sums(top, totals, dots, torch.stack(crosses), chosen)
    return found, _State(found, xs, es, difference, zs)


def _log_to_mean(difference):
    """log(own / mean), mean = (own + other) / 2, from `difference` = log own - log other; exactly 0 for equal ones."""
    return LOG_2 - softplus(-difference, threshold=40.0)


def to_mean(state: _State, found: Statistics, head: PairHead) -> torch.Tensor:
    """`PairKernels.to_mean`."""
    scales = log_scales(state.sums, found)  # (2, n)
    difference = state.difference + (scales[0] - scales[1]).to(state.difference.dtype)[:, None]
    own = torch.linalg.vecdot(state.e[0], _log_to_mean(difference))
    return torch.stack([own, torch.linalg.vecdot(state.e[1], _log_to_mean(difference.neg_()))]).mul(scales.exp())


class _View(NamedTuple):
    """One view's gradient d z = e (u - E u) + other terms: the numbers (n,) of its passes, None for no pass."""

    forward: torch.Tensor | None  # d loss / d KL(own || other), times f: of x_own - x_other in u
    backward: torch.Tensor | None  # d loss / d KL(other || own), times the other's f: of -e_other
    js: torch.Tensor | None  # half of d loss / d js, times f: of log(own / m) in u
    entropy: torch.Tensor | None  # - d loss / d entropy, times f: of x in u
    logp: torch.Tensor | None  # d loss / d log-probability of the target: of onehot
    level: torch.Tensor  # of e: all that does not depend on the word


def _view(v: int, found: Statistics, g: Slopes, scales: torch.Tensor) -> _View:
    """The numbers of view v, 0 for p or 1 for q; scales (2, n) are the words' log-probabilities less their x.

    All float64: `level` is a sum of numbers that may cancel, and its error would be that of every word of the row.
    """
    own, other = scales[v].exp(), scales[1 - v].exp()
    g_forward, g_backward = (g.kl, g.reverse_kl) if v == 0 else (g.reverse_kl, g.kl)
    level = torch.zeros_like(own)
    if g_forward is not None:
        level += g_forward * (scales[v] - scales[1 - v] - found.kl[v])
    if g_backward is not None:
        level += g_backward
    if g.js is not None:
        level -= 0.5 * g.js * found.to_mean[v]
    if g.entropy is not None:
        level -= g.entropy[v] * (scales[v] + found.entropy[v])
    if g.logps is not None:
        level -= g.logps[v]
    return _View(
        None if g_forward is None else g_forward * own,
        None if g_backward is None else g_backward * other,
        None if g.js is None else 0.5 * g.js * own,
        None if g.entropy is None else -g.entropy[v] * own,
        None if g.logps is None else g.logps[v],
        level * own,
    )


def _write_gradient(view: _View, v: int, state: _State, log_to_mean, targets, out: torch.Tensor) -> None:
    """d loss / d z (n, V) of view v to `out`, which may be its x. log_to_mean: log(own / m) (n, V), for js."""
    own, other = state.e[v], state.e[1 - v]
    started = True
    if view.entropy is not None:
        torch.mul(state.x[v], view.entropy[:, None], out=out)
        if view.forward is not None:
            out.addcmul_(state.difference, view.forward[:, None], value=1 - 2 * v)
    elif view.forward is not None:
        torch.mul(state.difference, view.forward.mul(1 - 2 * v)[:, None], out=out)
    else:
        started = False
    if view.js is not None:
        out.addcmul_(log_to_mean, view.js[:, None]) if started else torch.mul(log_to_mean, view.js[:, None], out=out)
        started = True
    if started:
        out.add_(view.level[:, None]).mul_(own)
    else:
        torch.mul(own, view.level[:, None], out=out)
    if view.backward is not None:
        out.addcmul_(other, view.backward[:, None], value=-1.0)
    if view.logp is not None:
        inside = (targets >= 0) & (targets < out.shape[-1])
        onehot = view.logp.masked_fill(~inside, 0.0)[:, None]
        out.scatter_add_(-1, torch.where(inside, targets, 0)[:, None], onehot)


def gradients(state: _State, targets, found: Statistics, slopes: Slopes, head: PairHead, outs) -> None:
    """`PairKernels.gradients`."""
    options = head.options
    if options.softcap == 0.0:  # where z = factor * raw the factor needs no pass of its own
        slopes = Slopes(*(None if slope is None else slope * options.slope for slope in slopes))
    scales = log_scales(state.sums, found)
    dtype = state.e[0].dtype
    shift = (scales[0] - scales[1]).to(dtype)[:, None]
    for v, out in enumerate(outs):
        if out is None:
            continue
        log_to_mean = None
        if slopes.js is not None:
            difference = state.difference + shift
            log_to_mean = _log_to_mean(difference if v == 0 else difference.neg_())
        view = _View(*(None if each is None else each.to(dtype) for each in _view(v, found, slopes, scales)))
        _write_gradient(view, v, state, log_to_mean, targets, out)
        if options.softcap > 0.0:
            transform_backward(out, state.z[v], options)


PAIR_KERNELS = PairKernels(sums, to_mean, gradients)
