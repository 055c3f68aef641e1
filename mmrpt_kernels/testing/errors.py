"""The error rule: float64 is the truth, eager PyTorch in the same dtype is the yardstick.

    max |actual - truth| <= 2 * (max |eager - truth| + eps * max |truth|)

with inf and NaN in the same places as in the truth, and a cap on eager's own error so that a broken yardstick is seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

__all__ = ["ErrorReport", "assert_close_to_truth", "poisoned_memory"]


class ErrorReport(NamedTuple):
    """Errors over the finite entries; the `rms_*` are relative to the truth's RMS and stated in units of eps."""

    max_error: float
    eager_max_error: float
    rms_in_eps: float
    eager_rms_in_eps: float


def _same_special_places(actual: torch.Tensor, truth: torch.Tensor, who: str, name: str) -> None:
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = int((test(actual) != test(truth)).sum())
        assert wrong == 0, f"{name}: {who} has {what} in {wrong} places that differ from the truth's"


def assert_close_to_truth(
    actual: torch.Tensor,
    eager_same_dtype: torch.Tensor,
    truth_f64: torch.Tensor,
    *,
    name: str = "result",
    dtype: torch.dtype | None = None,
    eager_cap: float = 64.0,
    floor: float = 0.0,
) -> ErrorReport:
    """Assert the error rule; returns the errors for tables.

    Args:
        actual: the result under test, any shape.
        eager_same_dtype: plain PyTorch on the same low-precision inputs, same shape.
        truth_f64: plain PyTorch on those inputs widened to float64, same shape.
        dtype: whose eps counts: the inputs' dtype. Default: that of `eager_same_dtype`. Name it when a bfloat16
            computation returns float32.
        eager_cap: eager's largest error may be at most eager_cap * eps * max |truth| (+ floor).
        floor: the size, in the truth's unit, of the quantities whose rounding enters by subtraction (a difference of
            log-probabilities of size 10 has error 10 * eps, however small it is). 0 where nothing cancels.

    Raises:
        AssertionError: with the three errors and the limit.
    """
    assert actual.shape == truth_f64.shape, f"{name}: shape {tuple(actual.shape)}, truth {tuple(truth_f64.shape)}"
    assert truth_f64.dtype == torch.float64, f"{name}: the truth is {truth_f64.dtype}, expected float64"
    _same_special_places(actual, truth_f64, "actual", name)
    eps = torch.finfo(dtype or eager_same_dtype.dtype).eps
    finite = torch.isfinite(truth_f64) & torch.isfinite(eager_same_dtype)
    if not finite.any():
        return ErrorReport(0.0, 0.0, 0.0, 0.0)
    truth = truth_f64.detach()[finite]
    error = (actual.detach().double()[finite] - truth).abs()
    eager_error = (eager_same_dtype.detach().double()[finite] - truth).abs()
    size = max(truth.abs().max().item(), floor)
    rms = max(truth.square().mean().sqrt().item(), torch.finfo(torch.float64).tiny) * eps
    report = ErrorReport(
        error.max().item(),
        eager_error.max().item(),
        error.square().mean().sqrt().item() / rms,
        eager_error.square().mean().sqrt().item() / rms,
    )
    limit = 2.0 * (report.eager_max_error + eps * size)
    assert report.eager_max_error <= eager_cap * eps * size or size == 0.0, (
        f"{name}: broken yardstick: eager's own error {report.eager_max_error:.3e} > {eager_cap} * eps * {size:.3e}"
    )
    assert report.max_error <= limit, (
        f"{name}: max error {report.max_error:.3e} > {limit:.3e} = 2 * (eager {report.eager_max_error:.3e} "
        f"+ eps {eps:.1e} * size {size:.3e}); relative RMS {report.rms_in_eps:.2f} eps, "
        f"eager's {report.eager_rms_in_eps:.2f} eps"
    )
    return report


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block every `torch.empty` holds NaN (integers their maximum), so reading unwritten memory is seen."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = was_filling
