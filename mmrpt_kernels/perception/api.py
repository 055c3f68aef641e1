"""The public function: checks and dispatch. The mask is a custom operator, for its exact arithmetic on keep_ratio."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
import torch.distributed as dist

from mmrpt_kernels.backends import select
from mmrpt_kernels.common.checks import check, check_dtype, check_range, check_same_device, check_shape
from mmrpt_kernels.common.dtypes import FLOAT_DTYPES
from mmrpt_kernels.perception import portable, reference
from mmrpt_kernels.perception.shaping import trajectory_means, trajectory_weights

SCOPES = ("batch", "local")


class PerceptionWeights(NamedTuple):
    """Result of perception_weights."""

    perception_mask: torch.Tensor  # (B, T) bool: tokens that carry policy gradient, a subset of response_mask
    trajectory_weights: torch.Tensor  # (B,) float32 (float64 for float64 scores): scale of each trajectory's advantage


def perception_weights(
    scores: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    keep_ratio: float = 0.4,
    min_weight: float = 0.9,
    max_weight: float | None = None,
    scope: str = "batch",
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> PerceptionWeights:
    """Token mask and trajectory weights of VPPO (arXiv 2510.09285) from per-token visual dependency.

    Mask: per trajectory the ceil(keep_ratio * length) response tokens of highest score; among equals the earlier ones.
    Weights: with S_i the mean score of trajectory i's response tokens,

        max_weight None:  alpha_i = min_weight + (1 - min_weight) * (S_i - S_min) / (mean S - S_min)     mean alpha = 1
        otherwise:        alpha_i = min_weight + (max_weight - min_weight) * (S_i - S_min) / (S_max - S_min)

    and alpha = 1 for all when no S differs. A trajectory without response tokens, or with an infinite mean, has weight
    1 and is left out of the statistics.

    Args:
        scores: (B, T) float, B >= 1; read where response_mask is True only. -inf ranks last, +inf first.
        response_mask: (B, T) bool.
        keep_ratio: in (0, 1], read as the nearest fraction with a denominator up to a million, so that 0.4 of 5 is 2.
        min_weight: in [0, 1]. max_weight: at least min_weight, or None.
        scope: "batch": S_min, mean and S_max over all trajectories of all ranks of `group` (a collective: every rank
            must call), whatever the rank count. "local": over this call's trajectories.
        group: process group of scope "batch"; None: the default group where torch.distributed is initialised, else
            this process alone.
        backend: see mmrpt_kernels.backends.

    Nothing is differentiable. Raises:
        ValueError: shapes, dtypes, ranges; a NaN score inside the response (under torch.compile values cannot be
            examined: there a NaN ranks last, and its trajectory has weight 1).
    """
    _check(scores, response_mask, keep_ratio, min_weight, max_weight, scope, group)
    name = select("perception", device=scores.device, dtype=scores.dtype, requested=backend)
    scores = scores.detach()
    if scores.dtype != torch.float64:
        scores = scores.float()
    ranked = scores.masked_fill(torch.isnan(scores), -torch.inf)
    mask = _perception_mask(ranked, response_mask, keep_ratio, name)
    means = trajectory_means(scores, response_mask)
    distributed = scope == "batch" and dist.is_available() and dist.is_initialized()
    weights = trajectory_weights(means, min_weight, max_weight, distributed, group)
    return PerceptionWeights(mask, weights.to(scores.dtype))


@torch.library.custom_op("mmrpt_kernels::perception_mask", mutates_args=())
def _perception_mask(
    scores: torch.Tensor, response_mask: torch.Tensor, keep_ratio: float, backend: str
) -> torch.Tensor:
    chosen = reference if backend == "reference" else portable
    return chosen.perception_mask(scores, response_mask, *_as_fraction(keep_ratio))


@_perception_mask.register_fake
def _(scores, response_mask, keep_ratio, backend):
    return torch.empty_like(response_mask, memory_format=torch.contiguous_format)


def _as_fraction(ratio: float) -> tuple[int, int]:
    """The fraction that a ratio written in decimals means: 0.4 is 2/5, not 0.40000000000000002."""
    fraction = max(Fraction(ratio).limit_denominator(10**6), Fraction(1, 10**6))
    return fraction.numerator, fraction.denominator


def _check(scores, response_mask, keep_ratio, min_weight, max_weight, scope, group) -> None:
    check_shape("scores", scores, (None, None), "(B, T): one score per token")
    check(scores.shape[0] >= 1, "scores: got an empty batch, expected (B, T) with B >= 1; skip the call")
    check_dtype("scores", scores, FLOAT_DTYPES)
    check_shape("response_mask", response_mask, tuple(scores.shape), "(B, T): True on response tokens")
    check_dtype("response_mask", response_mask, (torch.bool,))
    check_same_device(scores=scores, response_mask=response_mask)
    check_range("keep_ratio", keep_ratio, 0.0, 1.0, low_open=True)
    check_range("min_weight", min_weight, 0.0, 1.0)
    if max_weight is not None:
        check_range("max_weight", max_weight, min_weight, None)
    check(scope in SCOPES, f"scope: got {scope!r}, expected one of {', '.join(SCOPES)}; choose one")
    check(
        group is None or scope == "batch",
        'group: got a process group with scope="local", expected None; pass scope="batch" to use the group',
    )
    if not torch.compiler.is_compiling():
        bad = int((torch.isnan(scores) & response_mask).sum())
        check(
            bad == 0,
            f"scores: got NaN at {bad} response tokens, expected numbers; look for inf in the logits of either view",
        )
