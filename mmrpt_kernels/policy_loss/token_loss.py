"""The caller's function of `linear_token_loss`, its results looked at."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmrpt_kernels.common import checks

__all__ = ["Checked", "TokenLoss", "check_losses"]

TokenLoss = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]


class Checked:
    """The caller's function, its results looked at; the search for captured tensors runs on the first chunk only."""

    def __init__(self, token_loss: TokenLoss, use_entropy: bool) -> None:
        self.token_loss, self.use_entropy, self.first = token_loss, use_entropy, True

    def __call__(self, logps: torch.Tensor, entropy: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        losses = self.token_loss(logps, entropy if self.use_entropy else None, rows)
        check_losses(losses, logps)
        if self.first and logps.is_leaf:
            self.first = False
            own = {id(t) for t in (logps, entropy) if t is not None}
            checks.check(
                not reaches_other_leaf(losses.grad_fn, own),
                "token_loss: its result depends on a captured tensor that requires a gradient, which would get none "
                "here; detach that tensor, or use linear_logprobs and plain autograd",
            )
        return losses


def check_losses(losses: torch.Tensor, logps: torch.Tensor) -> None:
    checks.check(
        isinstance(losses, torch.Tensor) and losses.shape == logps.shape,
        f"token_loss: got {tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__}, "
        f"expected a tensor {tuple(logps.shape)}, one loss per row; return the losses without summing them",
    )


def reaches_other_leaf(node, own: set[int]) -> bool:
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
