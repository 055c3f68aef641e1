"""`linear_policy_loss` and `linear_token_loss` over the stream of chunks and the row kernels of any backend.

The gradients of hidden, weight and bias are made in the forward pass, while a chunk's logits exist; the backward
multiplies them by the incoming number. Three matrix products instead of a recomputing head's four.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmrpt_kernels.common.autocast import cast_to, dtypes_of, without_autocast
from mmrpt_kernels.common.head import HeadOptions, statistics_dtype
from mmrpt_kernels.common.shards import find_shard
from mmrpt_kernels.logprobs.gradients import Head
from mmrpt_kernels.logprobs.places import choose, split
from mmrpt_kernels.logprobs.stream import check_targets
from mmrpt_kernels.policy_loss.hand_out import hand_out
from mmrpt_kernels.policy_loss.options import PolicyOptions, PolicyTokens
from mmrpt_kernels.policy_loss.surrogate import learning_rows, policy_rows, token_losses
from mmrpt_kernels.policy_loss.visits import LossStream, learn_by_sequence

__all__ = ["PolicyLossFunction", "linear_policy_loss", "linear_token_loss"]


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
    surrogate: str,
    see_all: bool,
    need: list[bool],
    chunk_size: int | None,
    most: int,
    rows: str,
    skip_below: float,
    vocab_group: str | None = None,
    cast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, logps (B, T), entropy (B, T), and d hidden, d weight, d bias of the loss, in their tensors' dtypes but
    float16's in float32; empty where not needed.

    Args:
        hidden: (B, T, H). weight: (V, H). The other tensors (B, T), targets int64, response and perception bool.
        loss_weights: (B, T) what a token's loss is multiplied by in the aggregate.
        see_all: also give logps and entropy of response tokens that cannot learn.
        need: whether hidden, weight, bias want a gradient.
        most: how many tokens learn at most (`places.most_places`); where they are counted, a call waits for the device
            once (twice for sequence ratios).
        rows: whose row kernels, a registered name.
        skip_below: as `logprobs.columns.leave_out`.
        vocab_group: name of the process group over which the vocabulary is cut; weight and bias are this rank's part,
            d hidden the sum over ranks.
        cast: what autocast casts hidden, weight and bias to, in here alone; None: nothing.
    """
    dtypes = dtypes_of(hidden, weight, bias)
    hidden, weight, bias = cast_to(cast, hidden, weight, bias)
    shape = targets.shape
    tokens = PolicyTokens(response, perception, advantages, old_logps, ref_logps, sampler_weights)
    tokens = PolicyTokens(*(None if t is None else t.reshape(-1) for t in tokens))
    options = PolicyOptions(
        kl_coef,
        kl_estimator,
        clip_low,
        clip_high,
        dual_clip,
        entropy_coef,
        entropy_scope,
        entropy_kind,
        ratio_level,
        surrogate,
    )
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    entropy_learns = entropy_coef != 0.0 and entropy_kind == "exact"
    head_options = HeadOptions(temperature, softcap, logit_scale)
    shard = None
    if vocab_group is not None:
        alike = (chunk_size, most, skip_below, need, see_all, head_options, options)
        shard = find_shard(vocab_group, flat, weight, ids, _work(tokens), alike)
    head = Head(weight, bias, head_options, shard)
    how = {"entropy_learns": entropy_learns, "chunk_size": chunk_size, "rows": rows, "skip_below": skip_below}
    stream = LossStream(flat, head, ids, need=need, dtypes=dtypes, **how)
    with torch.no_grad():
        _visit_all(stream, tokens, options, tuple(shape), loss_weights.reshape(-1), see_all, most)
    grads = stream.gradients.result()
    d_hidden = grads[0] if grads[0] is None else grads[0].view(hidden.shape)
    filled = tuple(hidden.new_empty(0) if grad is None else grad for grad in (d_hidden, *grads[1:]))
    return stream.losses.sum(), stream.logps.view(shape), stream.entropy.view(shape), *filled


def _visit_all(stream: LossStream, tokens, options: PolicyOptions, shape, scale, see_all: bool, most: int) -> None:
    """Every visit that the loss and its statistics need; scale (N,)."""
    by_sequence = options.ratio_level == "sequence" and tokens.old_logps is not None
    want_entropy = see_all or stream.entropy_learns
    learns = learning_rows(tokens, options)
    others = _other_rows(tokens, learns, shape, see_all, by_sequence)
    places, watched = split(learns, others, most)
    for some in (places, watched):
        check_targets(stream.targets, some, stream.head.vocab)
    if see_all or by_sequence:  # else there are no others
        stream.visit(watched, see_all)
    learns = None if places.counts is None else learns
    if by_sequence:
        learn_by_sequence(stream, tokens, options, places, want_entropy, shape, scale, learns)
        return

    def token_loss(logps, entropy, taken):
        return token_losses(logps, entropy, tokens.at(taken), options)

    stream.learn(places, want_entropy, token_loss, scale, learns)


