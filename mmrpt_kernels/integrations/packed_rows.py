"""Rows of different lengths without their padding: as one row through a model, each by itself in attention."""

from __future__ import annotations

import torch

__all__ = ["PackedRows"]


class PackedRows:
    """Where the tokens of padded rows stand: `keep` (R, T) bool, False for padding.

    A model enabled by `enable_visual_mass` takes it as `model(inputs_embeds=..., packed_rows=...)`, where inputs are
    the rows' tokens as one row (1, N, ...) and the attention mask is that of the padded rows, or None if the padding
    stands on the right.
    """

    def __init__(self, keep: torch.Tensor) -> None:
        self.shape = keep.shape
        self.places = keep.flatten().nonzero()[:, 0]

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, T, ...) -> (1, N, ...): the tokens that are kept, row after row. Differentiable."""
        return rows.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1, N, ...) -> (R, T, ...), zeros where padding was. Differentiable."""
        flat = tokens.new_zeros(self.shape.numel(), *tokens.shape[2:])
        return flat.index_copy(0, self.places, tokens[0]).unflatten(0, self.shape)
