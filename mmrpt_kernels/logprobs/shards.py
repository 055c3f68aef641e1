"""Row partials of a vocabulary that is cut over a process group (`mmrpt_kernels.common.shards`), merged."""

from __future__ import annotations

import torch

from mmrpt_kernels.common.shards import Shard
from mmrpt_kernels.logprobs.rows import FAR_BELOW, Partials

__all__ = ["merge"]


def merge(partials: Partials, shard: Shard) -> Partials:
    """Partials of whole rows from every rank's; one collective of 4 n numbers, the same bits on all ranks."""
    tops, totals, dots, chosen = shard.gather(torch.stack(partials)).unbind(1)
    top = tops.amax(0)
    # How far a part's maximum lies below the row's; a part of -inf alone is as far as can be.
    shifts = (tops - top.clamp_min(torch.finfo(top.dtype).min)).clamp_min_(FAR_BELOW)
    scales = shifts.exp()
    dots = (dots + shifts * totals).mul_(scales).sum(0)
    return Partials(top, (totals * scales).sum(0), dots, chosen.amax(0))
