"""What a chunk of logits takes of a GPU's memory, on fake and meta tensors: no GPU, and no memory, is needed."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from mmrpt_kernels.common.head import GPU_BYTES, HeadOptions
from mmrpt_kernels.divergence.stream import GPU_LEARN_ROWS, Problem
from mmrpt_kernels.logprobs.gradients import Head
from mmrpt_kernels.logprobs.rows import Softmax
from mmrpt_kernels.logprobs.stream import rows_per_chunk
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrpt_kernels.logprobs import portable

VOCAB = 151_936
CAPPED = HeadOptions(0.7, 30.0, 1.0)


@contextmanager
def gpu_head(dtype: torch.dtype):
    """The lm head of a 7B model on a GPU that need not exist."""
    with FakeTensorMode():
        yield torch.empty(VOCAB, 3584, dtype=dtype, device="cuda")


@pytest.mark.parametrize("matrices", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_logits_of_any_dtype_fit_the_budget(dtype, matrices):
    """A chunk of float64 logits takes twice the memory of one in float32, and so does a second matrix."""
    with gpu_head(torch.bfloat16) as weight:
        rows = rows_per_chunk(10**6, Head(weight, None, HeadOptions()), None, dtype, matrices=matrices)
    assert GPU_BYTES / 2 <= rows * VOCAB * matrices * dtype.itemsize <= GPU_BYTES


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_two_views_of_any_dtype_fit_the_budget(dtype):
    with gpu_head(dtype) as weight:
        hidden = torch.empty(10, 3584, dtype=dtype, device="cuda")
        problem = Problem(hidden, hidden, weight, None, None, None, HeadOptions(), ("kl",), None)
        rows = problem.chunk(10**6, GPU_LEARN_ROWS)
        assert rows >= 256 and 2 * rows * VOCAB * problem.dtype().itemsize <= GPU_BYTES


def test_trl_visits_a_gpu_head_in_tall_chunks():
    """A visit of 55 rows, a CPU's, would read the whole head for a fifth of what the device multiplies meanwhile."""
    trl = pytest.importorskip("mmrpt_kernels.integrations.trl")
    with gpu_head(torch.bfloat16) as weight:
        rows = trl._rows_per_chunk(10**6, weight, torch.float32)
        wide = trl._rows_per_chunk(10**6, weight, torch.float64)
    assert rows >= 300 and rows * VOCAB * 4 * trl.GPU_MATRICES <= GPU_BYTES
    assert wide * VOCAB * 8 * trl.GPU_MATRICES <= GPU_BYTES
    assert trl._rows_per_chunk(10**6, torch.empty(1, 1).expand(VOCAB, 8), torch.float32) < 100


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
    with Allocations() as seen:
        if kernel == "exponentials":
            portable.row_exponentials(raw, targets, CAPPED, True)
        elif kernel == "statistics":
            portable.row_statistics(raw, targets, CAPPED, True, False)
        else:
            state = portable.RowState(raw, torch.empty_like(raw), row)
            seen.largest = 0
            portable.row_gradient(state, targets, CAPPED, Softmax(row, row, row), (row, row))
    assert 0 < seen.largest <= raw.numel() / 8
