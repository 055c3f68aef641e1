"""Rewards of a restored span. Each is a function of TRL's signature, so it also serves `GRPOTrainer`."""

from mmrpt.rewards.combine import REWARDS, combine_rewards
from mmrpt.rewards.custom import RewardFunction, load_rewards
from mmrpt.rewards.exact import exact_reward
from mmrpt.rewards.format import format_reward
from mmrpt.rewards.prefix import prefix_reward
from mmrpt.rewards.semantic import semantic_reward
from mmrpt.rewards.text import completion_text

__all__ = [
    "REWARDS",
    "RewardFunction",
    "combine_rewards",
    "completion_text",
    "exact_reward",
    "format_reward",
    "load_rewards",
    "prefix_reward",
    "semantic_reward",
]
