"""Log-probabilities and entropies of target tokens, straight from hidden states."""

from mmrpt_kernels.logprobs.api import LogProbs, linear_logprobs

__all__ = ["LogProbs", "linear_logprobs"]
