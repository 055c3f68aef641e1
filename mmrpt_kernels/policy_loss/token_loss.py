"""The caller's function of `linear_token_loss`, as the chunk loop takes it: checked, and with its derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmrpt_kernels.common import checks

TokenLoss = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]


class DifferentiatedTokenLoss:
    """losses (n,), d loss / d logps (n,) and d loss / d entropy (n,) or None of a user's function, by autograd.

    A row-local function's derivative is each row's own.
    """

    def __init__(self, token_loss: TokenLoss, use_entropy: bool, differentiate: bool) -> None:
        self.token_loss, self.use_entropy, self.differentiate = token_loss, use_entropy, differentiate
        self.first = True  # captured tensors are looked for in the first chunk only

    def __call__(self, logps: torch.Tensor, entropy: torch.Tensor | None, rows: torch.Tensor):
        entropy = entropy if self.use_entropy else None
        if not self.differentiate:
            return self.losses(logps, entropy, rows), torch.zeros_like(logps), None
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (logps, entropy) if t is not None]
            losses = self.losses(*leaves, *(() if self.use_entropy else (None,)), rows)
            self.check_captured(losses, leaves)
            if not losses.requires_grad:
                return losses, torch.zeros_like(logps), None
            d_logps, *d_entropy = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        d_logps = torch.zeros_like(logps) if d_logps is None else d_logps
        return losses.detach(), d_logps, d_entropy[0] if d_entropy else None

    def losses(self, logps: torch.Tensor, entropy: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """What the user's function gives (n,), its shape checked."""
        losses = self.token_loss(logps, entropy, rows)
        check_losses(losses, logps)
        return losses

    def check_captured(self, losses: torch.Tensor, leaves: list[torch.Tensor]) -> None:
        """Raise ValueError where the losses depend on a tensor besides `leaves` that requires a gradient."""
        if self.first:
            self.first = False
            checks.check(
                not reaches_other_leaf(losses.grad_fn, {id(leaf) for leaf in leaves}),
                "token_loss: its result depends on a captured tensor that requires a gradient, which would get none "
                "here; detach that tensor, or use linear_logprobs and plain autograd",
            )


def check_losses(losses: torch.Tensor, logps: torch.Tensor) -> None:
    """Raise ValueError unless there is one loss a row."""
    checks.check(
        isinstance(losses, torch.Tensor) and losses.shape == logps.shape,
        f"token_loss: got {tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__}, "
        f"expected a tensor {tuple(logps.shape)}, one loss per row; return the losses without summing them",
    )


def reaches_other_leaf(node, own: set[int]) -> bool:
    """Whether the graph above `node` ends in a leaf that is not one of `own`."""
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
