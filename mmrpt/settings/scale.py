"""What scale=tiny makes of the other settings, so that any recipe can be tried end to end on a CPU in a minute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

TINY_MODEL = "tiny_model"  # the folder, in that of the run, of the model that takes the place of model.path's

# No setting is larger than this; one that is null because it has no limit gets it.
TINY_CAPS: dict[str, int] = {
    "checkpoint_every": 1,
    "data.held_out": 4,
    "data.validation": 4,
    "model.min_pixels": 56 * 56,
    "model.max_pixels": 224 * 224,
    "warmup.steps": 2,
    "warmup.batch_size": 2,
    "masking.captions": 8,
    "masking.batch_tokens": 4096,
    "rollout.prompts": 2,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 8,
    "rl.steps": 2,
    "rl.groups_per_step": 2,
    "rl.max_rounds": 2,
    "evaluation.every": 1,
    "evaluation.samples": 4,
    "evaluation.sampled": 2,
    "evaluation.batch_size": 4,
    "demo.size": 64,
    "demo.vision_steps": 2,
    "demo.vision_batch_size": 4,
    "demo.vision_frozen_steps": 1,
    "demo.fact_steps": 1,
    "demo.lesson_batch_size": 2,
}
LEFT_NULL = ("model.min_pixels", "model.max_pixels")  # as the folder of the tiny model says

# Random weights never restore a word, so no group would have a signal and no step would train.
ANY_SIGNAL = {"min_accuracy": 0.0, "max_accuracy": 1.0}
ANY_REWARD = "mmrpt.rewards.arbitrary:arbitrary"


def scaled_down(settings: Any) -> dict[str, Any]:
    """The fields of `Settings` that differ with scale=tiny: sizes at most those of `TINY_CAPS`, a reward that differs
    between any two answers, groups kept however many of their answers are right, and nothing of `trl`, which is about
    GPUs."""
    fields: dict[str, Any] = {}
    for name, cap in TINY_CAPS.items():
        group, _, key = name.rpartition(".")
        owner = fields.get(group, getattr(settings, group)) if group else settings
        value = getattr(owner, key)
        if value is None and name in LEFT_NULL:
            continue
        value = cap if value is None else min(value, cap)
        if group:
            fields[group] = replace(owner, **{key: value})
        else:
            fields[key] = value
    custom = {ANY_REWARD: 1.0} | settings.reward.custom
    return fields | {
        "rl": replace(fields["rl"], **ANY_SIGNAL),
        "reward": replace(settings.reward, custom=custom),
        "trl": {},
    }
