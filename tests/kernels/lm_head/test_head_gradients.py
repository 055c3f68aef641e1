"""The accumulators of the chunk loop: matrices with a factor a row, several views, and float16's short range."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.lm_head.gemm import scaled_rows
from mmrpt_kernels.lm_head.head_gradients import HALF_UNIT, HeadGradients, unit_slopes
from mmrpt_kernels.lm_head.options import Head, HeadOptions
from mmrpt_kernels.testing import assert_close_to_truth, poisoned_memory

ROWS, HIDDEN, VOCAB = 11, 7, 37


def gathered(
    chunk: int, dtype: torch.dtype, *, folded: bool, upcast: bool = False, views: int = 1
) -> tuple[torch.Tensor, ...]:
    """d hidden of each view, d weight, d bias of random chunks; `folded`: the factors multiplied into the matrix
    beforehand; `upcast`: of the same numbers in float64."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (views * ROWS, VOCAB))
    if upcast:
        hidden, weight, dtype = hidden.double(), weight.double(), torch.float64
    matrix = torch.randn(views, ROWS, VOCAB, generator=generator, dtype=torch.float64)
    scale = torch.randn(views, ROWS, generator=generator, dtype=torch.float64)
    scale[:, 4] = 0.0
    hidden = hidden.view(views, ROWS, HIDDEN)
    hidden[:, 4] = torch.nan  # what a row without a factor holds does not matter
    head = Head(weight, torch.zeros(VOCAB, dtype=dtype), HeadOptions())
    need, dtypes = ((True,) * views, True, True), (dtype,) * (views + 2)
    with poisoned_memory():
        gradients = HeadGradients(tuple(hidden), head, need=need, dtypes=dtypes)
        for rows in torch.arange(ROWS).split(chunk):
            own, factor = (t[:, rows].flatten(0, 1).to(gradients.dtype) for t in (matrix, scale))
            states = hidden[:, rows].flatten(0, 1)
            if folded:
                states = torch.where(factor[:, None] == 0, 0.0, states)
                gradients.add(rows, states, own * factor[:, None], None)
            else:
                gradients.add(rows, states, own, factor)
        d_hiddens, d_weight, d_bias = gradients.result()
    return *d_hiddens, d_weight, d_bias


@pytest.mark.parametrize("views", (1, 2))
@pytest.mark.parametrize("chunk", (1, 4, ROWS))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_factors_of_rows_stand_for_the_product(chunk, dtype, views):
    apart, folded = (gathered(chunk, dtype, folded=folded, views=views) for folded in (False, True))
    truth = gathered(ROWS, dtype, folded=True, upcast=True, views=views)
    for place, (found, eager, exact) in enumerate(zip(apart, folded, truth, strict=True)):
        assert_close_to_truth(found, eager, exact, name=f"result {place}")


def test_only_what_is_needed_is_made_and_in_the_dtypes_asked_for(monkeypatch):
    """Frozen tensors cost no product; a loss scale that is still to come takes float16's gradients in float32."""
    made = []
    monkeypatch.setattr(gemm, "d_hidden", lambda *a: made.append("hidden") or torch.ones(2 * ROWS, HIDDEN))
    monkeypatch.setattr(gemm, "add_d_weight", lambda *a, **k: made.append("weight") or a[2].zero_())
    hiddens, rows = (torch.ones(ROWS, HIDDEN).half(),) * 2, torch.arange(ROWS)
    head = Head(torch.ones(VOCAB, HIDDEN).half(), None, HeadOptions())
    for need in (((False, True), False, True), ((False, False), True, False)):
        gradients = HeadGradients(hiddens, head, need=need, dtypes=(torch.float32,) * 4)
        assert gradients.wanted()
        gradients.add(rows, torch.cat(hiddens), torch.ones(2 * ROWS, VOCAB), None)
        (first, second), weight, bias = gradients.result()
        assert first is None and bias is None and (second is None) == need[1] and (weight is None) != need[1]
        assert (weight if need[1] else second).dtype == torch.float32
    assert made == ["hidden", "weight"]
    nothing = HeadGradients(hiddens, head, need=((False, False), False, True), dtypes=(torch.float32,) * 4)
    assert not nothing.wanted() and not any(grad is not None for grad in (*nothing.result()[0], nothing.weight))


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
