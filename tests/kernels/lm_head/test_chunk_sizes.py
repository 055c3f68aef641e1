"""How many rows a chunk has on a CPU, and what it takes of a GPU's memory.

On fake and meta tensors: no GPU, and no memory, is needed.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrpt_kernels.lm_head import chunk_sizes
from mmrpt_kernels.lm_head import row_softmax_portable as portable
from mmrpt_kernels.lm_head.chunk_sizes import GPU_BYTES, GPU_TILE, chunk_rows
from mmrpt_kernels.lm_head.options import HeadOptions
from mmrpt_kernels.lm_head.row_softmax import Softmax

VOCAB = 151_936
CAPPED = HeadOptions(0.7, 30.0, 1.0)
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@contextmanager
def gpu_head(dtype: torch.dtype):
    """The lm head of a 7B model on a GPU that need not exist."""
    with FakeTensorMode():
        yield torch.empty(VOCAB, 3584, dtype=dtype, device="cuda")


def test_rows_of_a_chunk_on_a_cpu():
    """The caller's limit, or a memory budget with a lower and an upper end."""

    def rows(count: int, words: int, logits=SINGLE, **options):
        return chunk_rows(count, torch.empty(1, 8).expand(words, 8), logits, **options)[:2]

    assert rows(1000, 50, chunk_size=7) == (7, 7) and rows(5, 50, chunk_size=7) == (5, 5)
    assert rows(0, 50) == (1, 1)
    wide = rows(10**6, 100_000)[0]
    assert wide >= chunk_sizes.CPU_MIN_ROWS and wide * 100_000 * 4 <= chunk_sizes.CPU_BYTES
    assert rows(10**6, 100_000, DOUBLE)[0] <= wide
    assert rows(10**6, 8)[0] == chunk_sizes.CPU_MAX_ROWS
    assert rows(10**6, 10**9)[0] == chunk_sizes.CPU_MIN_ROWS
    assert rows(10**6, 8, vocab=10**9) == rows(10**6, 10**9)  # a part of a vocabulary: the largest part's chunks


def test_chunks_are_alike_and_tall_enough_for_wide_heads():
    """Logits within 32 MiB, and a matrix of an eighth of the hidden size where the gradient is made."""
    narrow = torch.empty(1, 64).expand(32_000, 64)
    limit = chunk_rows(10**6, narrow, SINGLE).logits
    assert limit * 32_000 * 4 <= 32 * 2**20
    assert chunk_rows(limit + 1, narrow, SINGLE)[:2] == (-(-(limit + 1) // 2),) * 2
    wide = torch.empty(1, 4096).expand(151_936, 4096)
    assert chunk_rows(10**6, wide, SINGLE, SINGLE)[:2] == (512, 512)
    short, tall, _ = chunk_rows(10**6, wide, SINGLE, HALF)
    assert short * 151_936 * 4 <= 32 * 2**20 and tall == 512
    assert chunk_rows(10**6, wide, SINGLE, HALF, chunk_size=3)[:2] == (3, 3)


@pytest.mark.parametrize("views", (1, 2))
@pytest.mark.parametrize("matrix", (None, HALF, SINGLE, DOUBLE), ids=str)
@pytest.mark.parametrize("logits", (SINGLE, DOUBLE), ids=str)
def test_logits_and_matrix_of_any_dtype_fit_the_budget(logits, matrix, views):
    """Both count, unless the matrix takes the logits' memory; chunks stay tall enough for the products, as they would
    not with a CPU's budget, and are whole tiles."""
    with gpu_head(HALF) as weight:
        rows = chunk_rows(10**6, weight, logits, matrix, views=views)
    held = rows.logits * logits.itemsize if matrix != logits else 0
    held += 0 if matrix is None else rows.products * matrix.itemsize
    assert held * VOCAB * views <= GPU_BYTES and 0 < rows.logits <= rows.products
    assert rows.products * views >= (2000 if DOUBLE in (logits, matrix) or matrix is None else 6000)
    assert rows.logits * views >= 1000 and rows.logits % GPU_TILE == rows.products % GPU_TILE == 0
    assert matrix != logits or rows.logits == rows.products


def test_trl_visits_a_gpu_head_in_tall_chunks():
    """A visit of 55 rows, a CPU's, would read the whole head for a fifth of what the device multiplies meanwhile."""
    trl = pytest.importorskip("mmrpt_kernels.integrations.trl")
    for logits in (SINGLE, DOUBLE):
        with gpu_head(HALF) as weight:
            rows = chunk_rows(10**6, weight, logits, views=trl.LOGIT_COPIES).logits
        assert rows >= 300 and rows * VOCAB * logits.itemsize * trl.LOGIT_COPIES <= GPU_BYTES


@pytest.mark.parametrize("dtype", (HALF, SINGLE))
def test_chunks_can_be_sized_for_a_gpu_that_is_not_there(dtype):
    """As the same head on a GPU would have them; after the block as before."""
    with FakeTensorMode():
        weight = torch.empty(VOCAB, 64, dtype=dtype)
    with gpu_head(dtype) as there:
        wanted = chunk_rows(10_000, there, SINGLE, dtype)
    before = chunk_rows(10_000, weight, SINGLE, dtype)
    with chunk_sizes.sized_for("cuda"):
        assert chunk_rows(10_000, weight, SINGLE, dtype) == wanted != before
    assert chunk_rows(10_000, weight, SINGLE, dtype) == before


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that an operation has given memory of its own."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, math.prod(tensor.shape))
        return result


@pytest.mark.parametrize("kernel", ("exponentials", "statistics", "gradient"))
def test_portable_row_kernels_leave_little_beside_a_gpu_chunk(kernel):
    """Steps on the way to a row's sums are made for some rows at a time, an eighth of the chunk at most."""
    raw = torch.empty(4096, VOCAB, device="meta")
    targets, row = torch.empty(4096, dtype=torch.int64, device="meta"), torch.empty(4096, device="meta")
    bias, out = torch.empty(VOCAB, device="meta"), torch.empty(4096, VOCAB, dtype=HALF, device="meta")
    with Allocations() as seen:
        if kernel == "exponentials":
            portable.exponentials(raw, bias, targets, CAPPED, True, out)
        elif kernel == "statistics":
            portable.statistics(raw, bias, targets, CAPPED, True, False)
        else:
            state = portable.RowState(raw, torch.empty_like(raw), row)
            seen.largest = 0
            portable.gradient(state, bias, targets, CAPPED, Softmax(row, row, row), (row, row), out)
    assert 0 < seen.largest <= raw.numel() / 8
