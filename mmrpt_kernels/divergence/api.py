"""The public function `linear_token_divergence`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from mmrpt_kernels.common.autocast import autocast_dtype, cast_to
from mmrpt_kernels.common.checks import check, check_dtype, check_reverse_mode, check_same_device, check_shape
from mmrpt_kernels.common.dtypes import FLOAT_DTYPES, statistics_dtype
from mmrpt_kernels.divergence import operator, reference
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions, check_head, check_word_ids, select_backend
from mmrpt_kernels.lm_head.vocab_parallel import group_name, local_head

KINDS = ("kl", "reverse_kl", "js", "k3")


class TokenDivergence(NamedTuple):
    """Result of linear_token_divergence. All float32 (float64 for float64 inputs); log-probabilities in nats."""

    divergence: torch.Tensor  # (...) for one kind, (..., K) for a tuple of K kinds; >= 0
    logps_p: torch.Tensor | None  # (...), <= 0; None without targets; 0 where a target is negative (ignored)
    logps_q: torch.Tensor | None
    entropy_p: torch.Tensor  # (...), >= 0
    entropy_q: torch.Tensor


def linear_token_divergence(
    hidden_p: torch.Tensor,
    hidden_q: torch.Tensor,
    weight: torch.Tensor,
    *,
    targets: torch.Tensor | None = None,
    kind: str | tuple[str, ...] = "kl",
    weight_q: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> TokenDivergence:
    """Divergence between two views' next-token distributions, per token, without (N, V) logits in memory.

    With p = softmax(z_p), q = softmax(z_q), z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature:

        "kl"          KL(p || q) = sum p log(p / q)
        "reverse_kl"  KL(q || p)
        "js"          Jensen-Shannon divergence, in [0, log 2]
        "k3"          exp(d) - d - 1 with d = clamp(logq_t - logp_t, -20, 20), clamped to [0, 10], on targets t: an
                      estimate of KL(p || q) when the targets were sampled from the p view. VPPO scores perception with
                      p = the response given the image, q = given the perturbed image (arXiv 2510.09285 and its code).

    Args:
        hidden_p: (..., H) half, bfloat16, float32 or float64: the view that tokens were sampled from.
        hidden_q: (..., H) the other view, same leading shape; with `weight_q` its last dimension may differ.
        weight: (V, H) lm head of both views, or of p alone when `weight_q` is given. DTensors are gathered, or used in
            parts (docs/sharded_head.md).
        targets: (...) int64, needed for "k3"; negative entries are ignored: log-probabilities and k3 are 0 there.
        kind: one kind, or a tuple of kinds computed in one sweep, which adds a last dimension.
        weight_q: (V, H_q) another head for q, e.g. a reference model's.
        bias: (V,) added to both views' logits; -inf bans a word (0 log 0 counts as 0).
        temperature, softcap, logit_scale: head options, see mmrpt_kernels.lm_head.options.
        chunk_size: rows of logits held at once; default from a memory budget. Never changes results beyond rounding.
        backend: see mmrpt_kernels.backends.
        vocab_group: process group over which the vocabulary is cut: weight (V_r, H), weight_q (V_r, H_q) and bias
            (V_r,) are then this rank's words, ranks in word order, any V_r >= 1; targets stay ids of all words. All
            other arguments, and the incoming gradients, must be the same on all its ranks, which must all make the call
            and its backward. Results are then bit-identical on all ranks; gradients of heads and bias are this rank's
            part, those of hidden states the whole sums. Collectives, forward as backward: one a call, which waits for
            the device; one a chunk of n rows, of 10 n numbers; for js, which needs the whole softmax word by word, a
            second of 2 n. Backward besides: two for each hidden state that needs a gradient.

    Under autocast the inputs are cast inside, and their gradients come in their own dtypes, as in `linear_logprobs`.

    Equal logits have a divergence of exactly 0. Equal hidden states have it where the head's product gives equal rows
    equal bits, which BLAS does not promise: with logits (H + 1) eps sum |h w| apart, it is twice that at most.

    Gradients flow to hidden_p, hidden_q, weight, weight_q and bias from every output, once and in reverse (what asks
    for more raises). To hold the second view fixed pass hidden_q.detach() and weight_q=weight.detach(). Rows whose
    incoming gradients are all exactly zero cost no work in the backward pass and cannot spread NaN.

    Raises:
        ValueError: shapes, dtypes, devices, an unknown kind, "k3" without targets, targets outside the vocabulary (read
            on CPU tensors outside torch.compile only); on all ranks of vocab_group, where their tokens or options
            differ.
        BackendError: a backend was asked for that cannot serve the call.
    """
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    options = HeadOptions(float(temperature), float(softcap), float(logit_scale))
    views, heads = (hidden_p, hidden_q), (weight, weight_q)
    weight, weight_q, bias, vocab_group = _local_heads(views, heads, bias, targets, vocab_group)
    part = vocab_group is not None
    _check(hidden_p, hidden_q, weight, weight_q, bias, targets, kinds, options, chunk_size, part=part)
    cast, lead = autocast_dtype(hidden_p), hidden_p.shape[:-1]
    if statistics_dtype(hidden_p, hidden_q, weight, weight_q, bias) == torch.float64:  # of both views, then
        hidden_p, hidden_q = hidden_p.double(), hidden_q.double()
    name = select_backend("divergence", hidden_p, weight, bias, backend, vocab_group)
    flat_p, flat_q = hidden_p.reshape(-1, hidden_p.shape[-1]), hidden_q.reshape(-1, hidden_q.shape[-1])
    flat_targets = None if targets is None else targets.reshape(-1)
    if name == "reference":
        heads = cast_to(cast, flat_p, flat_q, weight, weight_q, bias)
        rows = reference.token_divergence(*heads, flat_targets, kinds, options)
    else:
        check_reverse_mode("linear_token_divergence", hidden_p, hidden_q, weight, weight_q, bias)
        loop = LoopOptions(name, chunk_size, vocab_group=group_name(vocab_group), cast=cast)
        tensors = (flat_p, flat_q, weight, weight_q, bias, flat_targets)
        rows = operator.linear_token_divergence(*tensors, ",".join(kinds), *options, *loop)
    divergence, logps_p, logps_q, entropy_p, entropy_q = rows
    divergence = divergence[:, 0].reshape(lead) if isinstance(kind, str) else divergence.reshape(*lead, len(kinds))
    if targets is None:
        logps_p = logps_q = None
    else:
        logps_p, logps_q = logps_p.reshape(lead), logps_q.reshape(lead)
    return TokenDivergence(divergence, logps_p, logps_q, entropy_p.reshape(lead), entropy_q.reshape(lead))


def _local_heads(views, heads, bias, targets, vocab_group):
    """`local_head` of both views: weight, weight_q and bias of this rank, and the group that cuts them, or None."""
    (hidden_p, hidden_q), (weight, weight_q) = views, heads
    weight, bias, found = local_head(hidden_p, targets, weight, bias, vocab_group)
    if weight_q is None:
        local_head(hidden_q, targets, weight, None, found)
        return weight, None, bias, found
    weight_q, _, group_q = local_head(hidden_q, targets, weight_q, None, found)
    check(
        (found is None) == (group_q is None),
        "weight_q: got a head cut over the vocabulary beside a whole weight, expected both or neither; cut weight in "
        "the same places, or pass weight_q.full_tensor()",
    )
    return weight, weight_q, bias, found


def _check(
    hidden_p, hidden_q, weight, weight_q, bias, targets, kinds, options, chunk_size, *, part: bool = False
) -> None:
    """The argument checks; `part`: heads and bias are one rank's words, and targets are checked when all are known."""
    check_head(hidden_p, weight, bias, targets, options, chunk_size, part=part)
    last = hidden_p.shape[-1] if weight_q is None else None
    check_shape("hidden_q", hidden_q, (*hidden_p.shape[:-1], last), "(..., H): as hidden_p, the second view")
    check_dtype("hidden_q", hidden_q, FLOAT_DTYPES)
    if weight_q is not None:
        check_shape("weight_q", weight_q, (weight.shape[0], hidden_q.shape[-1]), "(V, H_q): a head for hidden_q")
    for one in kinds:
        check(one in KINDS, f"kind: got {one!r}, expected one or a tuple of {', '.join(KINDS)}; choose from these")
    check(len(kinds) > 0, f"kind: got an empty tuple, expected at least one of {', '.join(KINDS)}; name one")
    check_same_device(hidden_p=hidden_p, hidden_q=hidden_q, weight_q=weight_q)
    check(
        targets is not None or "k3" not in kinds,
        'kind: got "k3" without targets, expected targets (...) int64; pass the sampled tokens',
    )
    if not part and not torch.compiler.is_compiling():
        check_word_ids(targets, weight.shape[0])
