"""A row's log-prob, entropy and divergence are the same bits whatever other rows its call has.

On a grid every product is exact, whatever order it is summed in: there the kernels alone decide. What a library's
product makes of other numbers depends on its number of rows, which `batch_invariance` fixes.
"""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels import batch_invariance, linear_logprobs
from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.testing import HeadCase, on_a_grid, poisoned_memory
from tests.kernels.lm_head.operators import DEVICE, OPERATORS, SERVED, draw, served

EPS = torch.finfo(torch.float32).eps
CASE = HeadCase("rows", 23, 16, 301, bias=True, temperature=0.7, softcap=6.0)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# Rows of a call: few, one, all in another order, one several times.
SELECTIONS = (range(7), [5], list(reversed(range(23))), [5, 5, 2, 5, 19])


CALLS = [o for o in OPERATORS if o.name in ("logprobs", "policy_loss_with_entropy", "divergence")]


@pytest.fixture(params=("portable", "triton", "cuda"))
def backend(request) -> str:
    served(CALLS[0], request.param)
    return request.param


@pytest.fixture
def inputs(seed) -> dict:
    made = draw(CASE._replace(ignored="none"), seed, dtype=torch.float32)
    made |= {name: on_a_grid(made[name].detach()) for name in ("hidden", "hidden_q", "weight", "bias")}
    return made | {"active": torch.ones_like(made["active"])}


def values_of(inputs: dict, rows: list[int], backend: str, chunk_size: int | None) -> dict[int, torch.Tensor]:
    """Log-probs, entropies and divergences by row: from scoring, from the kept exponentials, from a loss's forward."""
    at = torch.tensor(list(rows), device=DEVICE)
    by_row = ("hidden", "hidden_q", "targets", "advantages", "active", "kept", "old_logps", "ref_logps")
    made = inputs | {name: inputs[name][at] for name in by_row}
    with poisoned_memory():
        found = []
        for operator in (o for o in CALLS if backend in SERVED[o.op]):
            learning = {"hidden": made["hidden"].clone().requires_grad_(operator.op == "policy_loss")}
            results = operator.call(made | learning, chunk_size=chunk_size, backend=backend)
            found += [value.detach() for value in results.values() if value.dim()]
    return {int(row): values for row, values in zip(rows, torch.stack(found, -1), strict=True)}


@pytest.mark.parametrize("padded", (False, True))
def test_other_rows_change_no_bit_of_a_row(backend, padded, inputs):
    """On a CPU PyTorch may round a tensor's last elements, which fill no vector, in another way than the others: there
    results agree to the rounding of exponentials and logarithms. test_row_softmax.py has the kernels' own bits."""
    whole = values_of(inputs, range(23), backend, None)
    for rows, chunk_size in zip(SELECTIONS, (4, None, 7, 2), strict=True):
        with batch_invariance(padded):
            found = values_of(inputs, list(rows), backend, chunk_size)
        for row, values in found.items():
            if DEVICE == "cpu":
                torch.testing.assert_close(values, whole[row], rtol=4 * EPS, atol=4 * EPS)
            else:
                assert torch.equal(values, whole[row]), (row, rows, chunk_size)


@pytest.mark.parametrize("rows", SELECTIONS)
def test_every_product_of_logits_has_the_same_rows(rows, inputs, monkeypatch):
    heights = set()
    logits = gemm.logits

    def watched(hidden, weight, **memory):
        heights.add((weight.shape, hidden.shape[0]))
        return logits(hidden, weight, **memory)

    monkeypatch.setattr(gemm, "logits", watched)
    with batch_invariance():
        for chunk_size in (None, 3):
            values_of(inputs, list(rows), "portable", chunk_size)
    assert len(heights) == 2, heights  # of one view and of two, stacked
    one, two = sorted(height for _, height in heights)
    assert two == 2 * one >= 2 * 16


def test_the_setting_ends_with_its_block_and_changes_results_by_rounding_alone(inputs):
    plain = values_of(inputs, range(23), "portable", None)
    with batch_invariance(), batch_invariance(False):
        assert all(torch.equal(plain[row], v) for row, v in values_of(inputs, range(23), "portable", None).items())
    hidden = torch.randn(5, 16, dtype=torch.float64).requires_grad_()
    weight, targets = torch.randn(33, 16, dtype=torch.float64), torch.arange(5)
    results = []
    for enabled in (False, True):
        with batch_invariance(enabled):
            out = linear_logprobs(hidden, weight, targets).logps
            results.append((out.detach(), *torch.autograd.grad(out.sum(), hidden)))
    torch.testing.assert_close(results[0], results[1])
