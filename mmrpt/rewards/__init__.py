"""Rewards of a restored span. Each is a function of TRL's signature, so it also serves `GRPOTrainer`."""

from mmrpt.rewards.combine import REWARDS, combine_rewards
from mmrpt.rewards.exact import exact_reward
from mmrpt.rewards.format import format_reward
from mmrpt.rewards.prefix import prefix_reward
from mmrpt.rewards.semantic import semantic_reward

__all__ = ["REWARDS", "combine_rewards", "exact_reward", "format_reward", "prefix_reward", "semantic_reward"]
