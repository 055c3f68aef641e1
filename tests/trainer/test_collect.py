"""A round of rollouts: every number of it made again from the model's own forward pass and the rewards by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from mmrpt.advantage import group_advantages
from mmrpt.corpus import seed_of
from mmrpt.perturbation import blacken_patches
from mmrpt.rewards.combine import REWARDS
from mmrpt.rewards.custom import COLUMNS
from mmrpt.rollout.collect import collect_round
from mmrpt.rollout.prompts import restore_text
from tests.trainer.conftest import make_looking_policy, masked_colour, response_logits


@pytest.fixture
def policy(looking_policy):
    return looking_policy


@pytest.fixture
def asked(pairs):
    samples = [masked_colour(pairs, i) for i in (3, 0, 5, 2, 7, 4)]
    return samples, {s.example_id: pairs.image(s.example_id) for s in samples}


@pytest.fixture
def settings(small_settings):
    return small_settings("rollout.group_size=3", "rollout.max_new_tokens=5", "reward.format=1", "reward.semantic=0")


def batch_of(policy, group, image):
    pixels = policy.pixels([image])
    return policy.batch([group.prompt] * len(group.responses), group.responses, pixels, [0] * len(group.responses))


def test_groups_hold_what_was_sampled(policy, asked, settings, rewards_with_signal):
    samples, images = asked
    outcome = collect_round(policy, samples, images, settings, seed=1)
    assert len(outcome.rollouts) == len(outcome.rewards) == 18
    assert [(r.sample_id, r.group) for r in outcome.rollouts] == [
        (s.id, i) for i, s in enumerate(samples) for _ in "abc"
    ]
    weight = settings.reward.format + settings.reward.exact + settings.reward.prefix + settings.reward.semantic
    for rollout, reward in zip(outcome.rollouts, outcome.rewards, strict=True):
        body = [t for t in rollout.token_ids if t != policy.eos_token_id]
        assert rollout.completion == policy.tokenizer.decode(body)
        assert rollout.finished == (rollout.token_ids[-1] == policy.eos_token_id)
        assert rollout.finished or len(rollout.token_ids) == 5
        assert reward == pytest.approx(weight * rewards_with_signal(rollout.completion))
    table = torch.tensor(outcome.rewards).view(6, 3)
    with_signal = [i for i in range(6) if len(set(table[i].tolist())) > 1]
    assert 0 < len(with_signal) < 6, "the seed must give groups of both kinds"
    assert [g.sample_id for g in outcome.groups] == [samples[i].id for i in with_signal]
    advantages, _ = group_advantages(table)
    for group, i in zip(outcome.groups, with_signal, strict=True):
        own = outcome.rollouts[3 * i : 3 * i + 3]
        assert group.example_id == samples[i].example_id
        assert group.responses == [list(r.token_ids) for r in own]
        assert group.response_tokens == sum(len(r.token_ids) for r in own)
        assert samples[i].masked_caption in policy.tokenizer.decode(group.prompt)
        assert torch.equal(group.rewards, table[i]) and torch.equal(group.advantages, advantages[i])
        width = max(len(r.token_ids) for r in own)
        assert group.logps.shape == group.perception.shape == (3, width)


def test_log_probs_and_perception_are_those_of_full_forward_passes(policy, asked, settings, rewards_with_signal):
    samples, images = asked
    outcome = collect_round(policy, samples, images, settings, seed=1)
    largest = 0.0
    for group in outcome.groups:
        damaged = blacken_patches(
            images[group.example_id],
            seed=seed_of(1, group.sample_id),
            patch_size=settings.perception.patch_size,
            probability=settings.perception.probability,
        )
        with torch.no_grad():
            clean = response_logits(policy, batch_of(policy, group, images[group.example_id]))
            blind = response_logits(policy, batch_of(policy, group, damaged))
        for j, response in enumerate(group.responses):
            p, q = clean[j].double().log_softmax(-1), blind[j].double().log_softmax(-1)
            logps = p.gather(-1, torch.tensor(response)[:, None])[:, 0]
            np.testing.assert_allclose(group.logps[j, : len(response)], logps, rtol=1e-3, atol=1e-4)
            kl = (p.exp() * (p - q)).nan_to_num(0.0).sum(-1)
            np.testing.assert_allclose(group.perception[j, : len(response)], kl, rtol=1e-2, atol=1e-5)
            assert (group.logps[j, len(response) :] == 0).all() and (group.perception[j, len(response) :] == 0).all()
            largest = max(largest, float(kl.max()))
    assert largest > 1e-2


def test_a_round_depends_on_its_arguments_alone(policy, asked, settings, rewards_with_signal):
    samples, images = asked
    rounds = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(rounds))
        np.random.seed(len(rounds))
        policy.model.train(len(rounds) == 0)
        rounds.append(collect_round(policy, samples, images, settings, seed=seed))
    assert rounds[0].rollouts == rounds[1].rollouts != rounds[2].rollouts
    assert rounds[0].metrics == rounds[1].metrics
    for a, b in zip(rounds[0].groups, rounds[1].groups, strict=True):
        assert torch.equal(a.logps, b.logps) and torch.equal(a.perception, b.perception)


def test_metrics_are_means_over_all_that_was_sampled(policy, asked, settings, rewards_with_signal):
    samples, images = asked
    outcome = collect_round(policy, samples, images, settings, seed=3)
    rewards = np.array(outcome.rewards).reshape(6, 3)
    lengths = [len(r.token_ids) for r in outcome.rollouts]
    right = np.array([rewards_with_signal(r.completion) for r in outcome.rollouts]).reshape(6, 3)
    expected = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(1, ddof=1).mean(),
        "accuracy": right.mean(),
        "format": right.mean(),
        "groups_kept": len(outcome.groups) / 6,
        "groups_too_hard": (right.sum(1) == 0).mean(),
        "groups_too_easy": (right.sum(1) == 3).mean(),
        "response_length": np.mean(lengths),
        "finished": np.mean([r.finished for r in outcome.rollouts]),
        **{f"reward/{name}": right.mean() for name in REWARDS},
    }
    assert outcome.metrics == pytest.approx(expected, rel=1e-5)


def test_without_signal_there_is_no_group_and_no_second_pass(policy, asked, settings, monkeypatch):
    samples, images = asked
    monkeypatch.setattr("mmrpt.rollout.collect.score_tokens", None)  # calling it would fail
    outcome = collect_round(policy, samples, images, settings, seed=1)
    assert outcome.groups == [] and outcome.metrics["groups_kept"] == 0 and len(outcome.rollouts) == 18


@pytest.mark.parametrize(("right", "too_hard", "too_easy"), [(0.0, 1.0, 0.0), (1.0, 0.0, 1.0)])
def test_groups_all_wrong_or_all_right_are_dropped_whatever_else_they_earn(
    policy, asked, settings, rewards_with_signal, monkeypatch, right, too_hard, too_easy
):
    """The form of the answers differs, so rewards do: it must not become the whole of a step's gradient."""
    samples, images = asked
    monkeypatch.setitem(REWARDS, "exact", lambda completions, **_: [right] * len(completions))
    outcome = collect_round(policy, samples, images, settings, seed=1)
    assert outcome.metrics["reward_std"] > 0 and outcome.groups == []
    assert outcome.metrics["groups_too_hard"] == too_hard and outcome.metrics["groups_too_easy"] == too_easy


