"""The lm head cut over a process group: where this rank's words lie, and what the ranks tell one another.

Every rank holds a run of words, one rank's behind the other's in rank order, and the same tokens as all the others. A
chunk's sums are gathered and merged by every rank, in rank order, so that all of them go on with the same bits.
Nothing depends on a rank's own number of words but its products: all ranks make the same collective calls.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist

from mmrpt_kernels.common.head import statistics_dtype

__all__ = ["Shard", "find_shard", "gather"]

# What a call's ranks must have in common, in the order in which `find_shard` compares them.
COMMON = ("tokens", "hidden size", "options", "tokens with work", "targets, or which tokens have work")


class Shard(NamedTuple):
    """One rank's part of the vocabulary: its words are `start` and those behind it."""

    group: dist.ProcessGroup
    start: int
    vocab: int  # words of the whole vocabulary
    largest: int  # words of the largest part, which chunks are sized by

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """(ranks, *own.shape) every rank's `own`, in rank order; one collective."""
        return gather(own, self.group)

    def add_up(self, parts: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of `parts` (n, H), on every rank, the same bits.

        Every rank adds up a slice of its own, in rank order and float32 (float64 for float64), and gathers the others':
        what moves is what a ring's all-reduce would move, in the dtype of `parts`, without its roundings in between.
        """
        count = dist.get_world_size(self.group)
        size = parts.numel()
        slices = parts.new_zeros(count * -(-size // count))
        slices[:size] = parts.reshape(-1)
        mine = torch.empty_like(slices)
        dist.all_to_all_single(mine, slices, group=self.group)
        summed = mine.view(count, -1).sum(0, dtype=statistics_dtype(parts)).to(parts.dtype)
        return gather(summed, self.group).view(-1)[:size].view_as(parts)


def gather(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(ranks, *own.shape) every rank's contiguous `own`, in rank order."""
    gathered = own.new_empty(dist.get_world_size(group), *own.shape)
    # all_gather_into_tensor is the same function's name before torch 2.13.
    collect = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    collect(gathered.view(-1), own.view(-1), group=group)
    return gathered


def find_shard(
    name: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    work: torch.Tensor,
    options: tuple,
) -> Shard:
    """This rank's part. One collective of a few numbers, which waits for the device.

    Args:
        name: the process group's.
        hidden: (N, H). weight: (V_r, H). targets: (N,) int64.
        work: (N,) bool or small integers, what will be done for a token: 0 nothing, and the target does not matter.
        options: numbers and words that decide what is computed.

    Raises:
        ValueError: on every rank, where ranks differ in anything but V_r, instead of a deadlock or a wrong sum; or
            where a rank has no words.
    """
    group = dist.distributed_c10d._resolve_process_group(name)
    chosen = zlib.crc32(repr((options, hidden.dtype, weight.dtype)).encode())
    sizes = torch.tensor([weight.shape[0], *hidden.shape, chosen], device=hidden.device)
    places = torch.arange(1, targets.shape[0] + 1, device=targets.device)
    sums = torch.stack([work.sum(), (work * places * (targets + 1)).sum()])
    words, *common = gather(torch.cat([sizes, sums]), group).t().tolist()
    for what, found in zip(COMMON, common, strict=True):
        if len(set(found)) > 1:
            raise ValueError(
                f"vocab_group: got ranks that differ in their {what} ({', '.join(map(str, found))}), expected the same "
                "hidden, targets and options on every rank of the group, and another part of the vocabulary on each; "
                "give all ranks of the group the same batch"
            )
    if min(words) < 1:
        raise ValueError(
            f"weight: got parts of {', '.join(map(str, words))} words on the ranks of vocab_group, expected at least "
            "one word on each; cut the vocabulary over fewer ranks"
        )
    return Shard(group, sum(words[: dist.get_rank(group)]), sum(words), max(words))
