"""Launch settings of the attention kernels: tables by architecture and head size, for float16 and bfloat16.

Where they come from: each row was chosen by compiling tiles ahead of time for its architecture and taking a large one
whose registers do not spill and whose shared memory fits (tests/kernels/attention/test_attention_triton_compile.py).
None has been timed on hardware yet.
"""

from __future__ import annotations

from typing import NamedTuple

# Groups of weights that one visit of the keys serves: each costs a float32 per row in registers.
MAX_GROUPS = 4
# Keys and values of heads that run side by side. The L2 cache has 40 MB on A100, 50 on H100, 60 on H200.
L2_BYTES = 32 * 2**20
# The backward pass over keys spreads the query heads of a key head over programs until there are so many: an H100 has
# 132 multiprocessors.
PROGRAMS_WANTED = 256


class Settings(NamedTuple):
    """One launch."""

    rows: int  # query rows of a tile
    keys: int  # keys of a tile
    warps: int
    stages: int  # depth of the load pipeline


# Small, so that a short test crosses many tile borders.
INTERPRETER = Settings(32, 32, 4, 1)
# delta of every row: rows alone, no products.
ROW_TERMS = Settings(32, 0, 8, 1)

# (architecture, the larger of D and Dv up to the next of these): (settings of a lean call, of a rich one); a rich call
# has what costs registers, see `Problem.rich`.
Table = dict[tuple[int, int], tuple[Settings, Settings]]

FORWARD: Table = {
    (80, 64): (Settings(128, 64, 8, 3), Settings(64, 32, 8, 2)),
    (80, 128): (Settings(64, 64, 8, 3), Settings(64, 32, 8, 2)),
    (80, 256): (Settings(64, 32, 8, 2), Settings(32, 32, 8, 2)),
    (90, 64): (Settings(128, 128, 8, 3), Settings(128, 64, 8, 2)),
    (90, 128): (Settings(128, 64, 8, 3), Settings(128, 64, 8, 2)),
    (90, 256): (Settings(64, 64, 8, 2), Settings(64, 32, 8, 2)),
    (100, 64): (Settings(128, 128, 8, 2), Settings(64, 64, 8, 2)),
    (100, 128): (Settings(128, 64, 8, 3), Settings(64, 64, 8, 2)),
    (100, 256): (Settings(128, 32, 8, 2), Settings(64, 32, 8, 2)),
}

# The backward pass of a block of keys: dk, dv, dw.
DKV: Table = {
    (80, 64): (Settings(32, 64, 8, 1), Settings(32, 32, 8, 1)),
    (80, 128): (Settings(64, 64, 8, 2), Settings(32, 32, 8, 1)),
    (80, 256): (Settings(32, 32, 8, 2), Settings(16, 16, 8, 1)),
    (90, 64): (Settings(64, 64, 8, 2), Settings(32, 64, 8, 1)),
    (90, 128): (Settings(32, 64, 8, 2), Settings(16, 64, 8, 2)),
    (90, 256): (Settings(16, 64, 8, 2), Settings(16, 32, 8, 1)),
    (100, 64): (Settings(64, 64, 8, 1), Settings(32, 64, 8, 1)),
    (100, 128): (Settings(64, 64, 8, 1), Settings(32, 64, 8, 1)),
    (100, 256): (Settings(32, 32, 8, 2), Settings(16, 32, 8, 1)),
}

# The backward pass of a block of rows: dq.
DQ: Table = {
    (80, 64): (Settings(128, 64, 8, 2), Settings(64, 32, 8, 2)),
    (80, 128): (Settings(128, 32, 8, 2), Settings(64, 64, 8, 2)),
    (80, 256): (Settings(64, 32, 8, 1), Settings(32, 32, 8, 2)),
    (90, 64): (Settings(128, 64, 8, 2), Settings(64, 64, 8, 2)),
    (90, 128): (Settings(128, 64, 8, 2), Settings(64, 64, 8, 2)),
    (90, 256): (Settings(64, 32, 8, 2), Settings(32, 32, 8, 2)),
    (100, 64): (Settings(128, 64, 8, 2), Settings(64, 32, 8, 2)),
    (100, 128): (Settings(128, 64, 8, 2), Settings(64, 64, 8, 2)),
    (100, 256): (Settings(64, 32, 8, 1), Settings(32, 32, 8, 2)),
}

# The mass from a known lse.
MASS: Table = {
    (80, 64): (Settings(128, 64, 8, 4), Settings(128, 64, 8, 4)),
    (80, 128): (Settings(64, 64, 8, 4), Settings(64, 64, 8, 4)),
    (80, 256): (Settings(64, 64, 8, 3), Settings(64, 64, 8, 3)),
    (90, 64): (Settings(128, 64, 8, 4), Settings(128, 64, 8, 4)),
    (90, 128): (Settings(128, 64, 8, 4), Settings(128, 64, 8, 4)),
    (90, 256): (Settings(64, 64, 8, 3), Settings(64, 64, 8, 3)),
    (100, 64): (Settings(128, 64, 8, 4), Settings(128, 64, 8, 4)),
    (100, 128): (Settings(128, 64, 8, 4), Settings(128, 64, 8, 4)),
    (100, 256): (Settings(64, 64, 8, 3), Settings(64, 64, 8, 3)),
}


def settings_of(table: Table, architecture: int, size: int, rich: bool) -> Settings:
    """A row of a table.

    Args:
        architecture: compute capability times ten, 0 for the interpreter; the nearest older row serves.
        size: the larger of D and Dv, at most 256.
        rich: whether the call has what costs registers.
    """
    if architecture == 0:
        return INTERPRETER
    known = max((a for a in (80, 90, 100) if a <= architecture), default=80)
    return table[known, next(s for s in (64, 128, 256) if size <= s)][rich]
