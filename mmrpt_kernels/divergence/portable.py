"""linear_token_divergence in chunks of rows, any device; the backward pass recomputes the logits chunk by chunk.

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
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from mmrpt_kernels.common.head import (
    HeadOptions,
    chunk_rows,
    project,
    project_backward_hidden,
    project_backward_weight,
    statistics_dtype,
    transform_backward,
    transform_logits,
)

LOG_2 = math.log(2.0)
VIEWS = 2  # a chunk of rows holds the logits of both views


class Head(NamedTuple):
    """Both views' lm head."""

    weight_p: torch.Tensor  # (V, H)
    weight_q: torch.Tensor  # (V, H_q)
    bias: torch.Tensor | None  # (V,)
    options: HeadOptions


class RowGrads(NamedTuple):
    """Incoming gradients of n rows, in the statistics dtype."""

    divergence: torch.Tensor  # (n, K)
    logps_p: torch.Tensor | None  # (n,)
    logps_q: torch.Tensor | None  # (n,)
    entropy_p: torch.Tensor  # (n,)
    entropy_q: torch.Tensor  # (n,)


def has_empty_words(head: Head) -> bool:
    """Whether a word may have probability zero through a bias of -inf; then 0 * log 0 needs care (a pass more)."""
    return head.bias is not None and head.options.softcap == 0.0 and not bool(torch.isfinite(head.bias).all())


