"""The chunk loop: chunks of any height give what one chunk gives, and nothing of what lies around the rows."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels.divergence import fused as divergence_fused
from mmrpt_kernels.lm_head import chunk_loop
from mmrpt_kernels.lm_head.chunk_sizes import ChunkRows
from mmrpt_kernels.testing import HeadCase
from tests.kernels.lm_head.operators import ONE_VIEW, by_operator, draw, judge, name_of, run

ROWS = 21  # three tall chunks of 8, 8 and 5 rows; neither size of the head is a multiple of 32
CASE = HeadCase("chunks", ROWS, 24, 75, bias=True, ignored="none")
HEIGHTS = (ChunkRows(3, 8), ChunkRows(8, 8), ChunkRows(4, 9, padded=True), ChunkRows(1, ROWS), ChunkRows(ROWS, ROWS))
by_dtype = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)


def chunks_of(monkeypatch, height: ChunkRows) -> None:
    for module in (chunk_loop, divergence_fused):
        monkeypatch.setattr(module, "chunk_rows", lambda *_, **__: height)


def draw_parts(seed: int, dtype: torch.dtype, wide: bool = False) -> dict:
    """Inputs whose leaves are each a part of a larger tensor that is NaN around it."""
    made = draw(CASE, seed, dtype=dtype, wide=wide, device="cpu")
    for name in ("hidden", "hidden_q", "weight", "bias"):
        values = made[name].detach().reshape(-1, made[name].shape[-1])
        held = torch.full((values.shape[0] + 2, values.shape[1] + 5), torch.nan, dtype=values.dtype)
        made[name] = held[1:-1, :-5].copy_(values).view_as(made[name]).requires_grad_()
    return made


@by_dtype
@by_operator
def test_the_height_of_chunks_changes_nothing(operator, dtype, multiplies, monkeypatch, seed):
    """Logits shorter than the matrix, in memory of their own or in the matrix's."""
    truth = run(operator, draw_parts(seed, dtype, wide=True), seed, backend="reference")
    eager = run(operator, draw_parts(seed, dtype), seed, backend="reference")
    for height in HEIGHTS:
        chunks_of(monkeypatch, height)
        judge(operator, CASE, dtype, run(operator, draw_parts(seed, dtype), seed, backend="portable"), eager, truth)


@by_dtype
@pytest.mark.parametrize("height", HEIGHTS[:3], ids=str)
@pytest.mark.parametrize("operator", ONE_VIEW, ids=name_of)
def test_padding_rows_give_nothing_whatever_they_hold(operator, height, dtype, multiplies, monkeypatch, seed):
    """Rows that are visited because nothing may wait: NaN hidden states, and targets that are no word."""
    chunks_of(monkeypatch, height)
    mask = torch.rand(ROWS) < 0.6
    mask[7:9] = torch.tensor([True, False])

    def masked(**parts) -> dict:
        made = draw_parts(seed, dtype, **parts)
        ids = torch.where(mask, made["targets"], -100) if operator.op == "logprobs" else made["targets"]
        return made | {"active": mask, "kept": mask, "targets": ids}

    expected, truth = run(operator, masked(), seed), run(operator, masked(wide=True), seed)
    made = masked()
    with torch.no_grad():
        made["hidden"][~mask] = torch.nan
        made["hidden"][8] = torch.inf
    if operator.op != "logprobs":
        made["targets"] = torch.where(mask, made["targets"], torch.where(torch.arange(ROWS) % 2 == 0, 10**9, -7))
    found = run(operator, made, seed, compact=False)
    assert (found["d_hidden"][~mask] == 0).all()
    judge(operator, CASE, dtype, found, expected, truth)
