"""Policy losses fused with the lm head."""

from mmrpt_kernels.policy_loss.api import PolicyLoss, linear_policy_loss, linear_token_loss

__all__ = ["PolicyLoss", "linear_policy_loss", "linear_token_loss"]