def softmax_rows(rows, weight, head: Head):
    """log p, p and, where a soft cap's slope needs them, the transformed logits; each (n, V), None otherwise.

    Written out because one exponential serves both results, and because `sum` adds in a tree: torch.log_softmax is 2 to
    4 times less accurate at V = 152k and, with the exponential after it, slower.
    """
    z = transform_logits(project(rows, weight, head.bias), head.options, inplace=True)
    kept = z.clone() if head.options.softcap > 0.0 else None
    top = z.amax(-1, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(-1, keepdim=True)
    return z.sub_(top.add_(total.log())), p.div_(total), kept


def _expectation(p, values, careful: bool):
    """sum_v p_v * values_v -> (n,); `careful` lets words of probability zero count for nothing (but keeps NaN)."""
    if careful:
        values = values.masked_fill(p == 0, 0.0)
    return torch.linalg.vecdot(p, values)


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


def k3(target_p, target_q):
    """exp(d) - d - 1, d = clamp(target_q - target_p, -20, 20), clamped to [0, 10]; (n,) -> (n,)."""
    d = (target_q - target_p).clamp_(-20.0, 20.0)
    return (torch.expm1(d) - d).clamp_(0.0, 10.0)


def _k3_slope(target_p, target_q):
    """d k3 / d target_q = - d k3 / d target_p; zero where a clamp holds."""
    d = target_q - target_p
    slope = torch.expm1(d.clamp(-20.0, 20.0))
    return slope.masked_fill_((d.abs() > 20.0) | (slope - d > 10.0), 0.0)


def forward(hidden_p, hidden_q, head: Head, targets, kinds, chunk_size):
    """divergence (N, K), logps_p, logps_q (N,) or (0,) without targets, entropy_p, entropy_q (N,)."""
    num_rows, vocab = hidden_p.shape[0], head.weight_p.shape[0]
    dtype = statistics_dtype(hidden_p, hidden_q, head.weight_p)
    careful = has_empty_words(head)
    divergence = hidden_p.new_empty(num_rows, len(kinds), dtype=dtype)
    with_targets = num_rows if targets is not None else 0
    logps_p, logps_q = (hidden_p.new_empty(with_targets, dtype=dtype) for _ in range(2))
    entropy_p, entropy_q = (hidden_p.new_empty(num_rows, dtype=dtype) for _ in range(2))
    step = chunk_rows(num_rows, VIEWS * vocab, chunk_size, dtype)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        lp, p, _ = softmax_rows(hidden_p[rows], head.weight_p, head)
        lq, q, _ = softmax_rows(hidden_q[rows], head.weight_q, head)
        entropy_p[rows] = _expectation(p, lp, careful).neg_().clamp_min_(0.0)
        entropy_q[rows] = _expectation(q, lq, careful).neg_().clamp_min_(0.0)
        if targets is not None:
            logps_p[rows], logps_q[rows] = _at_targets(lp, targets[rows]), _at_targets(lq, targets[rows])
        difference = lp.sub_(lq)
        for column, kind in enumerate(kinds):
            if kind == "k3":
                divergence[rows, column] = k3(logps_p[rows], logps_q[rows])
            else:
                divergence[rows, column] = _column(kind, p, q, difference, careful)
    return divergence, logps_p, logps_q, entropy_p, entropy_q


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


def _chunk_gradients(lp, p, lq, q, grads: RowGrads, targets, kinds, wanted, careful):
    """d loss / d z_p, d loss / d z_q (n, V) of a chunk, None for a view that is not `wanted`."""
    g = {}
    for column, kind in enumerate(kinds):
        g[kind] = g[kind] + grads.divergence[:, column] if kind in g else grads.divergence[:, column]
    g_p, g_q = grads.logps_p, grads.logps_q
    if targets is not None:
        if "k3" in g:
            slope = _k3_slope(_at_targets(lp, targets), _at_targets(lq, targets)).mul_(g["k3"])
            g_p, g_q = g_p - slope, g_q + slope
        g_p, g_q = g_p.masked_fill(targets < 0, 0.0), g_q.masked_fill(targets < 0, 0.0)
    view_p = _View(lp, p, g.get("kl"), g.get("reverse_kl"), grads.entropy_p, g_p)
    view_q = _View(lq, q, g.get("reverse_kl"), g.get("kl"), grads.entropy_q, g_q)
    shared = (g.get("js"), g.get("hellinger"), targets, careful)
    return (
        _view_gradient(view_p, lp - lq, q, *shared) if wanted[0] else None,
        _view_gradient(view_q, lq - lp, p, *shared) if wanted[1] else None,
    )


class _Accumulators(NamedTuple):
    """Gradients under way; None where not needed."""

    hidden_p: torch.Tensor | None
    hidden_q: torch.Tensor | None
    weight: torch.Tensor | None
    weight_q: torch.Tensor | None
    bias: torch.Tensor | None


def active_rows(grads: RowGrads) -> torch.Tensor:
    """Indices (n,) of the rows with a gradient other than exactly zero; others cost nothing and spread no NaN."""
    active = (grads.divergence != 0).any(-1) | (grads.entropy_p != 0) | (grads.entropy_q != 0)
    if grads.logps_p is not None:
        active |= (grads.logps_p != 0) | (grads.logps_q != 0)
    return active.nonzero()[:, 0]


def backward(grads: RowGrads, hidden_p, hidden_q, head: Head, shared_weight, targets, kinds, chunk_size, needs):
    """Gradients of (hidden_p, hidden_q, weight, weight_q, bias) in the statistics dtype, None where not needed.

    Args:
        shared_weight: both views use one weight, whose gradient is then the sum over the views.
        needs: five booleans in that order.
    """
    vocab, dtype = head.weight_p.shape[0], statistics_dtype(hidden_p, hidden_q, head.weight_p)
    sources = (hidden_p, hidden_q, head.weight_p, head.weight_q, head.bias)
    out = _Accumulators(
        *(t.new_zeros(t.shape, dtype=dtype) if need else None for t, need in zip(sources, needs, strict=True))
    )
    into_q = out.weight if shared_weight else out.weight_q
    wanted = (
        out.hidden_p is not None or out.weight is not None or out.bias is not None,
        out.hidden_q is not None or into_q is not None or out.bias is not None,
    )
    careful = has_empty_words(head)
    active = active_rows(grads)
    step = chunk_rows(active.numel(), VIEWS * vocab, chunk_size, dtype)
    for rows in active.split(step) if active.numel() else ():
        some = RowGrads(*(None if t is None else t[rows] for t in grads))
        hp, hq = hidden_p[rows], hidden_q[rows]
        lp, p, z_p = softmax_rows(hp, head.weight_p, head)
        lq, q, z_q = softmax_rows(hq, head.weight_q, head)
        chosen = None if targets is None else targets[rows]
        dz_p, dz_q = _chunk_gradients(lp, p, lq, q, some, chosen, kinds, wanted, careful)
        _spread(dz_p, z_p, hp, rows, head.weight_p, head.options, out.hidden_p, out.weight, out.bias)
        _spread(dz_q, z_q, hq, rows, head.weight_q, head.options, out.hidden_q, into_q, out.bias)
    return out


def _spread(dz, z, hidden_rows, rows, weight, options, into_hidden, into_weight, into_bias):
    """Carry d loss / d z (n, V) of one view to its hidden rows, its weight and the bias."""
    if dz is None:
        return
    d_raw = transform_backward(dz, z, options, inplace=True)
    if into_hidden is not None:
        into_hidden[rows] = project_backward_hidden(d_raw, weight)
    if into_weight is not None:
        project_backward_weight(d_raw, hidden_rows, into_weight)
    if into_bias is not None:
        into_bias += d_raw.sum(0)
