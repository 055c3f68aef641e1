"""What a reinforcement step leaves behind: rows that agree with the groups and weights they tell of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmrpt.corpus import read_jsonl
from mmrpt.engines.rl_step import response_mask_of
from mmrpt.perception import shape_and_filter
from mmrpt.report import step_log
from mmrpt.rollout.buffer import stack_rows
from mmrpt.rollout.collect import collect_round
from mmrpt.run_folder import RunFolder
from tests.trainer.conftest import masked_colour

SECONDS = {"update": 2.0, "captions": 0.5}


@pytest.fixture
def step(policy, pairs, small_settings, rewards_with_signal):
    """Samples, the groups of two rounds, and their weights."""
    settings = small_settings("rollout.group_size=3", "reward.format=1")
    samples = [masked_colour(pairs, i) for i in range(8)]
    images = {s.example_id: pairs.image(s.example_id) for s in samples}
    rounds = [collect_round(policy, samples[:5], images, settings, seed=seed) for seed in (1, 2)]
    groups = [g for r in rounds for g in r.groups]
    assert len(groups) >= 3
    weights = shape_and_filter(
        stack_rows(groups, "perception"), response_mask_of(groups), keep_ratio=0.4, min_weight=0.9
    )
    return samples, groups, weights, rounds


def write(folder, policy, step, weights):
    samples, groups, _, rounds = step
    log = RunFolder(folder)
    step_log.log_step(
        log,
        7,
        groups,
        weights=weights,
        rounds=rounds,
        metrics={"loss": 0.25},
        seconds=SECONDS,
        samples=samples,
        policy=policy,
    )
    log.close()
    return {
        p.stem: read_jsonl(p)
        for p in (folder / f"{n}.jsonl" for n in ("metrics", "samples", "perception"))
        if p.exists()
    }


def test_metrics_join_the_step_and_its_rounds(policy, step, tmp_path):
    _, groups, weights, rounds = step
    (row,) = write(tmp_path, policy, step, weights)["metrics"]
    assert (row["phase"], row["step"], row["loss"]) == ("rl", 7, 0.25)
    assert (row["rounds"], row["groups"]) == (2, len(groups))
    for name in rounds[0].metrics:
        assert row[name] == pytest.approx((rounds[0].metrics[name] + rounds[1].metrics[name]) / 2), name
    lengths = torch.tensor([len(r) for g in groups for r in g.responses])
    assert row["kept_token_rate"] == pytest.approx(float((0.4 * lengths - 1e-9).ceil().sum() / lengths.sum()))
    every = torch.cat([g.perception[j, : len(r)] for g in groups for j, r in enumerate(g.responses)])
    assert row["perception_mean"] == pytest.approx(every.mean().item(), rel=1e-5)
    assert row["trajectory_weight_min"] == pytest.approx(weights.trajectory_weights.min().item())
    assert row["trajectory_weight_max"] == pytest.approx(weights.trajectory_weights.max().item())


def test_seconds_of_the_rounds_add_up_and_a_term_counts_in_the_rounds_that_have_it(policy, step, tmp_path):
    samples, groups, weights, rounds = step
    assert all(r.seconds.keys() == {"sampling", "reward", "perception"} for r in rounds)
    assert all(seconds > 0 for r in rounds for seconds in r.seconds.values())
    known = [
        replace(rounds[0], seconds={"sampling": 1.0, "reward": 0.25}, metrics=rounds[0].metrics | {"reward/own": 0.5}),
        replace(rounds[1], seconds={"sampling": 3.0, "perception": 0.75}),
    ]
    (row,) = write(tmp_path, policy, (samples, groups, weights, known), weights)["metrics"]
    expected = {"update": 2.0, "captions": 0.5, "sampling": 4.0, "reward": 0.25, "perception": 0.75}
    assert {name.removeprefix("seconds_"): row[name] for name in row if name.startswith("seconds_")} == expected
    assert row["reward/own"] == 0.5 and SECONDS == {"update": 2.0, "captions": 0.5}


def test_perception_rows_hold_every_trajectory_and_a_bounded_number_of_tokens(policy, step, tmp_path, monkeypatch):
    _, groups, weights, _ = step
    every = [float(v) for g in groups for j, r in enumerate(g.responses) for v in g.perception[j, : len(r)]]
    means = [float(g.perception[j, : len(r)].mean()) for g in groups for j, r in enumerate(g.responses)]
    (row,) = write(tmp_path / "a", policy, step, weights)["perception"]
    assert row["step"] == 7
    assert row["token_scores"] == pytest.approx(every, rel=1e-3)
    assert row["trajectory_scores"] == pytest.approx(means, rel=1e-3)
    monkeypatch.setattr(step_log, "PERCEPTION_TOKENS_PER_STEP", 5)
    (row,) = write(tmp_path / "b", policy, step, weights)["perception"]
    assert 5 <= len(row["token_scores"]) < 10 and set(row["token_scores"]) <= {float(f"{v:.4g}") for v in every}
    assert len(row["trajectory_scores"]) == len(means)


def test_samples_show_the_best_and_the_worst_of_a_group_as_they_were(policy, step, tmp_path):
    samples, groups, weights, _ = step
    rows = write(tmp_path, policy, step, weights)["samples"]
    assert len(rows) == 2 * step_log.GROUPS_SHOWN_PER_STEP
    by_id = {s.id: s for s in samples}
    for number, group in enumerate(groups[: step_log.GROUPS_SHOWN_PER_STEP]):
        best, worst = rows[2 * number : 2 * number + 2]
        assert best["reward"] == float(group.rewards.max()) > worst["reward"] == float(group.rewards.min())
        assert best["advantage"] > 0 > worst["advantage"]
        for row in (best, worst):
            sample = by_id[group.sample_id]
            assert row["step"] == 7 and row["sample_id"] == sample.id and row["example_id"] == sample.example_id
            assert (row["masked_caption"], row["answer"]) == (sample.masked_caption, sample.answer)
            j = next(
                j
                for j, ids in enumerate(group.responses)
                if [policy.tokenizer.decode([t]) for t in ids] == row["tokens"]
                and float(group.rewards[j]) == row["reward"]
            )
            assert row["completion"] == policy.tokenizer.decode(
                [t for t in group.responses[j] if t != policy.eos_token_id]
            )
            length = len(group.responses[j])
            assert row["perception"] == pytest.approx(group.perception[j, :length].tolist(), abs=1e-5)
            assert row["kept"] == weights.perception_mask[3 * number + j, :length].tolist()
            assert sum(row["kept"]) == -(-2 * length // 5)


def test_without_perception_there_is_none_to_tell(policy, step, tmp_path):
    rows = write(tmp_path, policy, step, None)
    assert "perception" not in rows and "kept_token_rate" not in rows["metrics"][0]
    assert all(row["kept"] is None for row in rows["samples"])


def test_a_step_that_sampled_nothing_has_no_rewards_of_its_own(policy, step, tmp_path):
    """Its groups waited in the buffer: the rounds they came from were told of before."""
    samples, groups, weights, _ = step
    (row,) = write(tmp_path, policy, (samples, groups, weights, []), weights)["metrics"]
    assert row["rounds"] == 0 and "reward" not in row and row["groups"] == len(groups)


def test_equal_groups_are_told_apart_by_identity(policy, step, tmp_path):
    """Twice the same sample in a step: each row's tokens come with the weights of its own group."""
    samples, groups, _, rounds = step
    first = groups[0]
    twin = replace(first, perception=first.perception.flip(1))
    mask = response_mask_of([first, twin])
    weights = shape_and_filter(stack_rows([first, twin], "perception"), mask, keep_ratio=0.4, min_weight=0.9)
    rows = write(tmp_path, policy, (samples, [first, twin], weights, rounds), weights)["samples"]
    kept = [row["kept"] for row in rows]
    assert all(weights.perception_mask[:3, : len(k)].tolist().count(k) for k in kept[:2])
    assert all(weights.perception_mask[3:, : len(k)].tolist().count(k) for k in kept[2:])
