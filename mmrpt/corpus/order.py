"""Seeds and orders: which item a step visits depends on the seed and the step alone, so that a resumed run goes on."""

from __future__ import annotations

import zlib

import numpy as np


def seed_of(*parts: object) -> int:
    """A 32-bit seed of any names and numbers, the same in every process."""
    return zlib.crc32("/".join(str(part) for part in parts).encode())


def epoch_order(size: int, *seed: object) -> np.ndarray:
    """The order in which an epoch visits its items: a permutation that depends on the seed's parts alone."""
    return np.random.default_rng(seed_of(*seed)).permutation(size)


def items_at(first: int, count: int, size: int, *seed: object) -> list[int]:
    """Items `first` to `first + count` of an endless stream over `size` items, each epoch in its own order."""
    orders: dict[int, np.ndarray] = {}
    items = []
    for position in range(first, first + count):
        epoch, offset = divmod(position, size)
        if epoch not in orders:
            orders[epoch] = epoch_order(size, *seed, epoch)
        items.append(int(orders[epoch][offset]))
    return items
