"""VPPO's parts and its signal, each beside the same RL without them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmrpt.experiments.arms import NO_CONTROL, Arm, Experiment, logged_steps

if TYPE_CHECKING:
    from mmrpt.engines.run import Run


def speed(run: Run, arm: Arm) -> dict[str, Any]:
    """Response tokens that RL trained on, over the seconds of its steps and over those of their updates alone."""
    if not (rows := logged_steps(run, arm)):
        return {}
    parts: dict[str, float] = {}
    for name, value in (item for row in rows for item in row.items() if item[0].startswith("seconds_")):
        parts[name] = parts.get(name, 0.0) + value
    tokens = sum(row.get("tokens", 0) for row in rows)
    return {
        "tokens a second, whole step": tokens / sum(parts.values()),
        "tokens a second, update": tokens / parts["seconds_update"],
        "share of seconds that measure perception": parts.get("seconds_perception", 0.0) / sum(parts.values()),
    }


VPPO = Experiment(
    name="vppo",
    question="What do VPPO's token filter, advantage shaping and choice of signal each bring, and what do they cost?",
    base=NO_CONTROL,
    arms=(
        Arm("warm start", ("perception.enabled=false",), model="warmup"),
        Arm("neither", ("perception.enabled=false",)),
        Arm("filter alone (keep 40 %)", ("perception.keep_ratio=0.4", "perception.min_weight=1")),
        Arm("shaping alone (keep 100 %)", ("perception.keep_ratio=1",)),
        Arm("both (keep 40 %)", ("perception.keep_ratio=0.4",)),
        Arm("both (keep 20 %)", ("perception.keep_ratio=0.2",)),
        Arm("both (keep 60 %)", ("perception.keep_ratio=0.6",)),
        Arm("both (keep 40 %) by k3", ("perception.keep_ratio=0.4", "perception.kind=k3")),
        Arm("both (keep 40 %) by attention mass", ("perception.keep_ratio=0.4", "perception.kind=mass")),
    ),
    baseline="neither",
    measure=speed,
)
