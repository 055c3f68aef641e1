"""A prompt's scored rollouts, and the buffer that gathers groups with signal until a step is full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """One prompt with its n rollouts, scored under the policy that sampled them. T is the group's longest response.

    Only groups with a signal are kept (`group_advantages`), so the advantages are never all zero.
    """

    sample_id: str
    example_id: str
    prompt: list[int]
    responses: list[list[int]]  # n rows of token ids
    logps: Tensor  # (n, T) float32, as sampled
    perception: Tensor  # (n, T) float32, 0 past a row's end
    rewards: Tensor  # (n,) float32
    advantages: Tensor  # (n,) float32
    ref_logps: Tensor | None = None  # (n, T) float32 of the reference model, where rl.kl_coef asks for it
    trainer_logps: Tensor | None = (
        None  # (n, T) float32 of a training forward pass, where rl.max_importance asks for it
    )

    @property
    def response_tokens(self) -> int:
        return sum(len(r) for r in self.responses)


@dataclass
class GroupBuffer:
    """First in, first out. What a step does not use waits for the next one; its old log-probabilities go with it."""

    groups: list[Group] = field(default_factory=list)

    def add(self, groups: list[Group]) -> None:
        self.groups.extend(groups)

    def take(self, count: int) -> list[Group]:
        taken, self.groups = self.groups[:count], self.groups[count:]
        return taken

    def __len__(self) -> int:
        return len(self.groups)

    def state(self) -> list[dict[str, Any]]:
        """Plain lists and tensors: what `torch.load(weights_only=True)` reads back."""
        return [dict(vars(group)) for group in self.groups]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]], device: torch.device | str = "cpu") -> GroupBuffer:
        def placed(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return cls([Group(**{name: placed(value) for name, value in entry.items()}) for entry in state])


def stack_rows(groups: list[Group], name: str) -> Tensor:
    """(R, T) of a per-token field, zero-padded to the longest response of all groups."""
    width = max(getattr(group, name).shape[1] for group in groups)
    return torch.cat(
        [torch.nn.functional.pad(getattr(g, name), (0, width - getattr(g, name).shape[1])) for g in groups]
    )
