"""How many rows of logits the chunk loop holds at a time: memory budgets, where taller chunks pay, the setting that
makes all of them alike, and the one that sizes them for another device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_sized_for: str | None = None  # the device type that memory is estimated for
_batch_invariant = os.environ.get("MMRPT_KERNELS_BATCH_INVARIANT", "0") not in ("", "0")

# What the logits and the matrix of a chunk take of a GPU's memory together.
GPU_BYTES = 4 * 2**30
# Logits are float32 and short-lived: n rows read the bfloat16 head once, n FLOPs a byte, where an H100 needs about 300
# (990 TFLOP/s, 3.35 TB/s). 2048 rows are 16 tiles of 128 and leave the budget to the matrix.
GPU_LOGIT_ROWS = 2048
# The product that adds n rows to the weight gradient does 2 n H V FLOPs and reads and writes 8 H V bytes of float32
# accumulator, n / 4 FLOPs a byte: 8192 rows keep that traffic under a sixth of the product's time on an H100.
GPU_PRODUCT_ROWS = 8192
# Products have tiles of 128 rows: chunks of whole tiles leave none half empty but the last.
GPU_TILE = 128
# One float32 chunk on a CPU. 32 MiB is 256 rows of a 32,000-word vocabulary: long enough for the matrix product to run
# at full speed, short enough that the softmax passes over it stay near the cache.
CPU_BYTES = 32 * 2**20
CPU_MIN_ROWS = 16
# Up to CPU_SHORT_ROWS rows may take all of that, and from there to CPU_MAX_ROWS half of it: measured on two cores, 1.5
# times as fast at V = 1024, where every chunk's calls count, and no slower at 8192.
CPU_SHORT_ROWS = 256
CPU_MAX_ROWS = 1024
# Blocks of a chunk in an estimate, at most: a block of a row or two would be thousands of operations for a large
# vocabulary, and the temporaries of a sixteenth are small beside the chunk.
ESTIMATE_BLOCKS = 16


class ChunkRows(NamedTuple):
    """Rows of logits made at a time, and rows whose matrix one product each for d hidden and d weight takes."""

    logits: int
    products: int
    padded: bool = False  # every product of logits has `logits` rows, whatever the chunk has


@contextmanager
def sized_for(device_type: str) -> Iterator[None]:
    """Inside the block the portable loop takes memory as on a device of that type, whatever its tensors are on.

    For estimates on tensors without data, of this machine or of a GPU elsewhere. Holds for the process.
    """
    global _sized_for
    before, _sized_for = _sized_for, device_type
    try:
        yield
    finally:
        _sized_for = before


def device_type(device: torch.device) -> str:
    """The type of the device, or that which memory is estimated for."""
    return _sized_for or device.type


def block_rows(rows: int, chunk: int) -> int:
    """Rows of a chunk of so many that several elementwise passes take together: `rows`, at least 1."""
    return max(1, rows, 0 if _sized_for is None else chunk // ESTIMATE_BLOCKS)


@contextmanager
def batch_invariance(enabled: bool = True) -> Iterator[None]:
    """Inside the block a row's log-prob, entropy and divergence do not depend on the other rows of its call.

    The row kernels never let them. A library's matrix product does: it chooses its tiles by its number of rows. Here
    that number is always the same, by the head's sizes alone, and chunks are filled up with zeros: a call of few rows
    costs the product of a whole chunk (2048 rows on a GPU). Gradients are sums over rows and stay as they are.
    The environment variable MMRPT_KERNELS_BATCH_INVARIANT=1 does the same for a process, which threads share.
    """
    global _batch_invariant
    before, _batch_invariant = _batch_invariant, enabled
    try:
        yield
    finally:
        _batch_invariant = before


def chunk_rows(
    count: int,
    weight: torch.Tensor,
    logits_dtype: torch.dtype,
    matrix_dtype: torch.dtype | None = None,
    *,
    chunk_size: int | None = None,
    vocab: int | None = None,
    views: int = 1,
) -> ChunkRows:
    """For `count` rows; all chunks about alike, so that the last is no stub.

    Args:
        weight: (V, H). vocab: words of a chunk where that is not V: the largest part of a cut vocabulary, so that all
            ranks have the same chunks.
        matrix_dtype: of the logits' gradient; None: there is none. Where it is the logits' dtype, the gradient takes
            their memory, and both numbers are the same.
        chunk_size: the caller's limit to both.
        views: how many hidden states have logits of the same rows.
    """
    vocab, width = (weight.shape[0] if vocab is None else vocab), weight.shape[1]
    logit_bytes = vocab * views * logits_dtype.itemsize
    matrix_bytes = 0 if matrix_dtype in (None, logits_dtype) else vocab * views * matrix_dtype.itemsize
    if chunk_size is not None:
        logits = products = chunk_size
    elif device_type(weight.device) == "cpu":
        logits = _cpu_rows(vocab * logits_dtype.itemsize)
        # A chunk reads and writes the whole weight gradient, which tall chunks pay back: up to an eighth of its size.
        products = max(logits, min(width // 8, CPU_MAX_ROWS)) if matrix_dtype is not None else logits
    else:
        logits = max(1, min(GPU_LOGIT_ROWS // views, GPU_BYTES // logit_bytes))
        products = logits
        if matrix_bytes:
            logits = max(1, min(logits, GPU_BYTES // 2 // logit_bytes))
            products = max(logits, (GPU_BYTES - logits * logit_bytes) // matrix_bytes)
        elif matrix_dtype is not None:
            products = max(1, GPU_BYTES // logit_bytes)
        products = min(products, GPU_PRODUCT_ROWS // views)
    if _batch_invariant:
        logits = _fixed_rows(weight, vocab * logits_dtype.itemsize, views)
        return ChunkRows(logits, max(logits, products), padded=True)
    tile = GPU_TILE if device_type(weight.device) == "cuda" else 1
    products = _even_rows(count, products, tile)
    if matrix_dtype == logits_dtype:
        return ChunkRows(products, products)
    return ChunkRows(_even_rows(products, min(logits, products), tile), products)


def _fixed_rows(weight: torch.Tensor, row_bytes: int, views: int) -> int:
    """Rows of logits at a time, by the head's sizes alone."""
    if device_type(weight.device) == "cpu":
        return _cpu_rows(row_bytes)
    return max(1, min(GPU_LOGIT_ROWS // views, GPU_BYTES // 2 // (row_bytes * views)))


def _cpu_rows(row_bytes: int) -> int:
    fitting = CPU_BYTES // row_bytes
    return max(CPU_MIN_ROWS, min(fitting, CPU_SHORT_ROWS), min(fitting // 2, CPU_MAX_ROWS))


def _even_rows(count: int, limit: int, tile: int) -> int:
    """Rows a chunk, at most `limit` >= 1, such that all chunks of `count` rows are alike, or whole tiles and a rest."""
    limit = limit // tile * tile or limit
    chunks = max(1, -(-count // limit))
    rows = max(1, -(-count // chunks))
    return min(limit, -(-rows // tile) * tile) if chunks > 1 else rows
