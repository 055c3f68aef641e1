"""Masked multimodal reinforcement pre-training: data masking, rewards, rollouts, training, evaluation, plots."""

__version__ = "0.1.0"
