"""The error rule: float64 is the truth, eager PyTorch in the same dtype is the yardstick.

    max |actual - truth| <= 2 * (max |eager - truth| + eps * max |truth|)
    RMS (actual - truth) <= 2 * (RMS (eager - truth) + eps * RMS truth)

with inf and NaN in the same places as in the truth, and a cap on eager's own error so that a broken yardstick is seen.
The largest error is where the largest entries are: what is wrong in all the small ones is seen in the root of the mean
square, whose limit is that much lower. Of a single entry the two rules are one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _same_special_places(actual: torch.Tensor, truth: torch.Tensor, who: str, name: str) -> None:
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = int((test(actual) != test(truth)).sum())
        assert wrong == 0, f"{name}: {who} has {what} in {wrong} places that differ from the truth's"


def _largest_and_rms(values: torch.Tensor) -> tuple[float, float]:
    return values.abs().max().item(), values.square().mean().sqrt().item()


def sum_error(terms: float, dtype: torch.dtype = torch.float32) -> float:
    """What a float32 sum of so many numbers is off by at worst, in eps of `dtype` times the sum of their magnitudes.

    Added one after another: terms * eps / 2. Lanes, blocks and pairwise sums stay below that by far, but which of them
    it is depends on the CPU's BLAS and on how many rows and columns the product has. The smaller bound for independent
    roundings, some sqrt(terms) * eps, does not hold for a softmax: words below half a unit of the partial sum are lost
    all alike (3,400 eps were seen over 151,936 words, where independence promises 800).
    """
    return terms / 2.0 * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps


def sum_cap(terms: int, *, exponents: float = 0.0, dtype: torch.dtype = torch.float32) -> float:
    """The `eager_cap` of results that are float32 sums of so many numbers: the default, 64, or `sum_error`.

    Of long sums only a yardstick that is off by terms * eps / 2 (0.9 % at 151,936) is thus known to be broken; short
    ones show the rest.

    exponents: the size of z where the summands are exp(z): each is off by a factor of what z is, 64 eps of it.
    """
    return max(64.0, sum_error(terms + 128.0 * exponents, dtype))


def assert_close_to_truth(
    actual: torch.Tensor,
    eager_same_dtype: torch.Tensor,
    truth_f64: torch.Tensor,
    *,
    name: str = "result",
    dtype: torch.dtype | None = None,
    eager_cap: float = 64.0,
    floor: float = 0.0,
    slack: float = 0.0,
) -> None:
    """Assert the error rule.

    Args:
        actual: the result under test, any shape.
        eager_same_dtype: plain PyTorch on the same low-precision inputs, same shape.
        truth_f64: plain PyTorch on those inputs widened to float64, same shape.
        dtype: whose eps counts: the inputs' dtype. Default: that of `eager_same_dtype`. Name it when a bfloat16
            computation returns float32.
        eager_cap: eager's largest error may be at most eager_cap * eps * max(max |truth|, floor); `sum_cap` for sums.
        floor: the size, in the truth's unit, of the quantities whose rounding enters by subtraction (a difference of
            log-probabilities of size 10 has error 10 * eps, however small it is). 0 where nothing cancels. It counts in
            the eps of `dtype`, in both rules: a floor for float32 statistics of bfloat16 inputs wants dtype=float32,
            and one of max |truth| / (2 eps) would let zeros pass.
        slack: units of eps that the result may be off by beside eager's error and its own last place: `sum_error` where
            it is a sum that a math library may add in another order than eager's.

    Raises:
        AssertionError: with the errors and the limit.
    """
    assert actual.shape == truth_f64.shape, f"{name}: shape {tuple(actual.shape)}, truth {tuple(truth_f64.shape)}"
    assert truth_f64.dtype == torch.float64, f"{name}: the truth is {truth_f64.dtype}, expected float64"
    _same_special_places(actual, truth_f64, "actual", name)
    eps = torch.finfo(dtype or eager_same_dtype.dtype).eps
    finite = torch.isfinite(truth_f64) & torch.isfinite(eager_same_dtype)
    if not finite.any():
        return
    truth = truth_f64.detach()[finite]
    largest, rms = _largest_and_rms(truth)
    max_error, rms_error = _largest_and_rms(actual.detach().double()[finite] - truth)
    eager_max, eager_rms = _largest_and_rms(eager_same_dtype.detach().double()[finite] - truth)
    size, rms_size = max(largest, floor), max(rms, floor)
    unit = max(rms, torch.finfo(torch.float64).tiny) * eps
    assert eager_max <= eager_cap * eps * size, (
        f"{name}: broken yardstick: eager's own error {eager_max:.3e} > {eager_cap} * eps * {size:.3e}"
    )
    for what, error, eager, sized in (
        ("max", max_error, eager_max, size),
        ("RMS", rms_error, eager_rms, rms_size),
    ):
        limit = 2.0 * (eager + (1.0 + slack) * eps * sized)
        assert error <= limit, (
            f"{name}: {what} error {error:.3e} > {limit:.3e} = 2 * (eager {eager:.3e} + {1 + slack:.0f} eps {eps:.1e} "
            f"* size {sized:.3e}); relative RMS {rms_error / unit:.2f} eps, eager's {eager_rms / unit:.2f} eps"
        )


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
