"""What of the settings TRL's engine honours, as arguments of GRPOConfig; the rest is refused by name."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from mmrpt.settings import Settings, SettingsError

# Settings that only the native engine reads, each with the value that asks for nothing.
NATIVE_ONLY: dict[str, Any] = {
    "rl.caption_weight": 0.0,
    "rl.max_importance": None,
    "rl.entropy_coef": 0.0,
    "rl.optimiser.kind": "adamw",
    "rl.optimiser.vision_scale": 1.0,
    "reward.visual": 0.0,
    "evaluation.every": 0,
    "model.lora.rank": 0,
}
LOSSES = {  # (rl.loss, rl.advantage, rl.aggregation): TRL's loss
    ("clip", "grpo", "token_mean"): {"loss_type": "dapo"},
    ("clip", "grpo", "sequence_mean"): {"loss_type": "grpo"},
    ("clip", "dr_grpo", "token_mean"): {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ("cispo", "grpo", "token_mean"): {"loss_type": "cispo"},  # TRL's gspo weighs sequences, which no filter can
}
CONTROLS = {"captions"}  # that need neither RL nor its seconds


def _check(settings: Settings, processes: int) -> None:
    """Raises SettingsError where the settings ask for what this engine does not do, all of it in one message."""
    wrong = []
    for name, value in NATIVE_ONLY.items():
        if (given := attrgetter(name)(settings)) != value:
            wrong.append(f"{name} is {given}: expected {'null' if value is None else value}")
    if settings.perception.kind == "mass":
        wrong.append("perception.kind is mass: expected kl, k3 or js")
    loss = (settings.rl.loss, settings.rl.advantage, settings.rl.aggregation)
    if loss not in LOSSES:
        wrong.append(f"rl.loss, rl.advantage and rl.aggregation are {', '.join(loss)}, which TRL has no loss for")
    if settings.rl.loss == "cispo" and settings.rl.clip_low < 1:
        wrong.append(f"rl.clip_low is {settings.rl.clip_low}: expected 1, since TRL's cispo has no lower clip")
    if settings.rollout.prompts % settings.rl.groups_per_step:
        wrong.append(
            f"rollout.prompts is {settings.rollout.prompts}: expected a multiple of rl.groups_per_step, "
            f"{settings.rl.groups_per_step}, since a round is used up before the next"
        )
    allowed = CONTROLS if processes == 1 else set()
    if extra := sorted(set(settings.control.kinds) - allowed):
        wrong.append(f"control.kinds has {', '.join(extra)}: expected {'captions or ' if allowed else ''}[]")
    if wrong:
        raise SettingsError("engine is trl, which cannot honour: " + "; ".join(wrong) + ". Or use engine=native.")


def grpo_options(settings: Settings, folder: str, processes: int) -> dict[str, Any]:
    """Arguments of GRPOConfig, those of the setting `trl` included. Raises SettingsError where they cannot be met, with
    all that this engine cannot honour in one message."""
    _check(settings, processes)
    rl, rollout, optimiser = settings.rl, settings.rollout, settings.rl.optimiser
    size, given = rollout.group_size, dict(settings.trl)
    rows = rl.groups_per_step * size  # of an optimiser step, on all processes
    per_device = given.setdefault("per_device_train_batch_size", _largest_part(rl.groups_per_step, processes) * size)
    if rows % (per_device * processes):
        raise SettingsError(
            f"rl.groups_per_step * rollout.group_size is {rows}: expected a multiple of {processes} processes times "
            f"per_device_train_batch_size, {per_device}."
        )
    steps = rows // (per_device * processes)
    decided = {
        "output_dir": folder,
        "seed": settings.seed,
        "max_steps": rl.steps,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_every,
        "save_total_limit": 2,
        "logging_steps": 1,
        "gradient_accumulation_steps": steps,
        "steps_per_generation": steps * rollout.prompts // rl.groups_per_step,
        "num_generations": size,
        "max_completion_length": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "learning_rate": optimiser.lr,
        "warmup_steps": optimiser.warmup_steps,
        "lr_scheduler_type": "constant_with_warmup" if optimiser.final_fraction == 1 else "cosine_with_min_lr",
        "lr_scheduler_kwargs": None if optimiser.final_fraction == 1 else {"min_lr_rate": optimiser.final_fraction},
        "weight_decay": optimiser.weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": optimiser.beta2,
        "max_grad_norm": optimiser.max_grad_norm,
        "beta": rl.kl_coef,
        "epsilon": rl.clip_low,
        "epsilon_high": 1 + rl.clip_high if rl.loss == "cispo" else rl.clip_high,  # there a ratio, not a distance
        "delta": rl.dual_clip,
        "reward_weights": list(settings.reward.weights().values()),
        "bf16": settings.model.compute == "bfloat16",
        "gradient_checkpointing": settings.model.gradient_checkpointing,
        **LOSSES[rl.loss, rl.advantage, rl.aggregation],
    }
    if twice := sorted(decided.keys() & given.keys()):
        raise SettingsError(f"trl gives {', '.join(twice)}, which other settings decide: leave them out of trl.")
    defaults = {"report_to": [], "disable_tqdm": False}
    return defaults | decided | given


def _largest_part(groups: int, processes: int) -> int:
    """Groups of a micro-batch: all of a process's share where the processes divide a step's groups, else one."""
    return groups // processes if groups % processes == 0 else 1
