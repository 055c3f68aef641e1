"""The buffer that gathers groups with signal until a step is full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmrpt.types import Group


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
