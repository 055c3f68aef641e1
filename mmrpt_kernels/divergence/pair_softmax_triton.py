"""The divergence's row kernels in Triton: float32 logits of both views in, sums or gradients out."""

from __future__ import annotations

from mmrpt_kernels.divergence.pair_softmax import PairKernels
from mmrpt_kernels.divergence.triton_backward import gradients
from mmrpt_kernels.divergence.triton_forward import sums, to_mean

PAIR_KERNELS = PairKernels(sums, to_mean, gradients)
