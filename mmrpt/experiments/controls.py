"""What reinforcement adds to looking, against every control."""

from __future__ import annotations

from mmrpt.experiments.arms import QUESTIONS, Arm, Experiment

CONTROLS = Experiment(
    name="controls",
    question="Does reinforcement add to looking, and more than other training of the same warm start?",
    base=(
        QUESTIONS,
        "control.kinds=[captions, captions_seconds, supervised_masks, rl_blanked, rl_random_masks, grpo]",
    ),
    arms=(
        Arm("warm start", model="warmup"),
        Arm("RL"),
        Arm("captions for RL's steps", model="control"),
        Arm("captions for RL's seconds", model="captions_seconds"),
        Arm("supervised on RL's masks for RL's seconds", model="supervised_masks"),
        Arm("RL with blanked images", model="rl_blanked"),
        Arm("RL on random masks", model="rl_random_masks"),
        Arm("GRPO: RL without VPPO's parts", model="grpo"),
    ),
    baseline="warm start",
    method="RL",
    by_kind=True,
)
