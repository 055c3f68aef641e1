"""Random draws that are the same in every process and on every platform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 128


class Draws:
    """A stream of choices named by a tuple of non-negative integers, such as (seed, split, index).

    PCG64 seeded through SeedSequence gives the same doubles everywhere; each choice is made from one double by
    arithmetic that IEEE fixes, unlike Generator.choice, whose method numpy may change.
    """

    def __init__(self, *name: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(name)))
        self._block: list[float] = []

    def uniform(self) -> float:
        """A double in [0, 1)."""
        if not self._block:
            self._block = self._generator.random(_BLOCK).tolist()
        return self._block.pop()

    def below(self, stop: int) -> int:
        """An integer in [0, stop)."""
        return int(self.uniform() * stop)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.uniform() * len(options))]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, with probability in proportion to its weight."""
        left = self.uniform() * sum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return max(i for i, weight in enumerate(weights) if weight > 0)  # rounding at the very end

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in random order."""
        pool = list(options)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]
