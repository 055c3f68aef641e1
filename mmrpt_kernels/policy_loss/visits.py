"""The visits of the vocabulary that make a fused loss: which rows, in which order, with which coefficients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmrpt_kernels.common.head import statistics_dtype
from mmrpt_kernels.logprobs.gradients import Gradients, Head
from mmrpt_kernels.logprobs.places import Places, put
from mmrpt_kernels.logprobs.rows import Slopes, has_slope, row_kernels
from mmrpt_kernels.logprobs.stream import visit
from mmrpt_kernels.policy_loss.options import PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import differentiate, sequence_log_ratio, token_losses

__all__ = ["LossStream", "learn_by_sequence"]


class LossStream:
    """One call's state: what every visit of the vocabulary shares, and what the visits fill in.

    losses, logps, entropy: (N,).
    """

    def __init__(
        self,
        hidden,
        head: Head,
        targets,
        *,
        need,
        entropy_learns: bool,
        chunk_size: int | None,
        rows: str,
        skip_below: float = 0.0,
        dtypes: tuple[torch.dtype | None, ...] | None = None,
    ) -> None:
        """need: whether hidden, weight, bias want a gradient; entropy_learns: whether the loss depends on entropies;
        rows: whose row kernels; skip_below, dtypes: see `Gradients`."""
        self.hidden, self.head, self.targets, self.chunk_size = hidden, head, targets, chunk_size
        self.kernels = row_kernels(rows)
        self.dtype = statistics_dtype(hidden, head.weight, head.bias)
        self.entropy_learns = entropy_learns
        self.gradients = Gradients(
            hidden, head, need=tuple(need), skip_below=skip_below, before_loss_scale=True, dtypes=dtypes
        )
        self.losses = hidden.new_zeros(targets.shape, dtype=self.dtype)
        self.logps = hidden.new_zeros(targets.shape, dtype=self.dtype)
        self.entropy = hidden.new_zeros(targets.shape, dtype=self.dtype)

    def visit(self, places: Places, want_entropy: bool, coefficients=None, store: bool = True) -> None:
        """Visit `places`; with `store`, keep their statistics."""
        logps, entropy = visit(
            self.kernels,
            self.hidden,
            self.head,
            self.targets,
            places,
            want_entropy=want_entropy,
            entropy_learns=self.entropy_learns,
            chunk_size=self.chunk_size,
            coefficients=coefficients,
            gradients=self.gradients,
        )
        if store:
            put(self.logps, places, logps)
            if want_entropy:
                put(self.entropy, places, entropy)

    def learn(
        self, places: Places, want_entropy: bool, token_loss: Callable, scale: torch.Tensor | None, learns=None
    ) -> None:
        """One visit of `places`: losses and gradients of sum(scale * token_loss(logps, entropy, rows)).

        token_loss gives (n,) from (n,); scale (N,) or None. learns: (N,) bool, the tokens that learn; None: all of
        `places`. Only losses when no gradient is wanted.
        """

        def coefficients(logps, entropy, taken):
            factor = None if scale is None else scale[taken]
            counts = None if learns is None else learns[taken]
            losses, slopes = self.evaluate(token_loss, logps, entropy, taken, factor, counts)
            self.losses[taken] = losses.to(self.dtype)
            return slopes

        self.visit(places, want_entropy, coefficients)

    def evaluate(self, token_loss, logps, entropy, taken, factor, counts) -> tuple[torch.Tensor, Slopes]:
        """factor * token_loss (n,) and its two coefficients per row (None, None when no gradient is wanted).

        counts: (n,) bool, outside of which all are zero, whatever the loss made of those rows; None: everywhere.
        """

        def scaled(logps, entropy):
            losses = token_loss(logps, entropy, taken)
            return losses if factor is None else factor * losses

        if not self.gradients.wanted():
            losses, slopes = scaled(logps, entropy), (None, None)
        else:
            losses, *slopes = differentiate(scaled, logps, entropy)
        if counts is None:
            return losses, tuple(slopes)
        losses, *slopes = (None if t is None else torch.where(counts, t, 0.0) for t in (losses, *slopes))
        return losses, tuple(slopes)


def learn_by_sequence(
    stream: LossStream,
    tokens: PolicyTokens,
    options: PolicyOptions,
    places: Places,
    want_entropy: bool,
    shape: tuple[int, int],
    scale: torch.Tensor,
    learns: torch.Tensor | None = None,
) -> None:
    """Sequence-level ratios need all log-probs of a response first: `stream` holds those outside `places` already.

    First pass for log-probs, then the surrogate over all rows at once, then a second visit of the rows that got a
    coefficient: clipped sequences are not visited again. learns: as in `LossStream.learn`.
    """
    stream.visit(places, want_entropy)
    at = places.rows
    ratio = sequence_log_ratio(stream.logps, tokens, shape)[at]
    at_rows = tokens.at(at)

    def surrogate(logps, entropy, _taken):
        return token_losses(logps, entropy, at_rows, options, ratio)

    entropy = stream.entropy[at] if want_entropy else None
    losses, slopes = stream.evaluate(
        surrogate, stream.logps[at], entropy, at, scale[at], None if learns is None else learns[at]
    )
    stream.losses[at] = losses
    d_logps, d_entropy = slopes
    if d_logps is None:  # no gradient is wanted
        return
    by_token = [None if t is None else put(torch.zeros_like(stream.losses), places, t) for t in slopes]

    def known(_logps, _entropy, taken):
        return tuple(None if t is None else t[taken] for t in by_token)

    stream.visit(places.narrowed(has_slope(slopes)), d_entropy is not None, known, store=False)
