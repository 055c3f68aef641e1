"""The row arithmetic of linear_token_divergence in plain PyTorch, any device: some rows of both views' logits.

With p = softmax(z_p), q = softmax(z_q), lp and lq their logarithms and m = log((p + q) / 2), the derivatives are

    kl           d/dz_p = p (lp - lq - KL)             d/dz_q = q - p
    reverse_kl   d/dz_p = p - q                        d/dz_q = q (lq - lp - RKL)
    js           d/dz_p = p (lp - m - KL(p||m)) / 2    d/dz_q = q (lq - m - KL(q||m)) / 2
    hellinger    d/dz_p = (p BC - sqrt(p q)) / 2       d/dz_q = (q BC - sqrt(p q)) / 2      BC = sum sqrt(p q)
    k3           through the targets' log-probabilities: d/d lq_t = exp(d) - 1 = - d/d lp_t
    entropy_p    d/dz_p = -p (lp + H_p)
    logps_p      d/dz_p = onehot_t - p

where hellinger is the squared distance, sum (sqrt p - sqrt q)^2 / 2 = 1 - BC.

On a CPU the passes over the words are most of the work besides the products. So probabilities are never written out:
p = e f with e = exp(x), x = z - max z, and f one number a row, which goes into the numbers that a pass multiplies by.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from mmrpt_kernels.common.head import HeadOptions, transform_backward, transform_logits
from mmrpt_kernels.divergence.rows import RowKernels, Slopes, Statistics, Sums, Wanted, log_scales
from mmrpt_kernels.divergence.stream import Problem

__all__ = ["row_kernels"]

LOG_2 = math.log(2.0)


def row_kernels(problem: Problem) -> RowKernels:
    """The kernels for one call."""
    options = problem.options
    first = partial(sums, options=options, careful=has_empty_words(problem))
    return RowKernels(first, means, partial(gradients, options=options), (problem.dtype(), problem.dtype()))


def has_empty_words(problem: Problem) -> bool:
    """Whether a word may have probability zero through a bias of -inf; then 0 * log 0 needs care (two passes more)."""
    bias = problem.bias
    return bias is not None and problem.options.softcap == 0.0 and not bool(torch.isfinite(bias).all())


class _State(NamedTuple):
    """What the sums leave for the second sweep and for the gradient: (n, V) each, of views p and q."""

    sums: Sums
    x: tuple[torch.Tensor, torch.Tensor]  # in the raw logits' memory; 0 at words of probability zero
    e: tuple[torch.Tensor, torch.Tensor]
    difference: torch.Tensor | None  # x_p - x_q; None for k3 alone
    z: tuple[torch.Tensor | None, torch.Tensor | None]  # where a soft cap's slope needs them


def _softmax_rows(raw: torch.Tensor, options: HeadOptions, careful: bool, keep: bool):
    """max z (n,), x and e (n, V), and z where it is to be kept; overwrites raw."""
    z = transform_logits(raw, options, inplace=True)
    kept = z.clone() if keep and options.softcap > 0.0 else None
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


def sums(raw_p, raw_q, targets, wanted: Wanted, *, options: HeadOptions, careful: bool) -> tuple[Sums, _State]:
    """RowKernels.sums; `careful`: words may have probability zero. Sums in a tree, which a matrix product is not."""
    views = [_softmax_rows(raw, options, careful, wanted.learns) for raw in (raw_p, raw_q)]
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


def _to_mean(difference):
    """log(own / mean), mean = (own + other) / 2, from `difference` = log own - log other; exactly 0 for equal ones."""
    return LOG_2 - softplus(-difference, threshold=40.0)


def means(state: _State, found: Statistics, kinds: tuple[str, ...]) -> torch.Tensor:
    """RowKernels.means."""
    dtype, scales = state.e[0].dtype, log_scales(state.sums, found)  # (2, n)
    factors, out = scales.exp(), scales.new_zeros(3, scales.shape[1])
    if "js" in kinds:
        difference = state.difference + (scales[0] - scales[1]).to(dtype)[:, None]
        out[0] = torch.linalg.vecdot(state.e[0], _to_mean(difference)).mul(factors[0])
        out[1] = torch.linalg.vecdot(state.e[1], _to_mean(difference.neg_())).mul(factors[1])
    if "hellinger" in kinds:
        roots = [e.sqrt().mul_(f.sqrt().to(dtype)[:, None]) for e, f in zip(state.e, factors, strict=True)]
        roots = roots[0].sub_(roots[1])
        out[2] = torch.linalg.vecdot(roots, roots).mul_(0.5)
    return out


class _View(NamedTuple):
    """One view's gradient d z = e (u - E u) + other terms: the numbers (n,) of its passes, None for no pass."""

    forward: torch.Tensor | None  # d loss / d KL(own || other), times f: of x_own - x_other in u
    backward: torch.Tensor | None  # d loss / d KL(other || own), times the other's f: of -e_other
    js: torch.Tensor | None  # half of d loss / d js, times f: of log(own / m) in u
    hellinger: torch.Tensor | None  # half of d loss / d hellinger, times sqrt(f_own f_other): of -sqrt(e_own e_other)
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
        level -= 0.5 * g.js * found.means[v]
    if g.hellinger is not None:
        level += 0.5 * g.hellinger * (1.0 - found.means[2])
    if g.entropy is not None:
        level -= g.entropy[v] * (scales[v] + found.entropy[v])
    if g.logps is not None:
        level -= g.logps[v]
    return _View(
        None if g_forward is None else g_forward * own,
        None if g_backward is None else g_backward * other,
        None if g.js is None else 0.5 * g.js * own,
        None if g.hellinger is None else 0.5 * g.hellinger * (own * other).sqrt_(),
        None if g.entropy is None else -g.entropy[v] * own,
        None if g.logps is None else g.logps[v],
        level * own,
    )


