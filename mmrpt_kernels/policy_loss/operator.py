"""`linear_policy_loss` and `linear_token_loss` over the stream of chunks and the row kernels of any backend.

The gradients of hidden, weight and bias are made in the forward pass, while a chunk's logits exist; the backward
multiplies them by the incoming number. Three matrix products instead of a recomputing head's four.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmrpt_kernels.common.autocast import without_autocast
from mmrpt_kernels.common.head import HeadOptions, statistics_dtype
from mmrpt_kernels.logprobs.rows import row_kernels
from mmrpt_kernels.logprobs.shards import find_shard
from mmrpt_kernels.logprobs.stream import Gradients, Head, check_targets, visit
from mmrpt_kernels.policy_loss.hand_out import hand_out
from mmrpt_kernels.policy_loss.options import PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import (
    differentiate,
    learning_rows,
    policy_rows,
    sequence_log_ratio,
    token_losses,
)

__all__ = ["PolicyLossFunction", "linear_policy_loss", "linear_token_loss"]


class _Stream:
    """One call's state: what every visit of the vocabulary shares, and what the visits fill in."""

    def __init__(
        self, hidden, head: Head, targets, *, need, entropy_learns: bool, chunk_size: int | None, rows: str
    ) -> None:
        """need: whether hidden, weight, bias want a gradient; entropy_learns: whether the loss depends on entropies;
        rows: whose row kernels."""
        self.kernels = row_kernels(rows)
        self.hidden, self.head, self.targets, self.chunk_size = hidden, head, targets, chunk_size
        self.dtype = statistics_dtype(hidden, head.weight, head.bias)
        self.entropy_learns = entropy_learns
        self.gradients = Gradients(hidden, head, need=tuple(need))
        self.losses = hidden.new_zeros(targets.shape, dtype=self.dtype)
        self.logps = hidden.new_zeros(targets.shape, dtype=self.dtype)
        self.entropy = hidden.new_zeros(targets.shape, dtype=self.dtype)

    def visit(self, rows: torch.Tensor, want_entropy: bool, coefficients=None, store: bool = True) -> None:
        """Visit `rows` (n,); with `store`, keep their statistics."""
        logps, entropy = visit(
            self.kernels,
            self.hidden,
            self.head,
            self.targets,
            rows,
            want_entropy=want_entropy,
            entropy_learns=self.entropy_learns,
            chunk_size=self.chunk_size,
            coefficients=coefficients,
            gradients=self.gradients,
        )
        if store:
            self.logps[rows] = logps
            if want_entropy:
                self.entropy[rows] = entropy

    def learn(self, rows: torch.Tensor, want_entropy: bool, token_loss: Callable, scale: torch.Tensor | None) -> None:
        """One visit of `rows`: losses and gradients of sum(scale * token_loss(logps, entropy, rows)).

        token_loss gives (n,) from (n,); scale (N,) or None. Only losses when no gradient is wanted.
        """

        def coefficients(logps, entropy, taken):
            factor = None if scale is None else scale[taken]
            losses, d_logps, d_entropy = self.evaluate(token_loss, logps, entropy, taken, factor)
            self.losses[taken] = losses.to(self.dtype)
            return d_logps, d_entropy

        self.visit(rows, want_entropy, coefficients)

    def evaluate(self, token_loss, logps, entropy, taken, factor):
        """factor * token_loss (n,), and its two coefficients per row when a gradient is wanted, else None, None."""

        def scaled(logps, entropy):
            losses = token_loss(logps, entropy, taken)
            return losses if factor is None else factor * losses

        if not self.gradients.wanted():
            return scaled(logps, entropy), None, None
        return differentiate(scaled, logps, entropy)


