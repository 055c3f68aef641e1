"""The door of an lm head that lies on several ranks: DTensor weights, and process groups over the vocabulary.

A DTensor's mesh dimensions are of two kinds. One may cut the vocabulary for operators that work on parts of it: its
ranks see the same tokens. Over all others the weight is gathered, and its gradient averaged, as `fully_shard` does for
data-parallel ranks; where ranks see the same tokens the average of equal gradients is that gradient again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from mmrpt_kernels.common import checks

__all__ = ["divide_gradient", "group_name", "group_traits", "local_head"]

# The name of a mesh dimension whose ranks see the same tokens, in torchtitan, transformers and accelerate.
TENSOR_PARALLEL = "tp"


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
