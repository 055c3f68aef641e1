"""The shared pieces: autocast, and the error rule itself. Argument checks are in test_refusals.py."""

from __future__ import annotations

import functools

import pytest
import torch

from mmrpt_kernels.common.autocast import cast_for_autocast, without_autocast
from mmrpt_kernels.testing import (
    ATTENTION_CASES,
    HEAD_CASES,
    assert_close_to_truth,
    attention_inputs,
    head_inputs,
    poisoned_memory,
    sum_cap,
)


class TestAutocast:
    def test_casts_as_linear_does_and_leaves_float64_alone(self):
        x, y = torch.randn(2, 3, requires_grad=True), torch.randn(2, dtype=torch.float64)
        assert cast_for_autocast(x, None, y) == (x, None, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, none, b = cast_for_autocast(x, None, y)
        assert a.dtype == torch.bfloat16 and none is None and b is y
        a.float().sum().backward()
        assert torch.equal(x.grad, torch.ones(2, 3))

    def test_without_autocast_runs_products_as_written(self):
        product = without_autocast(lambda a, b: a @ b)
        a, b = torch.randn(3, 4), torch.randn(4, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (a @ b).dtype == torch.bfloat16
            assert product(a, b).dtype == torch.float32


class TestErrorRule:
    """The rule must fail where it should."""

    truth = torch.linspace(-3, 5, 101, dtype=torch.float64)
    eager = truth.to(torch.bfloat16)

    def test_accepts_the_yardstick_and_the_truth(self):
        for actual in (self.eager, self.truth.float()):
            assert_close_to_truth(actual, self.eager, self.truth)

    def test_refuses_too_large_an_error(self):
        eps = torch.finfo(torch.bfloat16).eps
        with pytest.raises(AssertionError, match="max error"):
            assert_close_to_truth(self.truth + 5 * 5 * eps, self.eager, self.truth)
        with pytest.raises(AssertionError, match="max error"):  # a bfloat16 error where float32 was asked for
            assert_close_to_truth(self.eager, self.truth.float(), self.truth)

    def test_refuses_what_is_wrong_in_all_small_entries(self):
        """Of one certain word and a thousand of 0.1 % each: bfloat16's eps of the first exceeds all the others."""
        truth = torch.full((1001,), 1e-3, dtype=torch.float64)
        truth[7] = 1.0
        eager = truth.to(torch.bfloat16)
        without = torch.where(truth == 1.0, truth, 0.0)
        with pytest.raises(AssertionError, match="RMS error"):
            assert_close_to_truth(without, eager, truth)
        assert (without - truth).abs().max() < torch.finfo(torch.bfloat16).eps

    def test_refuses_a_broken_yardstick(self):
        with pytest.raises(AssertionError, match="broken yardstick"):
            assert_close_to_truth(self.truth, self.truth.float() + 1, self.truth)

    def test_a_sum_one_by_one_is_no_broken_yardstick_but_a_wrong_one_is(self):
        terms = torch.rand(151_936, generator=torch.Generator().manual_seed(0))
        truth, one_by_one = terms.double().sum()[None], functools.reduce(torch.add, terms.unbind())[None]
        assert_close_to_truth(terms.sum()[None], one_by_one, truth, eager_cap=sum_cap(len(terms)))
        with pytest.raises(AssertionError, match="broken yardstick"):
            assert_close_to_truth(terms.sum()[None], one_by_one, truth)
        for off, few in ((0.99, len(terms)), (truth.to(torch.bfloat16) / truth, 1024)):
            with pytest.raises(AssertionError, match="broken yardstick"):
                assert_close_to_truth(terms.sum()[None], (truth * off).float(), truth, eager_cap=sum_cap(few))
        assert sum_cap(151_936, exponents=3.0, dtype=torch.bfloat16) == 64.0

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_refuses_special_values_in_other_places(self, value):
        actual, truth = self.truth.clone(), self.truth.clone()
        actual[3] = value
        with pytest.raises(AssertionError, match="1 places"):
            assert_close_to_truth(actual, self.eager, truth)
        truth[3] = value
        assert_close_to_truth(actual, self.eager, truth)

    def test_refuses_a_wrong_shape_and_a_float32_truth(self):
        with pytest.raises(AssertionError, match="shape"):
            assert_close_to_truth(self.truth[:3], self.eager, self.truth)
        with pytest.raises(AssertionError, match="float64"):
            assert_close_to_truth(self.truth, self.eager, self.truth.float())

    def test_floor_admits_the_rounding_of_a_difference(self):
        actual = torch.full((4,), 1e-6)
        truth = torch.zeros(4, dtype=torch.float64)
        eager = torch.zeros(4)
        with pytest.raises(AssertionError, match="max error"):
            assert_close_to_truth(actual, eager, truth)
        assert_close_to_truth(actual, eager, truth, floor=10.0)

    def test_poisoned_memory_is_poisoned_and_ends(self):
        with poisoned_memory():
            assert torch.empty(100).isnan().all() and torch.ones(3).new_empty(4).isnan().all()
        assert not torch.are_deterministic_algorithms_enabled()


def test_cases_are_named_once_and_deterministic():
    for cases, make in ((HEAD_CASES, head_inputs), (ATTENTION_CASES, attention_inputs)):
        assert len({case.name for case in cases}) == len(cases)
        first, second = make(cases[1], seed=3), make(cases[1], seed=3)
        for name, tensor in first.items():
            assert second[name] is None if tensor is None else torch.equal(tensor, second[name]), name
    case = next(case for case in ATTENTION_CASES if case.padding == "left")
    mask = attention_inputs(case)["key_padding_mask"]
    assert mask[:, -1].all() and mask.sum(-1).unique().numel() > 1
