"""`linear_policy_loss` and `linear_token_loss` over the chunk loop: loss and gradients in one pass.

The gradients of hidden, weight and bias are made in the forward pass, while a chunk's logits exist; the backward
multiplies them by the incoming number. Three matrix products instead of a recomputing head's four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from mmrpt_kernels.common.autocast import cast_to, dtypes_of, without_autocast
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.chunk_loop import TokenValues, softmax_loop
from mmrpt_kernels.lm_head.head_gradients import HeadGradients
from mmrpt_kernels.lm_head.options import Head, HeadOptions, LoopOptions, build_head, check_targets
from mmrpt_kernels.lm_head.row_selection import RowSelection, select_rows, select_two
from mmrpt_kernels.lm_head.row_softmax import has_slope
from mmrpt_kernels.logprobs.fused import GivenSlopes
from mmrpt_kernels.policy_loss.scale_gradients import scale_saved_gradients
from mmrpt_kernels.policy_loss.surrogate import PolicyTokenLoss, sequence_log_ratio
from mmrpt_kernels.policy_loss.token_loss import DifferentiatedTokenLoss

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
Need = tuple[bool, bool, bool]


class LossAndGradients(NamedTuple):
    """What one pass gives: loss (scalar), logps and entropy (N,), 0 where not computed, and d hidden, d weight, d bias
    of the loss, None where not needed, in their tensors' dtypes, but float16's in float32."""

    loss: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor | None
    gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@without_autocast
def policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_loss: PolicyTokenLoss,
    see_all: bool,
    need: Need,
    options: HeadOptions,
    loop: LoopOptions,
) -> LossAndGradients:
    """The policy loss of a batch.

    Args:
        hidden: (B, T, H). weight: (V, H). bias: (V,) or None. targets: (B, T) int64.
        token_loss: its tensors (N,), N = B * T.
        see_all: also give log-probs and entropies of response tokens that cannot learn.
        need: whether hidden, weight and bias want a gradient.
    """
    shape, ids, policy = tuple(targets.shape), targets.reshape(-1), token_loss.options
    tokens, work = token_loss.tokens, (*token_loss.tokens[:2], token_loss.policy)
    tensors, same = (hidden.flatten(0, 1), weight, bias), (policy, see_all)
    flat, head, gradients = _prepare(tensors, need, options, loop, ids, work, same)
    by_sequence = policy.ratio_level == "sequence" and tokens.old_logps is not None
    entropy_learns = policy.entropy_learns
    values = TokenValues(ids, statistics_dtype(flat, head.weight, head.bias), see_all or entropy_learns, None)
    learning = token_loss.learning
    if see_all or by_sequence:
        others = tokens.response & ~learning
        if not see_all:  # the log-probs of the sequences that have a policy term
            others &= token_loss.policy.view(shape).any(1, keepdim=True).expand(shape).reshape(-1)
        learning, others = select_two(learning, others, loop.compact)
        check_targets(ids, others, head.vocab)
        softmax_loop(flat, head, values, others, loop)
    else:
        learning = select_rows(learning, loop.compact)
    check_targets(ids, learning, head.vocab)
    arguments = {"gradients": gradients, "entropy_learns": entropy_learns}
    if by_sequence:
        softmax_loop(flat, head, values, learning, loop)
        ratio = sequence_log_ratio(values.logps, tokens, shape)
        learning = _losses_of_all_rows(values, token_loss._replace(sequence_ratio=ratio), learning)
        if gradients.wanted():
            softmax_loop(flat, head, values, learning, loop, **arguments)
    else:
        values.loss = token_loss
        softmax_loop(flat, head, values, learning, loop, **arguments)
    (d_hidden,), d_weight, d_bias = gradients.result()
    d_hidden = None if d_hidden is None else d_hidden.view(hidden.shape)
    return LossAndGradients(values.losses.sum(), values.logps, values.entropy, (d_hidden, d_weight, d_bias))


def _losses_of_all_rows(values: TokenValues, token_loss: PolicyTokenLoss, learning: RowSelection) -> RowSelection:
    """Losses and slopes from log-probs that are all known, as ratios of whole sequences need it; gives the rows that
    got a slope, for a second loop: clipped sequences are left out of it."""
    rows = learning.rows
    losses, *slopes = token_loss(values.logps[rows], None if values.entropy is None else values.entropy[rows], rows)
    learning.scatter(losses, values.losses)
    slopes = [learning.masked(slope) for slope in slopes]
    values.loss = GivenSlopes(
        *(s if s is None else torch.zeros_like(values.losses).index_copy_(0, rows, s) for s in slopes)
    )
    return learning.narrowed(has_slope(tuple(slopes)))


def token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    active: torch.Tensor,
    token_loss: DifferentiatedTokenLoss,
    need: Need,
    options: HeadOptions,
    loop: LoopOptions,
) -> LossAndGradients:
    """Sum of token_loss over the rows of active (N,) bool; hidden (N, H), targets (N,) int64."""
    tensors, use_entropy = (hidden, weight, bias), token_loss.use_entropy
    hidden, head, gradients = _prepare(tensors, need, options, loop, targets, (active,), use_entropy)
    selection = select_rows(active, loop.compact)
    check_targets(targets, selection, head.vocab)
    values = TokenValues(targets, statistics_dtype(hidden, head.weight, head.bias), use_entropy, token_loss)
    with torch.autocast(hidden.device.type, enabled=False):
        softmax_loop(hidden, head, values, selection, loop, gradients=gradients, entropy_learns=use_entropy)
    (d_hidden,), d_weight, d_bias = gradients.result()
    return LossAndGradients(values.losses.sum(), values.logps, values.entropy, (d_hidden, d_weight, d_bias))


def _prepare(
    tensors: Tensors, need: Need, options: HeadOptions, loop: LoopOptions, targets: torch.Tensor, work: tuple, same
) -> tuple[torch.Tensor, Head, HeadGradients]:
    """hidden (N, H) as autocast would have it, the head, and where the gradients go; work, same: of `build_head`."""
    dtypes = tuple(torch.float32 if dtype == torch.float16 else dtype for dtype in dtypes_of(*tensors))
    hidden, weight, bias = cast_to(loop.cast, *tensors)
    head = build_head((hidden, weight, bias), options, loop, targets, work, (need, same))
    needs = ((need[0],), *need[1:])
    return hidden, head, HeadGradients((hidden,), head, need=needs, dtypes=dtypes, skip_below=loop.skip_below)


class FusedLoss(torch.autograd.Function):
    """The eager route of both losses: gradients are kept where they can be scaled in place."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, compute: Callable[..., LossAndGradients]):
        """compute: hidden, weight, bias -> LossAndGradients."""
        loss, logps, entropy, gradients = compute(hidden, weight, bias)
        ctx.save_for_backward(*gradients)
        ctx.scaled, ctx.dtypes = False, dtypes_of(hidden, weight, bias)
        ctx.mark_non_differentiable(*(t for t in (logps, entropy) if t is not None))
        return loss, logps, entropy

    @staticmethod
    def backward(ctx, d_loss, *_constants):
        return *scale_saved_gradients(ctx, d_loss), None
