"""What a policy loss is made of: settings and per-token tensors, named once for the reference and the backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

KL_ESTIMATORS = ("k1", "k2", "k3")
ENTROPY_SCOPES = ("response", "kept")
ENTROPY_KINDS = ("exact", "sampled")
RATIO_LEVELS = ("token", "sequence")
SURROGATES = ("clip", "cispo")
AGGREGATIONS = ("token_mean", "sequence_mean", "sum")

# exp(80) = 5.5e34 still leaves float32 room for an advantage. Log-ratios above it count as 80, with gradient zero,
# instead of turning into inf and, in the backward, into 0 * inf = NaN.
MAX_LOG_RATIO = 80.0


class PolicyOptions(NamedTuple):
    """The settings of `linear_policy_loss` that are numbers and words; meanings and defaults stand there."""

    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    entropy_scope: str = "response"
    entropy_kind: str = "exact"
    ratio_level: str = "token"
    surrogate: str = "clip"

    @property
    def entropy_learns(self) -> bool:
        """Whether the loss depends on exact entropies."""
        return self.entropy_coef != 0.0 and self.entropy_kind == "exact"


class PolicyTokens(NamedTuple):
    """Per-token tensors, all of one shape ((B, T), or (n,) for rows taken out of it); constants, never differentiated.

    response and perception are bool and hold only tokens with a valid target; advantages are already scaled by their
    trajectory's weight. None where the caller gave nothing.
    """

    response: torch.Tensor
    perception: torch.Tensor
    advantages: torch.Tensor
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    sampler_weights: torch.Tensor | None

    def at(self, rows: torch.Tensor) -> PolicyTokens:
        """The entries at flat indices `rows` (n,)."""
        return PolicyTokens(*(None if t is None else t.reshape(-1)[rows] for t in self))

    def flat(self) -> PolicyTokens:
        """(N,) each, N = B * T."""
        return PolicyTokens(*(None if t is None else t.reshape(-1) for t in self))
