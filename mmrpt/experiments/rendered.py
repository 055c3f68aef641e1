"""The method on the second world: rendered scenes of solids in the place of drawn cards."""

from __future__ import annotations

from mmrpt.experiments.arms import QUESTIONS, Arm, Experiment

RENDERED = Experiment(
    name="rendered",
    question="Does what holds on drawn cards hold on rendered scenes, for which nothing was tuned?",
    base=(QUESTIONS, "demo.world.kind=rendered", "control.kinds=[captions_seconds, supervised_masks]"),
    arms=(
        Arm("warm start", model="warmup"),
        Arm("RL"),
        Arm("captions for RL's seconds", model="captions_seconds"),
        Arm("supervised on RL's masks for RL's seconds", model="supervised_masks"),
    ),
    baseline="warm start",
    method="RL",
    by_kind=True,
)