def _learn_by_sequence(
    stream: _Stream,
    tokens: PolicyTokens,
    options: PolicyOptions,
    rows: torch.Tensor,
    want_entropy: bool,
    shape: tuple[int, int],
    scale: torch.Tensor,
) -> None:
    """Sequence-level ratios need all log-probs of a response first: `stream` holds those outside `rows` already.

    First pass for log-probs, then the surrogate over all rows at once, then a second visit of the rows that got a
    coefficient: clipped sequences are not visited again.
    """
    stream.visit(rows, want_entropy)
    ratio = sequence_log_ratio(stream.logps, tokens, shape)[rows]
    at_rows = tokens.at(rows)

    def surrogate(logps, entropy, _taken):
        return token_losses(logps, entropy, at_rows, options, ratio)

    entropy = stream.entropy[rows] if want_entropy else None
    losses, d_logps, d_entropy = stream.evaluate(surrogate, stream.logps[rows], entropy, rows, scale[rows])
    stream.losses[rows] = losses
    if d_logps is None:  # no gradient is wanted
        return
    moving = d_logps != 0 if d_entropy is None else (d_logps != 0) | (d_entropy != 0)
    by_token = stream.losses.new_zeros(2, stream.losses.shape[0])
    by_token[0, rows] = d_logps
    if d_entropy is not None:
        by_token[1, rows] = d_entropy

    def known(_logps, _entropy, taken):
        return by_token[0, taken], None if d_entropy is None else by_token[1, taken]

    stream.visit(rows[moving], d_entropy is not None, known, store=False)


@torch.library.custom_op("mmrpt_kernels::linear_policy_loss", mutates_args=())
@without_autocast
def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    response: torch.Tensor,
    perception: torch.Tensor,
    advantages: torch.Tensor,
    old_logps: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    sampler_weights: torch.Tensor | None,
    loss_weights: torch.Tensor,
    *,
    temperature: float,
    softcap: float,
    logit_scale: float,
    kl_coef: float,
    kl_estimator: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    entropy_scope: str,
    entropy_kind: str,
    ratio_level: str,
    see_all: bool,
    need: list[bool],
    chunk_size: int | None,
    rows: str,
    vocab_group: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, logps (B, T), entropy (B, T), and d hidden, d weight, d bias of the loss, empty where not needed.

    Args:
        hidden: (B, T, H). weight: (V, H). The other tensors (B, T), targets int64, response and perception bool.
        loss_weights: (B, T) what a token's loss is multiplied by in the aggregate.
        see_all: also give logps and entropy of response tokens that cannot learn.
        need: whether hidden, weight, bias want a gradient.
        rows: whose row kernels, a registered name.
        vocab_group: name of the process group over which the vocabulary is cut; weight and bias are this rank's part,
            d hidden the sum over ranks.
    """
    shape = targets.shape
    tokens = PolicyTokens(response, perception, advantages, old_logps, ref_logps, sampler_weights)
    tokens = PolicyTokens(*(None if t is None else t.reshape(-1) for t in tokens))
    options = PolicyOptions(
        kl_coef, kl_estimator, clip_low, clip_high, dual_clip, entropy_coef, entropy_scope, entropy_kind, ratio_level
    )
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    entropy_learns = entropy_coef != 0.0 and entropy_kind == "exact"
    learns = learning_rows(tokens, options)
    learning, scale = learns.nonzero().squeeze(-1), loss_weights.reshape(-1)
    by_sequence = ratio_level == "sequence" and old_logps is not None
    others = _other_rows(tokens, learns, shape, see_all, by_sequence)
    visited = torch.cat([learning, others])
    head_options = HeadOptions(temperature, softcap, logit_scale)
    alike = (chunk_size, need, see_all, head_options, options)
    shard = find_shard(vocab_group, flat, weight, ids, visited, alike)
    head = Head(weight, bias, head_options, shard)
    check_targets(ids, visited, head.vocab)
    how = {"chunk_size": chunk_size, "rows": rows}
    stream = _Stream(flat, head, ids, need=need, entropy_learns=entropy_learns, **how)
    with torch.no_grad():
        stream.visit(others, see_all)
        want_entropy = see_all or entropy_learns
        if by_sequence:
            _learn_by_sequence(stream, tokens, options, learning, want_entropy, tuple(shape), scale)
        else:
            stream.learn(
                learning,
                want_entropy,
                lambda logps, entropy, taken: token_losses(logps, entropy, tokens.at(taken), options),
                scale,
            )
    grads = stream.gradients.result()
    d_hidden = grads[0] if grads[0] is None else grads[0].view(hidden.shape)
    filled = tuple(hidden.new_empty(0) if grad is None else grad for grad in (d_hidden, *grads[1:]))
    return stream.losses.sum(), stream.logps.view(shape), stream.entropy.view(shape), *filled


def _other_rows(tokens, learns, shape, see_all: bool, by_sequence: bool) -> torch.Tensor:
    """Rows (n,) whose statistics are wanted though they cannot learn."""
    if see_all:
        others = tokens.response & ~learns
    elif by_sequence:  # log-probs of the sequences that have a policy term
        involved = policy_rows(tokens).view(shape).any(1, keepdim=True).expand(shape).reshape(-1)
        others = tokens.response & involved & ~learns
    else:
        return learns.new_empty(0, dtype=torch.int64)
    return others.nonzero().squeeze(-1)


@linear_policy_loss.register_fake
def _(hidden, weight, bias, targets, *tensors, need, **options):
    dtype = statistics_dtype(hidden, weight, bias)
    statistics = [hidden.new_empty(shape, dtype=dtype) for shape in ((), targets.shape, targets.shape)]
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else hidden.new_empty(0)
        for tensor, wanted in zip((hidden, weight, bias), need, strict=True)
    ]
    return *statistics, *grads


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.need = keyword_only_inputs["need"]
    ctx.num_tensors = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_loss, *_constants):
    """What compilers trace: nothing overwritten, they plan the memory. The public function detaches other outputs."""
    none = (None,) * ctx.num_tensors
    if d_loss is None:
        return none
    grads = zip(ctx.saved_tensors, ctx.need, strict=True)
    return *(grad * d_loss.to(grad.dtype) if needed else None for grad, needed in grads), *none[3:]


linear_policy_loss.register_autograd(_backward, setup_context=_setup_context)


class PolicyLossFunction(torch.autograd.Function):
    """The eager route of `linear_policy_loss`: the operator's gradients, kept where they can be scaled in place."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, constants: tuple, options: dict):
        loss, logps, entropy, *grads = linear_policy_loss(hidden, weight, bias, *constants, **options)
        needed = zip(grads, options["need"], strict=True)
        ctx.save_for_backward(*(grad if need else None for grad, need in needed))
        ctx.handed_out = False
        ctx.mark_non_differentiable(logps, entropy)
        return loss, logps, entropy

    @staticmethod
    def backward(ctx, d_loss, *_constants):
        return *hand_out(ctx, d_loss), None, None


