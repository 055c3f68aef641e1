"""Grouped rollouts: several sampled completions of each prompt, with what the policy thought of each token."""

from mmrpt.rollout.generate import generate

__all__ = ["generate"]