def test_a_reward_that_is_not_finite_names_its_sample(policy, asked, settings, rewards_with_signal, monkeypatch):
    samples, images = asked
    bad = [1.0] * 7 + [float("nan")] + [0.0] * 10
    monkeypatch.setitem(REWARDS, "semantic", lambda completions, **_: bad)
    with pytest.raises(ValueError, match=f"reward term 'semantic' is nan for sample {samples[2].id}, which begins"):
        collect_round(policy, samples, images, settings, seed=1)


def test_own_rewards_see_every_column_and_add_to_the_total(policy, asked, settings, rewards_with_signal):
    samples, images = asked
    seen = {}

    def long(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [None if i < 3 else float(len(text)) for i, text in enumerate(completions)]

    options = replace(settings, reward=replace(settings.reward, custom={"my.py:long": 0.25, "my.py:never": 1.0}))
    custom = {"long": long, "never": lambda completions, **_: [None] * len(completions)}
    plain = collect_round(policy, samples, images, settings, seed=1)
    outcome = collect_round(policy, samples, images, options, seed=1, custom=custom)
    assert set(seen) == set(COLUMNS)
    lengths = [len(r.completion) for r in outcome.rollouts]
    added = [0.0] * 3 + [0.25 * length for length in lengths[3:]]
    assert outcome.rewards == pytest.approx([a + b for a, b in zip(plain.rewards, added, strict=True)])
    assert outcome.metrics["reward/long"] == pytest.approx(np.mean(lengths[3:]))
    assert "reward/never" not in outcome.metrics
    for i, rollout in enumerate(outcome.rollouts):
        sample = samples[i // 3]
        assert seen["prompts"][i] == restore_text(sample, settings.prompts)
        assert (seen["completions"][i], seen["completion_ids"][i]) == (rollout.completion, list(rollout.token_ids))
        found = {name: seen[name][i] for name in ("id", "example_id", "answer", "masked_caption")}
        assert found == {name: getattr(sample, name) for name in found}
    with pytest.raises(ValueError, match=r"unknown reward terms \['long', 'never'\]"):
        collect_round(policy, samples, images, options, seed=1)


def test_reference_and_trainer_log_probs_are_those_of_full_forward_passes(policy, asked, settings, rewards_with_signal):
    samples, images = asked
    reference = make_looking_policy(seed=1)
    rl = replace(settings.rl, kl_coef=0.1, max_importance=2.0)
    model = replace(settings.model, batch_tokens=130)  # a pass for each group or two
    options = replace(settings, rl=rl, model=model, rollout=replace(settings.rollout, temperature=0.8))
    outcome = collect_round(policy, samples, images, options, seed=1, reference=partial(nullcontext, reference))
    assert len(outcome.groups) > 1
    for group in outcome.groups:
        for model, found in ((policy, group.trainer_logps), (reference, group.ref_logps)):
            with torch.no_grad():
                rows = response_logits(model, batch_of(model, group, images[group.example_id]))
            assert found.shape == group.logps.shape
            for j, response in enumerate(group.responses):
                wanted = (rows[j] / 0.8).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
                np.testing.assert_allclose(found[j, : len(response)], wanted, rtol=1e-3, atol=1e-4)
                assert (found[j, len(response) :] == 0).all()
        assert (group.ref_logps - group.logps).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"rl.kl_coef is 0.1, but no reference policy"):
        collect_round(policy, samples, images, options, seed=1)
    plain = collect_round(policy, samples, images, settings, seed=1)
    assert all(group.ref_logps is None and group.trainer_logps is None for group in plain.groups)


def test_perception_can_be_switched_off(policy, asked, settings, rewards_with_signal, monkeypatch):
    samples, images = asked
    monkeypatch.setattr("mmrpt.rollout.collect.score_tokens", None)
    off = replace(settings, perception=replace(settings.perception, enabled=False))
    outcome = collect_round(policy, samples, images, off, seed=1)
    assert outcome.groups and all((g.perception == 0).all() for g in outcome.groups)


def test_right_answers_are_also_rewarded_by_the_image_s_share(policy, asked, small_settings, rewards_with_signal):
    """Made again by hand: the plain rewards, plus the weight times 1 - q / p for right answers alone."""
    samples, images = asked
    options = "rollout.group_size=3", "rollout.max_new_tokens=5"
    plain = collect_round(policy, samples, images, small_settings(*options), seed=1)
    for enabled in ("true", "false"):
        settings = small_settings(*options, "reward.visual=0.5", f"perception.enabled={enabled}")
        outcome = collect_round(policy, samples, images, settings, seed=1)
        assert outcome.rollouts == plain.rollouts and len(outcome.groups) == len(plain.groups) > 0
        rewarded = 0
        for group, without in zip(outcome.groups, plain.groups, strict=True):
            damaged = blacken_patches(
                images[group.example_id],
                seed=seed_of(1, group.sample_id),
                patch_size=settings.perception.patch_size,
                probability=settings.perception.probability,
            )
            sums = []
            for image in (images[group.example_id], damaged):
                with torch.no_grad():
                    rows = [row.log_softmax(-1) for row in response_logits(policy, batch_of(policy, group, image))]
                chosen = [
                    row.gather(-1, torch.tensor(response)[:, None]).sum()
                    for row, response in zip(rows, group.responses, strict=True)
                ]
                sums.append(torch.stack(chosen))
            texts = [policy.tokenizer.decode([t for t in r if t != policy.eos_token_id]) for r in group.responses]
            right = torch.tensor([float(rewards_with_signal(text)) for text in texts])
            share = (1 - (sums[1] - sums[0]).exp()).clamp_min(0) * right
            torch.testing.assert_close(group.rewards, without.rewards + 0.5 * share, rtol=0, atol=1e-3)
            torch.testing.assert_close(group.advantages, group_advantages(group.rewards[None])[0][0])
            rewarded += int((share > 1e-3).sum())
        assert rewarded > 0


def test_the_same_caption_twice_in_a_round_gives_two_groups(policy, asked, settings, rewards_with_signal):
    """At an epoch's end a sample can follow itself."""
    samples, images = asked
    outcome = collect_round(policy, [samples[0]] * 6, images, settings, seed=5)
    assert len(outcome.groups) > 1
    responses = [tuple(map(tuple, g.responses)) for g in outcome.groups]
    assert len(set(responses)) == len(responses)  # the draws differ although the prompts do not


def test_the_greatest_reward_wins_the_greatest_advantage(policy, asked, settings, rewards_with_signal):
    samples, images = asked
    for group in collect_round(policy, samples, images, settings, seed=1).groups:
        assert int(group.advantages.argmax()) == int(group.rewards.argmax())
        assert float(group.advantages.sum()) == pytest.approx(0, abs=1e-5)
