"""The row arithmetic of linear_token_divergence in plain PyTorch, any device: a chunk of both views' logits.

With p = softmax(z_p), q = softmax(z_q), lp and lq their logarithms and m = log((p + q) / 2), the derivatives are

    kl           d/dz_p = p (lp - lq - KL)             d/dz_q = q - p
    reverse_kl   d/dz_p = p - q                        d/dz_q = q (lq - lp - RKL)
    js           d/dz_p = p (lp - m - KL(p||m)) / 2    d/dz_q = q (lq - m - KL(q||m)) / 2
    hellinger    d/dz_p = (p BC - sqrt(p q)) / 2       d/dz_q = (q BC - sqrt(p q)) / 2      BC = sum sqrt(p q)
    k3           through the targets' log-probabilities: d/d lq_t = exp(d) - 1 = - d/d lp_t
    entropy_p    d/dz_p = -p (lp + H_p)
    logps_p      d/dz_p = onehot_t - p

where hellinger is the squared distance, sum (sqrt p - sqrt q)^2 / 2 = 1 - BC.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from mmrpt_kernels.common.head import HeadOptions, transform_backward, transform_logits
from mmrpt_kernels.divergence.stream import Problem, RowKernels, RowValues, k3, k3_slope, sum_by_kind

__all__ = ["row_kernels"]

LOG_2 = math.log(2.0)


def row_kernels(problem: Problem) -> RowKernels:
    """The pair for one call."""
    settings = {"options": problem.options, "careful": has_empty_words(problem)}
    return RowKernels(partial(values, **settings), partial(gradients, **settings))


def has_empty_words(problem: Problem) -> bool:
    """Whether a word may have probability zero through a bias of -inf; then 0 * log 0 needs care (a pass more)."""
    bias = problem.bias
    return bias is not None and problem.options.softcap == 0.0 and not bool(torch.isfinite(bias).all())


def softmax_rows(raw: torch.Tensor, options: HeadOptions):
    """log p, p and, where a soft cap's slope needs them, the transformed logits; each (n, V), None otherwise.

    Overwrites raw (n, V). Written out because one exponential serves both results, and because `sum` adds in a tree:
    torch.log_softmax is 2 to 4 times less accurate at V = 152k and, with the exponential after it, slower.
    """
    z = transform_logits(raw, options, inplace=True)
    kept = z.clone() if options.softcap > 0.0 else None
    top = z.amax(-1, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(-1, keepdim=True)
    return z.sub_(top.add_(total.log())), p.div_(total), kept


def _expectation(p, values, careful: bool):
    """sum_v p_v * values_v -> (n,); `careful` lets words of probability zero count for nothing (but keeps NaN)."""
    if careful:
        values = values.masked_fill(p == 0, 0.0)
    return torch.linalg.vecdot(p, values)


def _entropy(p, logp, careful: bool):
    return _expectation(p, logp, careful).neg_().clamp_(0.0, math.log(p.shape[-1]))


def _at_targets(logp, targets):
    picked = logp.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    return picked.masked_fill_(targets < 0, 0.0).clamp_max_(0.0)


def _to_mean(difference):
    """log(own / mean), mean = (own + other) / 2, from `difference` = log own - log other; exactly 0 for equal views."""
    return LOG_2 - softplus(-difference, threshold=40.0)


def _column(kind, p, q, difference, careful):
    """One divergence (n,) of a chunk; `difference` = log p - log q (n, V)."""
    if kind == "kl":
        return _expectation(p, difference, careful).clamp_min_(0.0)
    if kind == "reverse_kl":
        return _expectation(q, difference, careful).neg_().clamp_min_(0.0)
    if kind == "js":
        half = _expectation(p, _to_mean(difference), careful)
        return half.add_(_expectation(q, _to_mean(-difference), careful)).mul_(0.5).clamp_(0.0, LOG_2)
    roots = p.sqrt().sub_(q.sqrt())  # hellinger
    return torch.linalg.vecdot(roots, roots).mul_(0.5).clamp_(0.0, 1.0)


def values(raw_p, raw_q, targets, kinds, *, options: HeadOptions, careful: bool) -> RowValues:
    """RowKernels.values; `careful`: see `_expectation`."""
    (lp, p, _), (lq, q, _) = softmax_rows(raw_p, options), softmax_rows(raw_q, options)
    entropy_p, entropy_q = (_entropy(*view, careful) for view in ((p, lp), (q, lq)))
    target_p, target_q = (None, None) if targets is None else (_at_targets(lp, targets), _at_targets(lq, targets))
    difference = lp.sub_(lq)
    columns = [k3(target_p, target_q) if kind == "k3" else _column(kind, p, q, difference, careful) for kind in kinds]
    return RowValues(torch.stack(columns, -1), target_p, target_q, entropy_p, entropy_q)


class _View(NamedTuple):
    """What one view contributes to the backward pass of a chunk."""

    log_own: torch.Tensor  # (n, V)
    own: torch.Tensor  # (n, V)
    g_forward: torch.Tensor | None  # (n,) of KL(own || other)
    g_backward: torch.Tensor | None  # (n,) of KL(other || own)
    g_entropy: torch.Tensor  # (n,)
    g_target: torch.Tensor | None  # (n,) of the target's log-probability


def _view_gradient(view: _View, difference, other, g_js, g_hellinger, targets, careful):
    """d loss / d z of one view (n, V): p (u - E_p[u]) for expectations under p, the rest added as it stands."""
    values = view.log_own * view.g_entropy[:, None].neg()
    if view.g_forward is not None:
        values.addcmul_(difference, view.g_forward[:, None])
    if g_js is not None:
        values.addcmul_(_to_mean(difference), g_js[:, None], value=0.5)
    if careful:
        values.masked_fill_(view.own == 0, 0.0)
    level = torch.linalg.vecdot(view.own, values).neg_()
    if view.g_target is not None:
        level -= view.g_target
    if view.g_backward is not None:
        level += view.g_backward
    if g_hellinger is not None:
        overlap = (view.own * other).sqrt_()
        level.addcmul_(overlap.sum(-1), g_hellinger, value=0.5)
    grad = values.add_(level[:, None]).mul_(view.own)
    if view.g_backward is not None:
        grad.addcmul_(other, view.g_backward[:, None], value=-1.0)
    if g_hellinger is not None:
        grad.addcmul_(overlap, g_hellinger[:, None], value=-0.5)
    if view.g_target is not None:
        grad.scatter_add_(-1, targets.clamp_min(0)[:, None], view.g_target[:, None])
    return grad


def gradients(raw_p, raw_q, targets, kinds, grads: RowValues, wanted, *, options: HeadOptions, careful: bool):
    """RowKernels.gradients; `careful`: see `_expectation`."""
    (lp, p, z_p), (lq, q, z_q) = softmax_rows(raw_p, options), softmax_rows(raw_q, options)
    g = sum_by_kind(grads.divergence, kinds)
    g_p, g_q = grads.logps_p, grads.logps_q
    if targets is not None:
        if "k3" in g:
            slope = k3_slope(_at_targets(lp, targets), _at_targets(lq, targets)).mul_(g["k3"])
            g_p, g_q = g_p - slope, g_q + slope
        g_p, g_q = g_p.masked_fill(targets < 0, 0.0), g_q.masked_fill(targets < 0, 0.0)
    view_p = _View(lp, p, g.get("kl"), g.get("reverse_kl"), grads.entropy_p, g_p)
    view_q = _View(lq, q, g.get("reverse_kl"), g.get("kl"), grads.entropy_q, g_q)
    shared = (g.get("js"), g.get("hellinger"), targets, careful)
    dz_p = _view_gradient(view_p, lp - lq, q, *shared) if wanted[0] else None
    dz_q = _view_gradient(view_q, lq - lp, p, *shared) if wanted[1] else None
    pairs = ((dz_p, z_p), (dz_q, z_q))
    return tuple(None if dz is None else transform_backward(dz, z, options, inplace=True) for dz, z in pairs)
