"""The visual term of the reward at three weights."""

from __future__ import annotations

from mmrpt.experiments.arms import NO_CONTROL, Arm, Experiment

VISUAL_REWARD = Experiment(
    name="visual-reward",
    question="Does a reward for what the image adds to a right answer make a model look more?",
    base=NO_CONTROL,
    arms=(
        Arm("warm start", model="warmup"),
        Arm("weight 0", ("reward.visual=0",)),
        Arm("weight 0.2", ("reward.visual=0.2",)),
        Arm("weight 0.5", ("reward.visual=0.5",)),
    ),
    baseline="weight 0",
    by_kind=True,
)
