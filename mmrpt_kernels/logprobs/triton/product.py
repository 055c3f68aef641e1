"""The lm head's product in Triton with the exponentials in its epilogue: the logits themselves never reach memory.

A tile of logits leaves the tensor cores' accumulators as exp(z - base), rounded to the dtype of the products that
follow, with base the target's z: a dot product of two vectors a row, made beforehand. What a tile cannot know, a row
with words far above its target, the host looks for after the chunk; such a chunk goes the ordinary way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmrpt_kernels.common.head import HeadOptions, statistics_dtype
from mmrpt_kernels.logprobs.rows import Exponentials
from mmrpt_kernels.logprobs.triton.rows import FAR, LOG2_E

__all__ = ["exponentials_of_product"]

# exp(60) = 1e26 leaves float32's sums of 152,000 of them room, and log-probabilities and entropies an error of 4e-6.
# Not less, as `rows.most_above` has it: one row beyond it sends its whole chunk the ordinary way.
FAR_ABOVE = 60.0


class Tiles(NamedTuple):
    """Launch setting; compiled, not timed."""

    rows: int
    words: int
    width: int
    warps: int
    stages: int


TILES = {80: Tiles(128, 128, 64, 8, 3), 90: Tiles(128, 256, 64, 8, 4), 100: Tiles(128, 256, 64, 8, 4)}


# How many rows a chunk has, and where its sums lie, changes from call to call: for these nothing is compiled again.
# Strides and V are the model's; that they are multiples of 16 is what wide loads and stores need to know.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["targets", "own", "tops", "rests", "dots"])
def _product_kernel(
    hidden,
    weight,
    bias,
    targets,
    own,
    matrix,
    tops,
    rests,
    dots,
    rows,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    matrix_stride,
    factor,
    BIASED: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program: a tile (BLOCK_M rows, BLOCK_N words) of matrix (n, V), and the tile's part of its rows' sums.

    hidden (n, H), weight (V, H), bias (V,), targets (n,) int64, own (n,) z of the target; tops, rests, dots (tiles of
    words, n). All row tiles of some words come before the next words: the chunk's hidden states stay in the L2 cache,
    and every word's weight comes from memory once.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    row = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    word = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    # Beyond the ends the last row and word are multiplied again instead of masked: nothing of it is stored.
    near_row = tl.minimum(row, rows - 1).to(tl.int64)
    near_word = tl.minimum(word, vocab - 1).to(tl.int64)
    a = hidden + near_row[:, None] * hidden_stride + lane[None, :]
    b = weight + near_word[None, :] * weight_stride + lane[:, None]
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, width, BLOCK_K):
        if EVEN:
            states, words = tl.load(a), tl.load(b)  # (BLOCK_M, BLOCK_K), (BLOCK_K, BLOCK_N)
        else:
            states = tl.load(a, mask=(k + lane < width)[None, :], other=0.0)
            words = tl.load(b, mask=(k + lane < width)[:, None], other=0.0)
        logits = tl.dot(states, words, logits, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K
    if BIASED:
        logits += tl.load(bias + near_word).to(tl.float32)[None, :]
    base = tl.load(own + near_row)
    target = tl.load(targets + near_row).to(tl.int32)
    others = (word < vocab)[None, :] & (word[None, :] != target[:, None])
    gap = tl.where(others, factor * logits - base[:, None], float("-inf"))
    exps = tl.exp2(gap * LOG2_E)
    place = tile_n.to(tl.int64) * rows + row
    tl.store(tops + place, tl.max(gap, axis=1), mask=row < rows)
    tl.store(rests + place, tl.sum(exps, axis=1), mask=row < rows)
    if ENTROPY:
        tl.store(dots + place, tl.sum(exps * tl.maximum(gap, -FAR), axis=1), mask=row < rows)
    out = matrix + row.to(tl.int64)[:, None] * matrix_stride + word[None, :]
    tl.store(out, exps.to(matrix.dtype.element_ty), mask=(row < rows)[:, None] & (word < vocab)[None, :])


def target_logits(
    hidden_rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Raw logits (n,) of the targets, in the statistics dtype."""
    dtype = statistics_dtype(hidden_rows)
    raw = torch.linalg.vecdot(hidden_rows.to(dtype), weight[targets].to(dtype))
    return raw if bias is None else raw + bias[targets]


def exponentials_of_product(
    hidden_rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    options: HeadOptions,
    want_entropy: bool,
    into: torch.Tensor | None,
) -> tuple[Exponentials, torch.Tensor] | None:
    """`RowKernels.product`."""
    if options.softcap > 0.0:  # tanh would take the registers that the accumulators have
        return None
    if hidden_rows.dtype != weight.dtype or not all(_dense_rows(t) for t in (hidden_rows, weight, into)):
        return None
    tiles = TILES[_generation(hidden_rows)]
    factor = options.logit_scale / options.temperature
    own = factor * target_logits(hidden_rows, weight, bias, targets)
    rows, vocab = hidden_rows.shape[0], weight.shape[0]
    matrix = own.new_empty(rows, vocab) if into is None else into
    parts = own.new_zeros(3, triton.cdiv(vocab, tiles.words), rows)
    with torch.cuda.device_of(hidden_rows):
        how = {"factor": factor, "want_entropy": want_entropy, "tiles": tiles}
        launch(hidden_rows, weight, bias, targets.contiguous(), own, matrix, parts, **how)
    rest, dots = parts[1:].sum(1)
    if not bool(((parts[0].amax(0) <= FAR_ABOVE) & rest.isfinite()).all()):
        return None
    matrix.scatter_(1, targets[:, None], -rest[:, None].to(matrix.dtype))
    return Exponentials(torch.zeros_like(rest), rest, dots), matrix


def launch(
    hidden_rows, weight, bias, targets, own, matrix, parts, *, factor: float, want_entropy: bool, tiles: Tiles
) -> None:
    """The kernel on its grid; parts (3, tiles of words, n): tops, rests, dots."""
    (rows, width), vocab = hidden_rows.shape, weight.shape[0]
    tops, rests, dots = parts.unbind()
    _product_kernel[(triton.cdiv(vocab, tiles.words) * triton.cdiv(rows, tiles.rows),)](
        hidden_rows,
        weight,
        weight if bias is None else bias,
        targets,
        own,
        matrix,
        tops,
        rests,
        dots,
        rows,
        vocab,
        width,
        hidden_rows.stride(0),
        weight.stride(0),
        matrix.stride(0),
        factor,
        BIASED=bias is not None,
        ENTROPY=want_entropy,
        EVEN=width % tiles.width == 0,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.words,
        BLOCK_K=tiles.width,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _dense_rows(tensor: torch.Tensor | None) -> bool:
    """Whether a matrix is read and written 16 bytes at a time: else its addresses take the registers."""
    if tensor is None:
        return True
    whole = tensor.stride(0) % 16 == 0 and tensor.data_ptr() % 16 == 0
    return tensor.stride(1) == 1 and (whole or not tensor.is_cuda)  # the interpreter takes any


def _generation(tensor: torch.Tensor) -> int:
    """The column of TILES for a tensor's device; the newest one known for newer ones, the interpreter as sm_80."""
    if not tensor.is_cuda:
        return 80
    capability = torch.cuda.get_device_capability(tensor.device)[0] * 10
    return max((known for known in TILES if known <= capability), default=80)