def _write_gradient(view: _View, v: int, state: _State, to_mean, targets, out: torch.Tensor) -> None:
    """d loss / d z (n, V) of view v to `out`, which may be its x. to_mean: log(own / m) (n, V), for js."""
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
        out.addcmul_(to_mean, view.js[:, None]) if started else torch.mul(to_mean, view.js[:, None], out=out)
        started = True
    if started:
        out.add_(view.level[:, None]).mul_(own)
    else:
        torch.mul(own, view.level[:, None], out=out)
    if view.backward is not None:
        out.addcmul_(other, view.backward[:, None], value=-1.0)
    if view.hellinger is not None:
        out.addcmul_((own * other).sqrt_(), view.hellinger[:, None], value=-1.0)
    if view.logp is not None:
        inside = (targets >= 0) & (targets < out.shape[-1])
        onehot = view.logp.masked_fill(~inside, 0.0)[:, None]
        out.scatter_add_(-1, torch.where(inside, targets, 0)[:, None], onehot)


def gradients(state: _State, targets, found: Statistics, slopes: Slopes, outs, *, options: HeadOptions) -> None:
    """RowKernels.gradients."""
    if options.softcap == 0.0:  # where z = factor * raw the factor needs no pass of its own
        factor = options.logit_scale / options.temperature
        slopes = Slopes(*(None if slope is None else slope * factor for slope in slopes))
    scales = log_scales(state.sums, found)
    dtype = state.e[0].dtype
    shift = (scales[0] - scales[1]).to(dtype)[:, None]
    for v, out in enumerate(outs):
        if out is None:
            continue
        to_mean = None
        if slopes.js is not None:
            difference = state.difference + shift
            to_mean = _to_mean(difference if v == 0 else difference.neg_())
        view = _View(*(None if each is None else each.to(dtype) for each in _view(v, found, slopes, scales)))
        _write_gradient(view, v, state, to_mean, targets, out)
        if options.softcap > 0.0:
            transform_backward(out, state.z[v], options, inplace=True)
