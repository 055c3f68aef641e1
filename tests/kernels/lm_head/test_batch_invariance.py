"""A row's log-prob, entropy and divergence are the same bits whatever other rows its call has.

On a grid every product is exact, whatever order it is summed in: there the kernels alone decide. What a library's
product makes of other numbers depends on its number of rows, which `batch_invariance` fixes.
"""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels import backends, batch_invariance, linear_logprobs, linear_policy_loss, linear_token_divergence
from mmrpt_kernels.lm_head import gemm
from mmrpt_kernels.testing import HeadCase, head_inputs, on_a_grid, poisoned_memory

EPS = torch.finfo(torch.float32).eps
CASE = HeadCase("rows", 23, 16, 301, bias=True, temperature=0.7, softcap=6.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# Rows of a call: few, one, all in another order, one several times.
SELECTIONS = (range(7), [5], list(reversed(range(23))), [5, 5, 2, 5, 19])


@pytest.fixture(params=("portable", "triton", "cuda"))
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cuda" and (reason := backends._why_no_extension(DEVICE)):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def inputs(seed) -> dict:
    made = head_inputs(CASE._replace(ignored="none"), dtype=torch.float32, device=DEVICE, seed=seed)
    for name in ("hidden", "hidden_q", "weight", "bias"):
        made[name] = on_a_grid(made[name])
    return made


def values_of(inputs: dict, rows: list[int], backend: str, chunk_size: int | None) -> dict[int, torch.Tensor]:
    """Log-probs, entropies and divergences by row: from scoring, from the kept exponentials, from a loss's forward."""
    at = torch.tensor(list(rows), device=DEVICE)
    head = {"bias": inputs["bias"], "temperature": CASE.temperature, "softcap": CASE.softcap}
    hidden, targets, call = inputs["hidden"][at], inputs["targets"][at], {"chunk_size": chunk_size, **head}
    with poisoned_memory():
        scored = linear_logprobs(hidden, inputs["weight"], targets, return_entropy=True, backend=backend, **call)
        learnt = linear_policy_loss(
            hidden[None].clone().requires_grad_(),
            inputs["weight"],
            targets[None],
            torch.ones(1, device=DEVICE),
            response_mask=torch.ones_like(targets, dtype=torch.bool)[None],
            return_statistics=True,
            backend=backend,
            **call,
        )
        found = [*scored, learnt.logps[0], learnt.entropy[0]]
        if backend != "cuda":
            views = (hidden, inputs["hidden_q"][at], inputs["weight"])
            kinds = ("kl", "js")
            found += linear_token_divergence(*views, kind=kinds, backend=backend, **call).divergence.unbind(-1)
    return {int(row): values for row, values in zip(rows, torch.stack(found, -1).detach(), strict=True)}


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
