"""The accumulators behind the stream: matrices with a factor a row, and float16's short range."""

from __future__ import annotations

import pytest
import torch
from mmrpt_kernels.common.head import HeadOptions
from mmrpt_kernels.logprobs.gradients import HALF_UNIT, Gradients, Head, scaled_rows, unit_slopes

from mmrpt_kernels.testing import assert_close_to_truth, poisoned_memory

ROWS, HIDDEN, VOCAB = 11, 7, 37


def gathered(chunk: int, dtype: torch.dtype, *, folded: bool, upcast: bool = False) -> tuple[torch.Tensor, ...]:
    """d hidden, d weight, d bias of random chunks; `folded`: the factors multiplied into the matrix beforehand;
    `upcast`: of the same numbers in float64."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (ROWS, VOCAB))
    if upcast:
        hidden, weight, dtype = hidden.double(), weight.double(), torch.float64
    matrix = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    scale = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    scale[4] = 0.0
    hidden[4] = torch.nan  # what a row without a factor holds does not matter
    head = Head(weight, torch.zeros(VOCAB, dtype=dtype), HeadOptions())
    with poisoned_memory():
        gradients = Gradients(hidden, head, need=(True, True, True))
        for rows in torch.arange(ROWS).split(chunk):
            own, factor = matrix[rows].to(gradients.dtype), scale[rows].to(gradients.dtype)
            if folded:
                states = torch.where(scale[rows, None] == 0, 0.0, hidden[rows])
                gradients.add(rows, states, own * factor[:, None])
            else:
                gradients.add(rows, hidden[rows], own, factor)
        return gradients.result()


@pytest.mark.parametrize("chunk", (1, 4, ROWS))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_factors_of_rows_stand_for_the_product(chunk, dtype):
    apart, folded = (gathered(chunk, dtype, folded=folded) for folded in (False, True))
    truth = gathered(ROWS, dtype, folded=True, upcast=True)
    for name, found, eager, exact in zip(("d_hidden", "d_weight", "d_bias"), apart, folded, truth, strict=True):
        assert_close_to_truth(found, eager, exact, name=name)


def test_unit_slopes_fit_float16_and_keep_zeros(seed):
    """Slopes of any size become multiples of a factor: the largest gradients are in float16's range."""
    slopes = (torch.randn(50) * 10.0 ** torch.randint(-30, 30, (50,)), torch.randn(50))
    slopes[0][3] = slopes[1][3] = slopes[1][7] = 0.0
    units, factor = unit_slopes(slopes, 151_936, HeadOptions())
    for unit, slope in zip(units, slopes, strict=True):
        torch.testing.assert_close(unit * factor, slope)
        assert (unit[slope == 0] == 0).all() and (unit.abs() <= HALF_UNIT).all()
    largest = units[0].abs() + units[1].abs() * 12.3  # of p_j (log p_j + entropy), entropy up to log 151,936
    assert (largest <= 1.01 * HALF_UNIT).all() and torch.finfo(torch.float16).max > HALF_UNIT
    alone, factor = unit_slopes((slopes[0], None), 151_936, HeadOptions())
    assert alone[1] is None and (alone[0].abs()[slopes[0] != 0] == HALF_UNIT).all() and factor[3] == 0


def test_float16_rows_keep_a_factor_that_their_range_lacks(seed):
    hidden = torch.randn(ROWS, HIDDEN).half()
    scale = torch.rand(ROWS) * 1e-12
    scale[2], hidden[2] = 0.0, torch.inf
    rows, factor = scaled_rows(hidden, scale, torch.float16)
    exact = (hidden.double() * scale.double()[:, None]).masked_fill((scale == 0)[:, None], 0.0)
    assert rows.dtype == torch.float16
    torch.testing.assert_close(rows.double() * factor.double(), exact, rtol=1e-3, atol=1e-7 * factor.item())
    rows, factor = scaled_rows(hidden, torch.zeros(ROWS), torch.float16)
    assert (rows == 0).all() and factor == 0
    rows, factor = scaled_rows(hidden, scale, torch.float32)
    assert factor is None and rows.dtype == torch.float32
