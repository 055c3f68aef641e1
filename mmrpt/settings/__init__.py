"""The settings: one frozen dataclass per stage, read from YAML and dotted overrides, unknown names refused.

`load_settings("run.yaml", ["rl.steps=50", "rollout.group_size=4"])` gives a checked `Settings`; `save_settings` writes
the resolved ones beside the run, and reading that file back gives the same `Settings`. Nothing here imports torch or
transformers, so that a misspelt setting is told at once.
"""

from mmrpt.settings.base import SettingsError
from mmrpt.settings.demo import DemoSettings, TinyVLMConfig, WorldConfig
from mmrpt.settings.help import settings_help
from mmrpt.settings.load import flatten, given_settings, load_settings, save_settings, to_yaml
from mmrpt.settings.method import (
    CONTROL_PHASES,
    TIMED_CONTROLS,
    ControlSettings,
    DataSettings,
    EvaluationSettings,
    MaskingSettings,
    OptimiserSettings,
    PerceptionSettings,
    PromptSettings,
    RLSettings,
    RolloutSettings,
    Signal,
    WarmupSettings,
    threshold_rule,
)
from mmrpt.settings.model import LoraSettings, ModelSettings
from mmrpt.settings.reward import RewardSettings
from mmrpt.settings.tree import Settings

__all__ = [
    "CONTROL_PHASES",
    "ControlSettings",
    "DataSettings",
    "DemoSettings",
    "EvaluationSettings",
    "LoraSettings",
    "MaskingSettings",
    "ModelSettings",
    "OptimiserSettings",
    "PerceptionSettings",
    "PromptSettings",
    "RLSettings",
    "RewardSettings",
    "RolloutSettings",
    "Settings",
    "SettingsError",
    "Signal",
    "TIMED_CONTROLS",
    "TinyVLMConfig",
    "WarmupSettings",
    "WorldConfig",
    "flatten",
    "given_settings",
    "load_settings",
    "save_settings",
    "settings_help",
    "threshold_rule",
    "to_yaml",
]
