"""Launch settings of the attention kernels: tables by architecture, dtype and head size.

Where they come from: each row was chosen by compiling tiles ahead of time for its architecture and taking a large one
whose registers do not spill and whose shared memory fits (tests/kernels/attention/test_attention_triton_compile.py).
None has been timed on hardware yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "ARCHITECTURES",
    "L2_BYTES",
    "MAX_GROUPS",
    "MAX_GROUPS_ALONE",
    "MAX_GROUPS_DECODE",
    "PROGRAMS_WANTED",
    "ROW_TERMS",
    "SIZES",
    "Settings",
    "decode_settings",
    "forward_settings",
    "dkv_settings",
    "product_precision",
    "dq_settings",
]

# Groups of weights that one visit of the keys serves; each costs a float32 per row in registers. More fit where no sum
# of values stands beside them, or where a tile has few rows.
MAX_GROUPS, MAX_GROUPS_ALONE, MAX_GROUPS_DECODE = 4, 8, 16
# Keys and values of heads that run side by side. The L2 cache has 40 MB on A100, 50 on H100, 60 on H200.
L2_BYTES = 32 * 2**20

# The backward pass over keys spreads the query heads of a key head over programs until there are so many: an H100 has
# 132 multiprocessors.
PROGRAMS_WANTED = 256

ARCHITECTURES = (80, 90, 100)
SIZES = (64, 128, 256)  # the larger of D and Dv, up to the next of these


class Settings(NamedTuple):
    """One launch."""

    rows: int  # query rows of a tile
    keys: int  # keys of a tile
    warps: int
    stages: int  # depth of the load pipeline
    slice_d: int = 0  # of the head size that a product of the backward pass takes at a time; 0 = whole


# Small, so that a short test crosses many tile borders.
INTERPRETER = Settings(32, 32, 4, 1)

# What the backward pass needs of every row: rows alone, no products.
ROW_TERMS = Settings(32, 0, 8, 1)

# (architecture, bytes of an element, head size): (settings of a lean call, settings of a rich one); see `Problem.rich`.
# The forward pass.
FORWARD = {
    (80, 2, 64): (Settings(128, 64, 8, 3), Settings(64, 32, 8, 2)),
    (80, 2, 128): (Settings(128, 32, 8, 3), Settings(64, 32, 8, 2)),
    (80, 2, 256): (Settings(64, 32, 8, 2), Settings(32, 32, 8, 2)),
    (80, 4, 64): (Settings(64, 32, 8, 2), Settings(32, 32, 8, 2)),
    (80, 4, 128): (Settings(16, 32, 8, 2), Settings(16, 32, 8, 1)),
    (80, 4, 256): (Settings(32, 32, 8, 1), Settings(16, 16, 8, 1)),
    (90, 2, 64): (Settings(128, 128, 8, 3), Settings(128, 64, 8, 2)),
    (90, 2, 128): (Settings(128, 128, 8, 2), Settings(128, 64, 8, 2)),
    (90, 2, 256): (Settings(64, 64, 8, 2), Settings(64, 32, 8, 2)),
    (90, 4, 64): (Settings(64, 32, 8, 2), Settings(32, 32, 8, 2)),
    (90, 4, 128): (Settings(16, 32, 8, 2), Settings(16, 32, 8, 1)),
    (90, 4, 256): (Settings(16, 32, 8, 2), Settings(16, 32, 8, 2)),
    (100, 2, 64): (Settings(128, 128, 8, 2), Settings(64, 64, 8, 2)),
    (100, 2, 128): (Settings(128, 64, 8, 3), Settings(64, 64, 8, 2)),
    (100, 2, 256): (Settings(128, 32, 8, 2), Settings(64, 32, 8, 2)),
    (100, 4, 64): (Settings(64, 32, 8, 2), Settings(32, 32, 8, 2)),
    (100, 4, 128): (Settings(16, 32, 8, 2), Settings(16, 32, 8, 1)),
    (100, 4, 256): (Settings(32, 16, 8, 1), Settings(16, 32, 8, 2)),
}

# The backward pass over a block of keys: dk, dv, dw.
KEYS = {
    (80, 2, 64): (Settings(32, 64, 8, 1), Settings(32, 32, 8, 1)),
    (80, 2, 128): (Settings(64, 64, 8, 2), Settings(32, 32, 8, 1)),
    (80, 2, 256): (Settings(32, 32, 8, 2), Settings(16, 16, 8, 1)),
    (80, 4, 64): (Settings(32, 32, 8, 1), Settings(16, 16, 8, 1)),
    (80, 4, 128): (Settings(16, 16, 8, 1), Settings(16, 16, 8, 1)),
    (80, 4, 256): (Settings(16, 16, 8, 1, 32), Settings(16, 16, 8, 1)),
    (90, 2, 64): (Settings(64, 64, 8, 2), Settings(32, 64, 8, 1)),
    (90, 2, 128): (Settings(32, 64, 8, 2), Settings(16, 64, 8, 2)),
    (90, 2, 256): (Settings(16, 64, 8, 2), Settings(16, 32, 8, 1)),
    (90, 4, 64): (Settings(32, 32, 8, 1), Settings(16, 16, 8, 1)),
    (90, 4, 128): (Settings(16, 32, 8, 1, 32), Settings(16, 32, 8, 1, 32)),
    (90, 4, 256): (Settings(32, 16, 8, 1), Settings(16, 16, 8, 1)),
    (100, 2, 64): (Settings(64, 64, 8, 1), Settings(32, 64, 8, 1)),
    (100, 2, 128): (Settings(64, 64, 8, 1), Settings(32, 64, 8, 1)),
    (100, 2, 256): (Settings(32, 32, 8, 2), Settings(16, 32, 8, 1)),
    (100, 4, 64): (Settings(32, 32, 8, 1), Settings(16, 16, 8, 1)),
    (100, 4, 128): (Settings(16, 32, 8, 1, 32), Settings(16, 32, 8, 1, 32)),
    (100, 4, 256): (Settings(32, 32, 8, 1), Settings(16, 16, 8, 1)),
}

# The backward pass over a block of rows: dq.
ROWS = {
    (80, 2, 64): (Settings(128, 64, 8, 2), Settings(64, 64, 8, 2)),
    (80, 2, 128): (Settings(128, 32, 8, 2), Settings(64, 64, 8, 2)),
    (80, 2, 256): (Settings(64, 32, 8, 1), Settings(32, 32, 8, 2)),
    (80, 4, 64): (Settings(32, 16, 8, 2), Settings(16, 32, 8, 1)),
    (80, 4, 128): (Settings(32, 32, 8, 1, 16), Settings(16, 32, 8, 1, 32)),
    (80, 4, 256): (Settings(32, 32, 8, 1, 32), Settings(32, 32, 8, 1, 32)),
    (90, 2, 64): (Settings(128, 64, 8, 2), Settings(64, 64, 8, 2)),
    (90, 2, 128): (Settings(128, 64, 8, 2), Settings(64, 64, 8, 2)),
    (90, 2, 256): (Settings(64, 32, 8, 2), Settings(32, 32, 8, 2)),
    (90, 4, 64): (Settings(32, 16, 8, 2), Settings(16, 32, 8, 1)),
    (90, 4, 128): (Settings(32, 32, 8, 1, 32), Settings(16, 32, 8, 1, 32)),
    (90, 4, 256): (Settings(32, 32, 8, 1, 32), Settings(32, 32, 8, 1, 32)),
    (100, 2, 64): (Settings(128, 64, 8, 2), Settings(64, 32, 8, 2)),
    (100, 2, 128): (Settings(128, 64, 8, 2), Settings(64, 64, 8, 2)),
    (100, 2, 256): (Settings(64, 32, 8, 1), Settings(32, 32, 8, 2)),
    (100, 4, 64): (Settings(32, 16, 8, 2), Settings(16, 32, 8, 1)),
    (100, 4, 128): (Settings(32, 32, 8, 1, 32), Settings(16, 32, 8, 1, 32)),
    (100, 4, 256): (Settings(32, 32, 8, 1, 32), Settings(32, 32, 8, 1, 16)),
}


Table = dict[tuple[int, int, int], tuple[Settings, Settings]]


def _row(table: Table, architecture: int, dtype: torch.dtype, size: int, rich: bool) -> Settings:
    if architecture == 0:
        return INTERPRETER
    known = max((a for a in ARCHITECTURES if a <= architecture), default=ARCHITECTURES[0])
    return table[known, dtype.itemsize, next(s for s in SIZES if size <= s)][rich]


def forward_settings(architecture: int, dtype: torch.dtype, size: int, rich: bool) -> Settings:
    """The forward pass's row.

    Args:
        architecture: compute capability times ten, 0 for the interpreter; the nearest older row serves.
        dtype: float16, bfloat16 or float32.
        size: the larger of D and Dv, at most 256.
        rich: whether the call has what costs registers.
    """
    return _row(FORWARD, architecture, dtype, size, rich)


def dkv_settings(architecture: int, dtype: torch.dtype, size: int, rich: bool) -> Settings:
    """The row of the backward pass over keys (dk, dv, dw)."""
    return _row(KEYS, architecture, dtype, size, rich)


def dq_settings(architecture: int, dtype: torch.dtype, size: int, rich: bool) -> Settings:
    """The row of the backward pass over rows (dq)."""
    return _row(ROWS, architecture, dtype, size, rich)


# (bytes of an element, head size): a few rows over a long cache, the same on every architecture; rows: at most so many
# heads and rows in a tile. Compiled without spills (tests/kernels/attention/test_decode_triton.py), not timed yet.
DECODE = {
    (2, 64): (Settings(32, 64, 4, 3), Settings(32, 64, 4, 3)),
    (2, 128): (Settings(32, 64, 4, 3), Settings(16, 64, 4, 3)),
    (2, 256): (Settings(32, 64, 8, 2), Settings(16, 64, 8, 2)),
    (4, 64): (Settings(16, 32, 4, 2), Settings(16, 32, 4, 2)),
    (4, 128): (Settings(16, 32, 8, 2), Settings(16, 32, 8, 2)),
    (4, 256): (Settings(16, 16, 8, 1), Settings(16, 16, 8, 1)),
}


def decode_settings(architecture: int, dtype: torch.dtype, size: int, rich: bool) -> Settings:
    """The row of decoding; arguments as in `forward_settings`."""
    if architecture == 0:
        return INTERPRETER
    return DECODE[dtype.itemsize, next(s for s in SIZES if size <= s)][rich]


def product_precision(dtype: torch.dtype, size: int) -> str:
    """How tensor cores multiply float32 tiles: three TF32 products, which keep about 22 bits of the 24; above 128
    columns their operands do not fit the registers, and plain float32 multiply-adds take over. Halves are exact."""
    if dtype != torch.float32:
        return "tf32"  # says nothing there
    return "tf32x3" if size <= 128 else "ieee"
