"""An lm head that lies on several ranks: a vocabulary cut over a process group, and DTensor weights.

Vocabulary parallel: every rank holds a run of words, in rank order, and the same tokens as all the others. A chunk's
sums are gathered and merged by every rank, in rank order, so that all of them go on with the same bits. Nothing depends
on a rank's own number of words but its products: all ranks make the same collective calls.

DTensor: a mesh dimension may cut the vocabulary for operators that work on parts of it; its ranks see the same tokens.
Over all others the weight is gathered, and its gradient averaged, as `fully_shard` does for data-parallel ranks; where
ranks see the same tokens the average of equal gradients is that gradient again.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
import torch.distributed as dist

from mmrpt_kernels.common import checks
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.row_softmax import FAR_BELOW, Partials

# The name of a mesh dimension whose ranks see the same tokens, in torchtitan, transformers and accelerate.
TENSOR_PARALLEL = "tp"

# What a call's ranks must have in common, in the order in which `find_shard` compares them.
COMMON = ("tokens", "hidden size", "options", "tokens with work", "targets, or which tokens have work")


class Shard(NamedTuple):
    """One rank's part of the vocabulary: its words are `start` and those after it."""

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
    work: tuple[torch.Tensor, ...],
    options: tuple,
) -> Shard:
    """This rank's part. One collective of a few numbers, which waits for the device.

    Args:
        name: the process group's.
        hidden: (N, H). weight: (V_r, H). targets: (N,) int64.
        work: (N,) bool each, what will be done for a token; where nothing is, its target does not matter.
        options: numbers and words that decide what is computed.

    Raises:
        ValueError: on every rank, where ranks differ in anything but V_r, instead of a deadlock or a wrong sum; or
            where a rank has no words.
    """
    group = dist.distributed_c10d._resolve_process_group(name)
    chosen = zlib.crc32(repr((options, hidden.dtype, weight.dtype)).encode())
    sizes = torch.tensor([weight.shape[0], *hidden.shape, chosen], device=hidden.device)
    places = torch.arange(1, targets.shape[0] + 1, device=targets.device)
    kinds = sum(mask.long() << bit for bit, mask in enumerate(work))
    sums = torch.stack([kinds.sum(), (kinds * places * (targets + 1)).sum()])
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


def merge_partials(partials: Partials, shard: Shard) -> Partials:
    """Partials of whole rows from every rank's; one collective of 4 n numbers, the same bits on all ranks."""
    tops, totals, dots, chosen = shard.gather(torch.stack(partials)).unbind(1)
    top = tops.amax(0)
    # How far a part's maximum lies below the row's; a part of -inf alone is as far as can be.
    shifts = (tops - top.clamp_min(torch.finfo(top.dtype).min)).clamp_min_(FAR_BELOW)
    scales = shifts.exp()
    dots = (dots + shifts * totals).mul_(scales).sum(0)
    return Partials(top, (totals * scales).sum(0), dots, chosen.amax(0))


def group_name(group: dist.ProcessGroup | None) -> str | None:
    """What an operator's schema can hold of a process group."""
    return None if group is None else group.group_name


def group_traits(group: dist.ProcessGroup | None) -> frozenset[str]:
    """The traits of a call, for `backends.select`."""
    return frozenset() if group is None else frozenset({"vocab_group"})


def is_dtensor(tensor: object) -> bool:
    """Whether `tensor` is a torch.distributed.tensor.DTensor, told without importing that module."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "device_mesh")


class _DividedGradient(torch.autograd.Function):
    """See `divide_gradient`."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, count: int) -> torch.Tensor:
        ctx.count = count
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad / ctx.count, None


def divide_gradient(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """The tensor itself, with a gradient divided by `count`: of a sum over `count` ranks the mean, and the other way
    round, of the whole a rank's part of such a sum."""
    return _DividedGradient.apply(tensor, count) if tensor.requires_grad and count > 1 else tensor


def _vocab_dimension(weight: torch.Tensor, group: dist.ProcessGroup | None) -> int | None:
    """The mesh dimension of a DTensor weight whose ranks keep their own words; None: there is none.

    Raises ValueError where `group` is given and is no such dimension's.
    """
    mesh, names = weight.device_mesh, weight.device_mesh.mesh_dim_names or ()
    parts = [dim for dim, placement in enumerate(weight.placements) if placement.is_shard(0)]
    if group is None:
        named = [dim for dim in parts if dim < len(names) and names[dim] == TENSOR_PARALLEL]
        return named[0] if named else None
    for dim in parts:
        if mesh.get_group(dim).group_name == group.group_name:
            return dim
    raise ValueError(
        f"vocab_group: got a group that cuts no vocabulary of the DTensor weight (mesh {names or tuple(mesh.shape)}, "
        f"placements {weight.placements}), expected the group of a mesh dimension with Shard(0); pass "
        "weight.device_mesh.get_group(<dimension>), or None to gather the weight"
    )


def _local(tensor: torch.Tensor, keep: int | None) -> torch.Tensor:
    """The plain tensor that a rank needs of a DTensor: gathered over all mesh dimensions but `keep`; differentiable."""
    from torch.distributed.tensor import Partial, Replicate

    dims = range(tensor.device_mesh.ndim)
    placements = [tensor.placements[dim] if dim == keep else Replicate() for dim in dims]
    gradients = [tensor.placements[dim] if dim == keep else Partial() for dim in dims]
    count = 1
    for dim in dims:
        count *= 1 if dim == keep else tensor.device_mesh.size(dim)
    tensor = divide_gradient(tensor, count)
    return tensor.redistribute(placements=placements).to_local(grad_placements=gradients)


def local_head(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vocab_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor | None, dist.ProcessGroup | None]:
    """Plain weight and bias of this rank, and the group over which the vocabulary is cut, or None.

    Plain tensors come back as they are. A DTensor weight is gathered, and its gradient arrives as a DTensor of the same
    placements: the mean over the ranks it was gathered from. Not over the mesh dimension of `vocab_group`, or without
    one the dimension named "tp", where that is Shard(0): there the rank's own words remain.

    Raises:
        ValueError: hidden or targets are DTensors; vocab_group is no group of this rank's, or cuts no vocabulary of the
            DTensor weight.
    """
    for name, tensor in (("hidden", hidden), ("targets", targets)):
        checks.check(
            not is_dtensor(tensor),
            f"{name}: got a DTensor, expected this rank's plain tensor; pass {name}.to_local() where every rank has "
            f"tokens of its own, {name}.full_tensor() where they were cut",
        )
    if vocab_group is not None:
        checks.check(
            isinstance(vocab_group, dist.ProcessGroup),
            f"vocab_group: got {type(vocab_group).__name__}, expected a process group that this rank belongs to; pass "
            "torch.distributed.new_group(...) or mesh.get_group(...), or None for a whole lm head",
        )
    if is_dtensor(weight):
        keep = _vocab_dimension(weight, vocab_group)
        if keep is not None and vocab_group is None:
            vocab_group = weight.device_mesh.get_group(keep)
        weight = _local(weight, keep)
    if is_dtensor(bias):
        bias = _local(bias, None if vocab_group is None else _vocab_dimension(bias, vocab_group))
    return weight, bias, vocab_group