class _TokenLoss(torch.autograd.Function):
    """The eager route of `linear_token_loss`: a Python callable cannot pass through a custom operator's schema."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, token_loss, options, want_entropy, need, how, vocab_group):
        shard = find_shard(vocab_group, hidden, weight, targets, rows, (how["chunk_size"], need, want_entropy, options))
        head = Head(weight, bias, options, shard)
        check_targets(targets, rows, head.vocab)
        stream = _Stream(hidden, head, targets, need=need, entropy_learns=want_entropy, **how)
        with torch.autocast(hidden.device.type, enabled=False):
            stream.learn(rows, want_entropy, token_loss, None)
        grads = stream.gradients.result()
        ctx.save_for_backward(*grads)
        ctx.handed_out = False
        return stream.losses.sum()

    @staticmethod
    def backward(ctx, d_loss):
        return *hand_out(ctx, d_loss), *(None,) * 8


def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    options: HeadOptions,
    rows: torch.Tensor,
    token_loss: Callable,
    want_entropy: bool,
    *,
    chunk_size: int | None,
    kernels: str,
    vocab_group: str | None,
) -> torch.Tensor:
    """Sum of token_loss over `rows` (n,), called once a chunk; hidden (N, H), targets (N,); kernels: whose row kernels;
    vocab_group: name of the process group over which the vocabulary is cut, or None."""
    grad = torch.is_grad_enabled()
    need = tuple(grad and t is not None and t.requires_grad for t in (hidden, weight, bias))
    how = {"chunk_size": chunk_size, "rows": kernels}
    how_and_where = (token_loss, options, want_entropy, need, how, vocab_group)
    return _TokenLoss.apply(hidden, weight, bias, targets, rows, *how_and_where)
