"""The model as the trainer needs it: what all families share (`base`), the Qwen-VL families, and any other model."""

from mmrpt.policy.base import Policy
from mmrpt.policy.own_forward import OwnForwardPolicy
from mmrpt.policy.qwen_vl import FAMILIES, QwenVLPolicy

__all__ = ["OwnForwardPolicy", "Policy", "QwenVLPolicy", "policy_class"]


def policy_class(model_type: str) -> type[Policy]:
    """What serves a model type: shared prompts where the family is known, else the model's own forward pass."""
    return QwenVLPolicy if model_type in FAMILIES else OwnForwardPolicy
