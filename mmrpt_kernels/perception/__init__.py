"""From per-token visual dependency to token masks and trajectory weights."""

from mmrpt_kernels.perception.api import PerceptionWeights, perception_weights

__all__ = ["PerceptionWeights", "perception_weights"]
