"""A reward that asks for nothing, so that training has something to do where no answer is ever right."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any


def arbitrary(completions: Sequence[str], **_: Any) -> list[float]:
    """A number in [0, 1) of each completion's bytes. `scale=tiny` adds it: random weights earn no other reward."""
    return [zlib.crc32(completion.encode()) / 2**32 for completion in completions]
