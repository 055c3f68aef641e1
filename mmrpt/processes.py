"""Several processes on one job, without communication: which part is this one's, and files as locks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmrpt.settings import SettingsError


def part_of(shard: str | None) -> tuple[int, int]:
    """(i, n) of --shard i/n, else of torchrun's environment, else (0, 1)."""
    if shard is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise SettingsError(f"--shard is {shard!r}: expected i/n with 0 <= i < n, as 0/4 to 3/4.")
    return int(part), int(parts)


@contextmanager
def one_at_a_time(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Waits until no other process is inside; unless `wait`, raises BlockingIOError where one is."""
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
