"""The public function `linear_token_loss`: bring your own objective."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmrpt_kernels import backends
from mmrpt_kernels.common import checks
from mmrpt_kernels.common.autocast import cast_for_autocast
from mmrpt_kernels.common.head import HeadOptions, check_head
from mmrpt_kernels.logprobs import linear_logprobs
from mmrpt_kernels.policy_loss import portable, reference

__all__ = ["linear_token_loss"]

TokenLoss = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]


def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: TokenLoss,
    *,
    active_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    use_entropy: bool = True,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum over tokens of any loss of (log-prob, entropy), fused with the lm head: no (N, V) logits.

        loss = sum_i token_loss(logp_i, entropy_i, i)

    `token_loss(logps (n,), entropy (n,), rows (n,) int64) -> (n,)` is called once a chunk with rows, the tokens' flat
    indices into targets, by which it finds its own per-token tensors. It must be row-local (entry i depends on row i
    alone) and differentiable by autograd. Example, a focal cross-entropy:

        linear_token_loss(hidden, weight, targets, lambda logps, entropy, rows: -(1 - logps.exp()) ** 2 * logps)

    The gradients are made in this call, one visit of each logit; `backward` scales them and can run once per call.
    Under torch.compile, where a Python callable cannot enter an operator, the same sum is built as `linear_logprobs`
    followed by token_loss over all rows at once: one matrix product more, no graph break.

    Args:
        hidden: (..., H). weight: (V, H). bias: (V,) or None. These three get gradients; a tensor captured by
            token_loss that requires a gradient is refused, as it would get none.
        targets: (...) int64; rows of `ignore_index` are left out.
        active_mask: (...) bool; rows outside are not computed. None: all rows.
        temperature, softcap, logit_scale, chunk_size, backend: as in `linear_logprobs`.
        use_entropy: False: token_loss gets None for the entropy, which is then not computed.

    Returns:
        Scalar, float32 (float64 for float64 inputs), differentiable in hidden, weight and bias.

    Raises:
        ValueError: arguments that cannot be meant; a token_loss that gives another shape than (n,) or whose result
            depends on a foreign tensor that requires a gradient.
        BackendError: `backend` cannot serve the call.
    """
    options = HeadOptions(float(temperature), float(softcap), float(logit_scale))
    check_head(hidden, weight, bias, options, chunk_size)
    checks.check_shape("targets", targets, tuple(hidden.shape[:-1]), "(...): one token id per row of hidden")
    checks.check_dtype("targets", targets, (torch.int64,))
    if active_mask is not None:
        checks.check_shape("active_mask", active_mask, tuple(targets.shape), "(...): one bool per token")
        checks.check_dtype("active_mask", active_mask, (torch.bool,))
    checks.check_same_device(hidden=hidden, targets=targets, active_mask=active_mask)
    name = backends.select("token_loss", device=hidden.device, dtype=hidden.dtype, requested=backend)
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    active = ids != ignore_index
    if active_mask is not None:
        active = active & active_mask.reshape(-1)
    if torch.compiler.is_compiling():
        ids = torch.where(active, ids, ignore_index)
        found = linear_logprobs(
            flat,
            weight,
            ids,
            bias=bias,
            **options._asdict(),
            ignore_index=ignore_index,
            return_entropy=use_entropy,
            chunk_size=chunk_size,
            backend=name,
        )
        losses = token_loss(found.logps, found.entropy, torch.arange(ids.shape[0], device=ids.device))
        _check_losses(losses, found.logps)
        return torch.where(active, losses, 0.0).sum()
    flat, weight, bias = cast_for_autocast(flat, weight, bias)
    checked = _Checked(token_loss, use_entropy)
    rows = active.nonzero().squeeze(-1)
    implementation = reference if name == "reference" else portable
    return implementation.linear_token_loss(flat, weight, ids, bias, options, rows, checked, use_entropy, chunk_size)


class _Checked:
    """The caller's function, its results looked at; the search for captured tensors runs on the first chunk only."""

    def __init__(self, token_loss: TokenLoss, use_entropy: bool) -> None:
        self.token_loss, self.use_entropy, self.first = token_loss, use_entropy, True

    def __call__(self, logps: torch.Tensor, entropy: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        losses = self.token_loss(logps, entropy if self.use_entropy else None, rows)
        _check_losses(losses, logps)
        if self.first and logps.is_leaf:
            self.first = False
            own = {id(t) for t in (logps, entropy) if t is not None}
            checks.check(
                not _reaches_other_leaf(losses.grad_fn, own),
                "token_loss: its result depends on a captured tensor that requires a gradient, which would get none "
                "here; detach that tensor, or use linear_logprobs and plain autograd",
            )
        return losses


def _check_losses(losses: torch.Tensor, logps: torch.Tensor) -> None:
    checks.check(
        isinstance(losses, torch.Tensor) and losses.shape == logps.shape,
        f"token_loss: got {tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__}, "
        f"expected a tensor {tuple(logps.shape)}, one loss per row; return the losses without summing them",
    )


def _reaches_other_leaf(node, own: set[int]) -> bool:
    """Whether the graph behind `node` ends in a leaf that is not one of `own`."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            return True
        waiting.extend(parent for parent, _ in node.next_functions)
    return False