def _work(tokens: PolicyTokens) -> torch.Tensor:
    """(N,) int64: all that decides, with the settings, which visits a token takes part in."""
    return tokens.response + 2 * tokens.perception + 4 * policy_rows(tokens)


def _other_rows(tokens, learns, shape, see_all: bool, by_sequence: bool) -> torch.Tensor:
    """(N,) bool: rows whose statistics are wanted though they cannot learn."""
    if see_all:
        return tokens.response & ~learns
    if by_sequence:  # log-probs of the sequences that have a policy term
        involved = policy_rows(tokens).view(shape).any(1, keepdim=True).expand(shape).reshape(-1)
        return tokens.response & involved & ~learns
    return torch.zeros_like(learns)


@linear_policy_loss.register_fake
def _(hidden, weight, bias, targets, *tensors, need, **options):
    dtype = statistics_dtype(hidden, weight, bias)
    statistics = [hidden.new_empty(shape, dtype=dtype) for shape in ((), targets.shape, targets.shape)]

    def grad(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
        return torch.empty_like(tensor, dtype=wide, memory_format=torch.contiguous_format)

    needed = zip((hidden, weight, bias), need, strict=True)
    return *statistics, *(grad(tensor) if wanted else hidden.new_empty(0) for tensor, wanted in needed)


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*output[3:])
    ctx.need = keyword_only_inputs["need"]
    ctx.dtypes = dtypes_of(*inputs[:3])
    ctx.num_tensors = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_loss, *_constants):
    """What compilers trace: nothing overwritten, they plan the memory. The public function detaches other outputs."""
    none = (None,) * ctx.num_tensors
    if d_loss is None:
        return none
    grads = zip(ctx.saved_tensors, ctx.need, ctx.dtypes, strict=True)
    factor = d_loss.reshape(1)  # not 0-d: see hand_out.as_factor
    return *((grad * factor).to(dtype) if needed else None for grad, needed, dtype in grads), *none[3:]


linear_policy_loss.register_autograd(_backward, setup_context=_setup_context)


class PolicyLossFunction(torch.autograd.Function):
    """The eager route of `linear_policy_loss`: the operator's gradients, kept where they can be scaled in place."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, constants: tuple, options: dict):
        loss, logps, entropy, *grads = linear_policy_loss(hidden, weight, bias, *constants, **options)
        needed = zip(grads, options["need"], strict=True)
        ctx.save_for_backward(*(grad if need else None for grad, need in needed))
        ctx.handed_out, ctx.dtypes = False, dtypes_of(hidden, weight, bias)
        ctx.mark_non_differentiable(logps, entropy)
        return loss, logps, entropy

    @staticmethod
    def backward(ctx, d_loss, *_constants):
        return *hand_out(ctx, d_loss), None, None


class _TokenLoss(torch.autograd.Function):
    """The eager route of `linear_token_loss`: a Python callable cannot pass through a custom operator's schema."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, active, token_loss, options, want_entropy, need, most, how, group, cast
    ):
        ctx.handed_out, ctx.dtypes = False, dtypes_of(hidden, weight, bias)
        hidden, weight, bias = cast_to(cast, hidden, weight, bias)
        shard = None
        if group is not None:
            alike = (most, how, need, want_entropy, options)
            shard = find_shard(group, hidden, weight, targets, active, alike)
        head = Head(weight, bias, options, shard)
        how = how | {"need": need, "dtypes": ctx.dtypes}
        stream = LossStream(hidden, head, targets, entropy_learns=want_entropy, **how)
        places = choose(active, most)
        check_targets(targets, places, head.vocab)
        with torch.autocast(hidden.device.type, enabled=False):
            stream.learn(places, want_entropy, token_loss, None, None if places.counts is None else active)
        grads = stream.gradients.result()
        ctx.save_for_backward(*grads)
        return stream.losses.sum()

    @staticmethod
    def backward(ctx, d_loss):
        return *hand_out(ctx, d_loss), *(None,) * 10


def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    options: HeadOptions,
    active: torch.Tensor,
    token_loss: Callable,
    want_entropy: bool,
    *,
    most: int,
    chunk_size: int | None,
    kernels: str,
    skip_below: float,
    vocab_group: str | None,
    cast: torch.dtype | None,
) -> torch.Tensor:
    """Sum of token_loss over active (N,) bool, called once a chunk; hidden (N, H), targets (N,).

    most: how many tokens are active at most (`places.most_places`). kernels: whose row kernels. vocab_group: name of
    the process group over which the vocabulary is cut, or None. cast: as in `linear_policy_loss`.
    """
    grad = torch.is_grad_enabled()
    need = tuple(grad and t is not None and t.requires_grad for t in (hidden, weight, bias))
    how = {"chunk_size": chunk_size, "rows": kernels, "skip_below": skip_below}
    how_and_where = (token_loss, options, want_entropy, need, most, how, vocab_group, cast)
    return _TokenLoss.apply(hidden, weight, bias, targets, active, *how_and_where)
