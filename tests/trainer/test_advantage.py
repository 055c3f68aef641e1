"""Group advantages: laws that hold for any rewards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrpt.advantage import group_advantages

REWARDS = st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.3]), min_size=4, max_size=4), min_size=1, max_size=5)


@given(REWARDS, st.sampled_from(["grpo", "dr_grpo"]))
def test_advantages_are_centred_ordered_and_zero_without_signal(rewards, kind):
    rewards = torch.tensor(rewards)
    advantages, signal = group_advantages(rewards, kind=kind)
    torch.testing.assert_close(advantages.sum(-1), torch.zeros(len(rewards)), atol=1e-5, rtol=0)
    assert torch.equal(signal, rewards.amax(-1) > rewards.amin(-1))
    assert (advantages[~signal] == 0).all()
    same_order = (advantages[:, :, None] - advantages[:, None]) * (rewards[:, :, None] - rewards[:, None]) >= 0
    assert same_order.all()


def test_grpo_divides_by_the_deviation_and_dr_grpo_does_not():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    grpo, _ = group_advantages(rewards, eps=0.0)
    torch.testing.assert_close(grpo, (rewards - 0.5) / rewards.std(-1, keepdim=True))
    dr, _ = group_advantages(rewards, kind="dr_grpo")
    assert dr.tolist() == [[-0.5, -0.5, 0.5, 0.5]]


def test_a_group_needs_right_and_wrong_answers():
    """All wrong with one malformed answer; half right; all right with one malformed answer; rewards all equal."""
    rewards = torch.tensor([[0.0, 0.1, 0.1, 0.1], [1.0, 0.0, 1.0, 0.0], [1.1, 1.1, 1.1, 1.0], [1.0, 1.0, 1.0, 1.0]])
    accuracy = torch.tensor([0.0, 0.5, 1.0, 0.5])
    advantages, signal = group_advantages(rewards, accuracy)
    assert signal.tolist() == [False, True, False, False]
    assert (advantages[~signal] == 0).all() and (advantages[1] != 0).all()
    assert group_advantages(rewards)[1].tolist() == [True, True, True, False]
    assert group_advantages(rewards, accuracy, min_accuracy=0, max_accuracy=1)[1].tolist() == [True, True, True, False]
    for limits, kept in (((0.5, 0.5), True), ((0.51, 0.99), False), ((0.01, 0.49), False)):
        _, signal = group_advantages(rewards[1:2], accuracy[1:2], min_accuracy=limits[0], max_accuracy=limits[1])
        assert signal.tolist() == [kept], limits
    with pytest.raises(ValueError, match=r"accuracy has shape \(3,\)"):
        group_advantages(rewards, accuracy[:3])


@pytest.mark.parametrize("rewards", [torch.ones(3, 1), torch.ones(4), torch.tensor([[1.0, float("nan")]])])
def test_bad_rewards_are_refused(rewards):
    with pytest.raises(ValueError, match="expected|NaN"):
        group_advantages(rewards)
