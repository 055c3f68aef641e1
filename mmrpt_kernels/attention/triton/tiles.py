"""Device helpers that the kernels share: where a program works, which pairs of a tile may attend, scores.

Positions count along the whole tensor, packed or not: a sequence is rows [row_lo, row_hi) against keys
[key_lo, key_hi), and row t stands at key position t + shift with shift = key_hi - row_hi (bottom-right alignment). Key
blocks start at multiples of the block size wherever a sequence begins, so that one classification of the key weights
serves them all.
Scores are in units of log2: exp2(x) is exp of what the definition calls s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmrpt_kernels.common.tanh import tanh

# A block of keys, for one group: every weight 0, every weight 1, or anything. See key_blocks.py.
NONE = tl.constexpr(0)
ALL = tl.constexpr(1)
SOME = tl.constexpr(2)

# Arguments that follow the lengths of a call, for do_not_specialize: Triton would compile a kernel anew where one of
# them becomes 1 or a multiple of 16. Strides of q, k, v, dout and masks are not among them: that they are multiples of
# 16 is what wide loads follow from, and for most models they are, at any length.
LENGTHS = (
    "num_rows", "num_keys", "num_blocks", "num_tiles", "num_heads", "num_sequences", "section", "splits", "dw_first",
    "stride_wb", "stride_pb", "stride_dmb", "stride_dmh", "stride_dlb", "stride_dlh", "stride_lb", "stride_lh",
)  # fmt: skip
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place_of_program(program, num_tiles, num_heads, section):
    """(tile, head) of a program: `section` heads share the cache, and within a section tiles go first to last.

    A section is the heads whose keys and values fit the L2 cache together. Every head of a section starts on tile 0
    before any goes on to tile 1: put the longest tiles first and the last programs to finish are short.
    """
    in_section = program // (num_tiles * section)
    rest = program - in_section * num_tiles * section
    size = min(section, num_heads - in_section * section)
    tile = rest // size
    return tile, in_section * section + rest - tile * size


@triton.jit
def sequence_bounds(cu_q, cu_k, sequence):
    """(row_lo, row_hi, key_lo, key_hi) of a packed sequence."""
    row_lo, row_hi = tl.load(cu_q + sequence).to(tl.int32), tl.load(cu_q + sequence + 1).to(tl.int32)
    key_lo, key_hi = tl.load(cu_k + sequence).to(tl.int32), tl.load(cu_k + sequence + 1).to(tl.int32)
    return row_lo, row_hi, key_lo, key_hi


@triton.jit
def keys_of_rows(row_first, row_last, shift, key_lo, key_hi, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """[first, stop): the keys that some row of row_first .. row_last may attend to; stop <= first where there is none.

    With the two rows swapped: the keys that every one of these rows may attend to.

    LEFT, RIGHT: whether the band has that edge, `left` keys before and `right` keys after the row's own position.
    """
    first, stop = key_lo, key_hi
    if LEFT:
        first = max(first, row_first + shift - left)
    if RIGHT:
        stop = min(stop, row_last + shift + right + 1)
    return first, stop


@triton.jit
def key_blocks_of_rows(
    row_first, row_last, shift, key_lo, key_hi, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(first, inner_first, inner_stop, stop) in key blocks: [first, stop) holds every key of the rows, and the band
    cuts nothing of blocks [inner_first, inner_stop)."""
    low, high = keys_of_rows(row_first, row_last, shift, key_lo, key_hi, left, right, LEFT, RIGHT)
    first = low // BLOCK_N
    stop = tl.where(low < high, tl.cdiv(high, BLOCK_N), first)
    low, high = keys_of_rows(row_last, row_first, shift, key_lo, key_hi, left, right, LEFT, RIGHT)
    inner_first = min(max(tl.cdiv(low, BLOCK_N), first), stop)
    inner_stop = min(max(max(high, 0) // BLOCK_N, inner_first), stop)
    return first, inner_first, inner_stop, stop


@triton.jit
def rows_of_keys(key_first, key_last, shift, row_lo, row_hi, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """[first, stop): the rows that may attend to some key of key_first .. key_last; with the two keys swapped, those
    that may attend to every one."""
    first, stop = row_lo, row_hi
    if RIGHT:
        first = max(first, key_first - shift - right)
    if LEFT:
        stop = min(stop, key_last - shift + left + 1)
    return first, stop


@triton.jit
def load_tile(pointers, keep, column, PARTIAL: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A tile (N, BLOCK) of q, k, v or dout: 0 beyond DIM columns and, with PARTIAL, outside `keep`.

    Args:
        keep: (N, 1) bool. column: (1, BLOCK) int.
    """
    if PARTIAL and DIM < BLOCK:
        return tl.load(pointers, mask=keep & (column < DIM), other=0.0)
    elif PARTIAL:
        return tl.load(pointers, mask=keep, other=0.0)
    elif DIM < BLOCK:
        return tl.load(pointers, mask=column < DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_lse(pointers, keep):
    """lse in units of log2; +inf in rows that attend to nothing, so that exp2(scores - lse) is 0 there."""
    lse = tl.load(pointers, mask=keep, other=float("-inf")).to(tl.float32) * LOG2_E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def allowed_pairs(
    row, key, shift, row_hi, key_lo, key_hi, left, right, mask, stride_mt, stride_ms,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Bool, shaped as `row` and `key` broadcast: pairs inside the band, the sequence's keys and the mask (T, S)."""
    allowed = (key >= key_lo) & (key < key_hi)
    if LEFT:
        allowed = allowed & (key >= row + (shift - left))
    if RIGHT:
        allowed = allowed & (key <= row + (shift + right))
    if MASKED:
        pointers = mask + row.to(tl.int64) * stride_mt + key.to(tl.int64) * stride_ms
        allowed = allowed & (tl.load(pointers, mask=(row < row_hi) & (key < key_hi), other=0) != 0)
    return allowed


@triton.jit
def capped_scores(products, scale, softcap, CAPPED: tl.constexpr):
    """(scores s in units of log2, d s / d (scale * products)) of raw products q . k; CAPPED: s = c tanh(s / c)."""
    if CAPPED:
        capped = tanh(products * (scale / softcap))
        scores, slope = capped * (softcap * LOG2_E), 1.0 - capped * capped
    else:
        scores, slope = products * (scale * LOG2_E), 1.0
    return scores, slope


@triton.jit
def _add_group(dp, of_row, w_ptrs, keep, dmass_ptrs, live, block_kind, exists, KEYS_FIRST: tl.constexpr):
    """One group's part of `add_dmass`; of_row (rows,) collects what is the same for every key of the block."""
    kind = tl.load(block_kind, mask=exists, other=0)
    dmass = tl.load(dmass_ptrs, mask=live & (kind != NONE), other=0.0)  # (rows,)
    of_row += tl.where(kind == ALL, dmass, 0.0)
    if kind == SOME:
        w = tl.load(w_ptrs, mask=keep, other=0).to(tl.float32)  # (keys,)
        if KEYS_FIRST:
            dp += w[:, None] * dmass[None, :]
        else:
            dp += dmass[:, None] * w[None, :]
    return dp, of_row


@triton.jit
def add_dmass(
    dp, w_ptrs, stride_wg, keep, dmass_ptrs, live, block_kinds, groups,
    GROUPS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """dp + sum over groups of weight_j * dmass_t for a block of keys j and rows t.

    Args:
        dp: (keys, rows) where KEYS_FIRST, else (rows, keys).
        GROUPS: groups up to a power of two, 0 when they are too many to unroll.
        keep (keys,), live (rows,): what exists.
    """
    of_row = tl.zeros_like(live.to(tl.float32))
    if GROUPS == 0:
        for g in range(groups):
            dp, of_row = _add_group(
                dp, of_row, w_ptrs + g * stride_wg, keep, dmass_ptrs + g, live, block_kinds + g, True, KEYS_FIRST
            )
    else:
        for g in tl.static_range(GROUPS):
            dp, of_row = _add_group(
                dp, of_row, w_ptrs + g * stride_wg, keep, dmass_ptrs + g, live, block_kinds + g, g < groups, KEYS_FIRST
            )
    if KEYS_FIRST:
        dp += of_row[None, :]
    else:
        dp += of_row[:, None]
    return dp
