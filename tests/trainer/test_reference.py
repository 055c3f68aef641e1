"""The reference of rl.kl_coef is the warm start, in a whole run and in one that was interrupted."""

from __future__ import annotations

import pytest

from mmrpt.corpus import read_jsonl
from mmrpt.engines import native
from mmrpt.engines.run import open_run
from tests.trainer.test_resume import finish, outside_world, settings_in, without_seconds  # noqa: F401  outside_world is a fixture

OVERRIDES = ("rl.kl_coef=0.1", "rl.max_importance=2", "rl.statistics_every=1", "control.kinds=[]")


def rl_rows(settings):
    rows = read_jsonl(settings.run_dir / "metrics.jsonl")
    return without_seconds(row for row in rows if row["phase"] == "rl")


def test_the_policy_leaves_the_reference_and_an_interrupted_run_finds_it_again(tmp_path, monkeypatch):
    straight = settings_in(tmp_path / "straight", *OVERRIDES)
    finish(straight)
    divergences = [row["ref_kl"] for row in rl_rows(straight)]
    assert len(divergences) == 6 and abs(divergences[0]) < 1e-6 < min(divergences[1:])

    cut = settings_in(tmp_path / "cut", *OVERRIDES)
    log_step, steps = native.log_step, iter(range(100))

    def die_in_the_fifth(*args, **options):
        if next(steps) == 4:
            raise KeyboardInterrupt
        log_step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(native, "log_step", die_in_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            finish(cut)
    finish(cut)
    assert rl_rows(cut) == rl_rows(straight)


def test_a_frozen_copy_is_apart_from_the_policy(tmp_path):
    settings = settings_in(tmp_path, "rl.steps=0", "control.kinds=[]")
    finish(settings)
    run = open_run(settings)
    run.load("warmup")
    with run.frozen("warmup")() as frozen:
        assert frozen is not run.policy
    own, copied = (dict(policy.model.named_parameters()) for policy in (run.policy, frozen))
    assert all(copied[name].equal(own[name]) for name in own)
    assert not any(parameter.requires_grad for parameter in copied.values())
    assert all(parameter.requires_grad for parameter in own.values())
    run.policy.head_weight.data.add_(1.0)
    assert not frozen.head_weight.equal(run.policy.head_weight)
