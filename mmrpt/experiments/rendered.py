"""The method on the second world: rendered scenes of solids in the place of drawn cards."""

from __future__ import annotations

from mmrpt.experiments.arms import QUESTIONS, Experiment
from mmrpt.experiments.controls import AT_EQUAL_SECONDS

RENDERED = Experiment(
    name="rendered",
    question="Does what holds on drawn cards hold on rendered scenes, for which nothing was tuned?",
    base=(QUESTIONS, "demo.world.kind=rendered", "control.kinds=[captions_seconds, supervised_masks]"),
    arms=AT_EQUAL_SECONDS,
    baseline="warm start",
    method="RL",
    by_kind=True,
)
