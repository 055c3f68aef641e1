"""Float32 weights with bfloat16 compute (model.compute=bfloat16) learn what float32 learns, from the same start."""

from __future__ import annotations

import pytest
import torch

from mmrpt.captions import caption_batch
from mmrpt.corpus import ImageCache, items_at, seed_of
from mmrpt.engines.rl_step import train_on_groups
from mmrpt.objective import supervised_loss
from mmrpt.optimiser import Optimiser
from mmrpt.rewards.combine import REWARDS
from mmrpt.rollout.collect import collect_round
from mmrpt.settings import OptimiserSettings, PromptSettings, RLSettings, RolloutSettings, Settings
from tests.trainer.conftest import ColourPairs, make_looking_policy, masked_colour

FULL, HALF = torch.float32, torch.bfloat16
PAIRS = ColourPairs()
IMAGES = ImageCache(PAIRS, 1 << 20)
SETTINGS = Settings(
    rollout=RolloutSettings(prompts=4, group_size=8, max_new_tokens=8),
    rl=RLSettings(steps=12, caption_weight=0.0, optimiser=OptimiserSettings(lr=2e-2, warmup_steps=0)),
)


@pytest.fixture(autouse=True)
def many_es(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that a tiny model learns in a few steps: the share of the letter e, up to a quarter."""

    def reward(completions: list[str], **_) -> list[float]:
        return [min(1.0, 4 * text.count("e") / max(1, len(text))) for text in completions]

    for name in REWARDS:
        monkeypatch.setitem(REWARDS, name, reward)


def captions(policy, seed: int, step: int, size: int = 6):
    items = items_at(step * size, size, len(PAIRS), seed, "captions")
    return caption_batch(policy, PAIRS, items, PromptSettings(), restore_fraction=0.5, seed=seed_of(seed, "rows", step))


@torch.no_grad()
def loss_of(policy) -> float:
    """Of captions of another seed, in float32."""
    compute, policy.compute = policy.compute, FULL
    loss = supervised_loss(policy, captions(policy, 99, 0, size=24)).item()
    policy.compute = compute
    return loss


def warm_up(policy, seed: int, steps: int, optimiser: OptimiserSettings) -> float:
    """By how much the loss falls."""
    before, parts = loss_of(policy), Optimiser(policy.model, optimiser)
    for step in range(steps):
        supervised_loss(policy, captions(policy, seed, step)).backward()
        parts.step(step, steps)
    return before - loss_of(policy)


def sampled(policy, seed: int, step: int):
    items = items_at(step * 4, 4, len(PAIRS), seed, "rl")
    samples = [masked_colour(PAIRS, i) for i in items]
    shown = IMAGES.many([sample.example_id for sample in samples])
    return collect_round(policy, samples, shown, SETTINGS, seed=seed_of(seed, "round", step))


def reinforce(policy, seed: int) -> float:
    """By how much the mean reward of all steps is above the first step's: how fast it rises counts too."""
    optimiser, rewards = Optimiser(policy.model, SETTINGS.rl.optimiser), []
    for step in range(SETTINGS.rl.steps):
        outcome = sampled(policy, seed, step)
        rewards.append(sum(outcome.rewards) / len(outcome.rewards))
        train_on_groups(policy, optimiser, outcome.groups, IMAGES, SETTINGS, step)
    return sum(rewards) / len(rewards) - rewards[0]


def policy_of(seed: int, compute: torch.dtype, weights: torch.dtype = FULL):
    policy = make_looking_policy(seed)
    policy.model.to(weights)
    policy.compute = compute
    return policy


def differs(found: list[float], wanted: list[float]) -> bool:
    """Whether the means are further apart than the seeds of `wanted`."""
    return abs(sum(found) / len(found) - sum(wanted) / len(wanted)) > max(wanted) - min(wanted)


@pytest.mark.slow
def test_warm_up_and_reinforcement_learn_the_same():
    falls, rises = {FULL: [], HALF: []}, {FULL: [], HALF: []}
    for compute in (FULL, HALF):
        for seed in range(4):
            policy = policy_of(seed, compute)
            falls[compute].append(warm_up(policy, seed, 20, OptimiserSettings(lr=3e-3, warmup_steps=5)))
            rises[compute].append(reinforce(policy, seed))
    assert min(falls[FULL]) > 1.0 and min(rises[FULL]) > 0.1, "there is something to be learned"
    assert not differs(falls[HALF], falls[FULL]), falls
    assert not differs(rises[HALF], rises[FULL]), rises


def test_small_learning_rates_reach_float32_weights_and_no_others():
    """At 1e-5 most updates are less than half the last place of a bfloat16 weight."""
    optimiser = OptimiserSettings(lr=1e-5, warmup_steps=0)
    full, half, lost = (
        [warm_up(policy_of(seed, *dtypes), seed, 8, optimiser) for seed in range(3)]
        for dtypes in ((FULL,), (HALF,), (HALF, HALF))
    )
    assert min(full) > 0.01 and not differs(half, full), (half, full)
    assert differs(lost, full), (lost, full)


class Recorder:
    """In the optimiser's place: keeps the gradients, end to end."""

    def __init__(self, policy) -> None:
        self.model = policy.model

    def step(self, step: int, steps: int) -> dict[str, float | bool]:
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return {"lr": 0.0, "grad_norm": 0.0, "skipped": False}


def test_a_steps_gradient_is_float32s_but_for_roundings():
    policy = policy_of(1, FULL)
    warm_up(policy, 1, 10, OptimiserSettings(lr=3e-3, warmup_steps=0))
    groups, found = sampled(policy, 1, 0).groups, {}
    for compute in (FULL, HALF):
        policy.compute, recorder = compute, Recorder(policy)
        train_on_groups(policy, recorder, groups, IMAGES, SETTINGS, 0)
        found[compute] = recorder.gradient
    off = ((found[HALF] - found[FULL]).norm() / found[FULL].norm()).item()
    eps = torch.finfo(HALF).eps
    # Three layers of some eight products and the head round two inputs forward and two gradients backward: a hundred
    # roundings, independent, of root mean square 0.21 eps each.
    assert eps / 4 < off < 100**0.5 * 0.21 * eps, off / eps
