"""The whole tree of settings, and the checks between its groups."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mmrpt.settings import method
from mmrpt.settings.base import STRICT, require
from mmrpt.settings.demo import DemoSettings
from mmrpt.settings.model import ModelSettings
from mmrpt.settings.reward import RewardSettings
from mmrpt.settings.scale import scaled_down

DRAWN_CAPTIONS = 1_500  # of the demo's world, scored by default


@dataclass(frozen=True, config=STRICT)
class Settings:
    """The run."""

    name: str = Field("demo", description="name of the run, and of its folder inside output")
    output: str = Field("runs", description="folder of the runs")
    seed: int = Field(0, description="seed of everything that is drawn at random")
    threads: int | None = Field(None, ge=1, description="threads of torch on the CPU; null: one a core")
    device: str = Field(
        "auto", description="where the model runs: cpu, cuda, cuda:1, mps; auto: cuda where torch has it, else cpu"
    )
    scale: Literal["full", "tiny"] = Field(
        "full",
        description="tiny: few random layers of the model's architecture and a minute's work, to try settings out",
    )
    engine: Literal["native", "trl"] = Field(
        "native", description="what runs RL: native, one process; trl: TRL's GRPOTrainer, any number of them (torchrun)"
    )
    trl: dict[str, Any] = Field(
        default_factory=dict,
        description="with engine=trl, arguments of its GRPOConfig that no other setting decides: {use_vllm: true}",
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints, which --resume goes on from")
    patience: int = Field(
        20, ge=1, description="steps in a row without signal, or not finite, before the run stops with an error"
    )
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="where each row of metrics.jsonl also goes: tensorboard, wandb, trackio"
    )
    data: method.DataSettings = field(default_factory=method.DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    prompts: method.PromptSettings = field(default_factory=method.PromptSettings)
    warmup: method.WarmupSettings = field(default_factory=method.WarmupSettings)
    masking: method.MaskingSettings = field(default_factory=method.MaskingSettings)
    rollout: method.RolloutSettings = field(default_factory=method.RolloutSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    perception: method.PerceptionSettings = field(default_factory=method.PerceptionSettings)
    rl: method.RLSettings = field(default_factory=method.RLSettings)
    control: method.ControlSettings = field(default_factory=method.ControlSettings)
    evaluation: method.EvaluationSettings = field(default_factory=method.EvaluationSettings)
    demo: DemoSettings = field(default_factory=DemoSettings)

    def __post_init__(self) -> None:
        require(
            bool(self.name.strip(".")) and Path(self.name).name == self.name,  # "..": not a folder of its own
            f"name is {self.name!r}: it names a folder inside output; use letters, digits, '-' and '_'.",
        )
        if self.scale == "tiny":
            for group, value in scaled_down(self).items():
                object.__setattr__(self, group, value)
        sampled = self.rollout.prompts * self.rl.max_rounds
        require(
            sampled >= self.rl.groups_per_step,
            f"rl.groups_per_step is {self.rl.groups_per_step}: expected at most rollout.prompts * rl.max_rounds = "
            f"{self.rollout.prompts} * {self.rl.max_rounds}, the groups sampled for a step; lower it or raise those.",
        )
        require(
            self.masking.signal != "truth" or self.data.pairs is None,
            f"masking.signal is truth, which is known of drawn pairs alone, but data.pairs is {self.data.pairs}: "
            "choose mass, text_mass or kl, or leave out data.pairs.",
        )
        require(
            not (self.reward.visual and self.perception.kind == "mass"),
            f"reward.visual is {self.reward.visual} and perception.kind is mass, which reads no perturbed view: "
            "expected kl, k3 or js, or reward.visual=0.",
        )
        require(
            self.engine == "trl" or not self.trl,
            f"trl is {self.trl} and engine is {self.engine}, which reads none of it: set engine=trl, or leave trl out.",
        )
        demo = self.demo
        if self.model.path is not None:  # its vision tower can see already
            demo = replace(demo, vision_steps=0, vision_frozen_steps=0, grounding=0.0)
        if self.data.pairs is not None:
            demo = replace(demo, fact_steps=0, grounding=0.0)
        object.__setattr__(self, "demo", demo)

    def captions_to_score(self, available: int) -> int:
        """How many of the training captions are scored and masked."""
        by_default = DRAWN_CAPTIONS if self.data.pairs is None else available
        return min(self.masking.captions or by_default, available)

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / self.name
