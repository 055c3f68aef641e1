"""Which query row may attend to which keys: the band that causality and windows cut, its tiles and its counts.

Row t of T queries stands at key position t + S - T (bottom-right alignment, as flash-attn). Causality and windows leave
each row one interval of keys [first, last); padding and explicit masks then thin it out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionOptions(NamedTuple):
    """The options that every backend takes, after the checks."""

    window_left: int  # keys before the row's own position, -1 = all
    window_right: int  # keys after it, -1 = all; 0 = causal
    scale: float
    softcap: float  # 0 = none

    @property
    def banded(self) -> bool:
        """Whether causality or a window forbids anything."""
        return self.window_left >= 0 or self.window_right >= 0


class Masks(NamedTuple):
    """What thins out the band, and which rows are wanted; None = nothing does, all are."""

    key_padding_mask: torch.Tensor | None = None  # (B, S) bool, True = may be attended
    attn_mask: torch.Tensor | None = None  # (B or 1, 1, T, S) bool, True = may be attended
    query_mask: torch.Tensor | None = None  # (B, T), packed (sum T,), bool: rows whose mass is wanted
    cu_seqlens_q: torch.Tensor | None = None  # (sequences + 1,) int32 or int64: packed sequences
    cu_seqlens_k: torch.Tensor | None = None


class Tile(NamedTuple):
    """Rows [row_start, row_stop) against keys [key_start, key_stop).

    shape: "full" = the band allows every pair; "causal" = the lower triangle of a square; "masked" = ask the band.
    """

    row_start: int
    row_stop: int
    key_start: int
    key_stop: int
    shape: str

    @property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_stop)

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.key_stop)


def band(
    num_rows: int, num_keys: int, options: AttentionOptions, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys [first, last) that the band leaves each row, as two int64 tensors (T,); (0, 0) where it leaves none."""
    position = torch.arange(num_rows, device=device) + (num_keys - num_rows)
    first, last = torch.zeros_like(position), torch.full_like(position, num_keys)
    if options.window_left >= 0:
        first = (position - options.window_left).clamp(min=0)
    if options.window_right >= 0:
        last = (position + options.window_right + 1).clamp(max=num_keys)
    empty = first >= last
    return first.masked_fill(empty, 0), last.masked_fill(empty, 0)


def tiles(
    num_rows: int, num_keys: int, options: AttentionOptions, block_rows: int, *, whole: bool, explicit_mask: bool
) -> list[Tile]:
    """Tiles that cover every allowed pair once; rows and keys that nothing can reach are left out.

    Args:
        block_rows: rows of a tile.
        whole: the kernel skips the upper triangle itself and takes any number of rows: where the band is a triangle or
            everything, one tile will do.
        explicit_mask: a (T, S) mask comes on top, so that no tile is free of masking.
    """
    if num_rows == 0 or num_keys == 0:
        return []
    if whole and not explicit_mask and not options.banded:
        return [Tile(0, num_rows, 0, num_keys, "full")]
    if whole and not explicit_mask and options.window_left < 0 and options.window_right == 0 and num_rows >= num_keys:
        return [Tile(num_rows - num_keys, num_rows, 0, num_keys, "causal")]
    # Every row from `first_row` on has keys: its own position is among them.
    first_row = max(0, num_rows - num_keys - options.window_right) if options.window_right >= 0 else 0
    intervals = torch.stack(band(num_rows, num_keys, options, torch.device("cpu")), -1).tolist()
    found = []
    for start in range(first_row, num_rows, block_rows):
        stop = min(start + block_rows, num_rows)
        head, tail = intervals[start], intervals[stop - 1]
        shape = "full" if head == tail and not explicit_mask else "masked"
        found.append(Tile(start, stop, head[0], tail[1], shape))
    return found


def tile_allowed(
    tile: Tile,
    bounds: tuple[torch.Tensor, torch.Tensor],
    masks: Masks,
) -> torch.Tensor | None:
    """(B or 1, 1, rows or 1, keys) bool: the pairs of a tile that may attend; None when all may.

    A "causal" tile's triangle is left to the kernel. bounds: `band(...)`.
    """
    allowed = None
    if tile.shape == "masked":
        key = torch.arange(tile.key_start, tile.key_stop, device=bounds[0].device)
        first, last = (bound[tile.rows, None] for bound in bounds)
        allowed = ((key >= first) & (key < last))[None, None]
    if masks.attn_mask is not None:
        part = masks.attn_mask[:, :, tile.rows, tile.keys]
        allowed = part if allowed is None else allowed & part
    if masks.key_padding_mask is not None:
        part = masks.key_padding_mask[:, None, None, tile.keys]
        allowed = part if allowed is None else allowed & part
    return allowed


def attended_counts(
    weights: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor], masks: Masks, block_rows: int
) -> torch.Tensor:
    """How many keys of each group a row may attend to, exactly: (B, T, G) int64.

    Args:
        weights: (B, S, G) bool: membership of the groups.
        bounds: `band(...)`.
        masks: without attn_mask the count is a difference of prefix sums.
        block_rows: rows of attn_mask to visit at a time.
    """
    if masks.key_padding_mask is not None:
        weights = weights & masks.key_padding_mask[..., None]
    first, last = bounds
    if masks.attn_mask is None:
        before = torch.nn.functional.pad(weights.long().cumsum(1), (0, 0, 1, 0))
        return before[:, last] - before[:, first]
    num_rows, num_keys = masks.attn_mask.shape[-2:]
    counts = weights.new_zeros((weights.shape[0], num_rows, weights.shape[2]), dtype=torch.int64)
    members = weights.float()  # counts below 2**24 are exact in float32
    for start in range(0, num_rows, block_rows):
        tile = Tile(start, min(start + block_rows, num_rows), 0, num_keys, "masked")
        allowed = tile_allowed(tile, bounds, Masks(attn_mask=masks.attn_mask))[:, 0].float()
        counts[:, tile.rows] = (allowed @ members).long()
    return counts
