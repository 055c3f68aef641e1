"""How much of the words the text gives away: none, as by default, nearly all."""

from __future__ import annotations

from mmrpt.experiments.arms import NO_CONTROL, Arm, Experiment


def _arms(bias: float) -> tuple[Arm, Arm]:
    overrides, start = (f"demo.world.language_bias={bias:g}",), f"bias {bias:g}: warm start"
    return Arm(start, overrides, model="warmup"), Arm(f"bias {bias:g}: RL", overrides, against=start)


LANGUAGE_BIAS = Experiment(
    name="language-bias",
    question="Does reinforcement add to looking, whether captions give their words away or not?",
    base=NO_CONTROL,
    arms=(*_arms(0.0), *_arms(0.3), *_arms(0.9)),
    baseline="bias 0: warm start",
    by_kind=True,
)
