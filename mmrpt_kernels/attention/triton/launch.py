"""What the launchers share: prepared tensors, the arguments that every kernel takes, and the launch itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from mmrpt_kernels.attention.config import L2_BYTES, Settings, Table, settings_of
from mmrpt_kernels.attention.masks import AttentionOptions, Masks

WIDEST = 2**30  # a wider window says nothing more, and a position less it may overflow


class Problem(NamedTuple):
    """A call after the checks, always with a batch dimension: packed inputs are a batch of one."""

    q: torch.Tensor  # (B, T, Hq, D), stride 1 along D
    k: torch.Tensor  # (B, S, Hkv, D), likewise
    v: torch.Tensor  # (B, S, Hkv, Dv), likewise
    weights: torch.Tensor  # (B, S, G) uint8 for boolean weights, else float
    boolean: bool
    padding: torch.Tensor | None  # (B, S) uint8, 1 = may be attended
    mask: torch.Tensor | None  # (B or 1, 1, T, S) uint8
    cu_q: torch.Tensor | None  # (sequences + 1,) int
    cu_k: torch.Tensor | None
    options: AttentionOptions

    @property
    def packed(self) -> bool:
        return self.cu_q is not None

    @property
    def rich(self) -> bool:
        """Whether the call has what costs registers: anything beyond causality and one boolean group."""
        return (
            not self.boolean
            or self.weights.shape[2] > 1
            or self.options.softcap > 0.0
            or self.options.window_left >= 0
            or self.options.window_right != 0
            or self.packed
            or self.padding is not None
            or self.mask is not None
        )

    def of_groups(self, start: int, count: int) -> Problem:
        """The same call for groups [start, start + count) of the weights."""
        return self._replace(weights=self.weights[..., start : start + count])

    @property
    def repeat(self) -> int:
        """Query heads of a key head."""
        return self.q.shape[2] // self.k.shape[2]

    def block_dims(self) -> tuple[int, int]:
        """D and Dv, each as the power of two that a tile holds."""
        return tuple(max(16, triton.next_power_of_2(x.shape[-1])) for x in (self.q, self.v))

    def arguments(self) -> dict[str, Any]:
        """The arguments that every kernel of the fused attention takes, blocks apart."""
        q, k, v, w = self.q, self.k, self.v, self.weights
        left, right, scale, softcap = self.options
        block_d, block_v = self.block_dims()
        made = {"q": q, "k": k, "v": v, "weights": w, "padding": self.padding, "mask": self.mask}
        for name, axes, tensor in (("q", "bth", q), ("k", "bsh", k), ("v", "bsh", v), ("w", "bsg", w)):
            made |= strides(name, axes, tensor)
        made |= strides("p", "bs", self.padding) | strides("m", "b_ts", self.mask)
        if self.mask is not None and self.mask.shape[0] == 1:
            made["stride_mb"] = 0  # one mask for all samples
        return made | {
            "cu_q": self.cu_q,
            "cu_k": self.cu_k,
            "num_rows": q.shape[1],
            "num_keys": k.shape[1],
            "heads": q.shape[2],
            "repeat": self.repeat,
            "left": min(left, WIDEST),
            "right": min(right, WIDEST),
            "scale": scale,
            "softcap": softcap,
            "DIM": q.shape[3],
            "DIM_V": v.shape[3],
            "BLOCK_D": block_d,
            "BLOCK_V": block_v,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "PADDED": self.padding is not None,
            "MASKED": self.mask is not None,
            "PACKED": self.packed,
            "CAPPED": softcap > 0.0,
            # The scale rides in the exponent's multiply-add, unless the largest product is not the largest score.
            "FOLD": softcap == 0.0 and scale > 0.0,
        }

    def settings(self, table: Table) -> Settings:
        """The row of a launch table for this call."""
        return settings_of(table, architecture(self.q.device), max(self.block_dims()), self.rich)

    def section(self, heads_of_a_key_head: int) -> int:
        """How many programs' heads stand side by side: as many as have their keys and values in the L2 cache."""
        size = self.k.shape[1] * (self.k.shape[3] + self.v.shape[3]) * self.k.element_size()
        return max(1, L2_BYTES // max(1, size)) * heads_of_a_key_head


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x with stride 1 along its last dimension; copied only where it has another."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_batch(packed: bool, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors with a batch dimension: packed ones are a batch of one."""
    return [x if x is None or not packed else x[None] for x in tensors]


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_weights: torch.Tensor,
    options: AttentionOptions,
    masks: Masks,
) -> Problem:
    """Checked arguments, packed or not, as a Problem; no group of weights becomes one of zeros."""
    padding, mask, _, cu_q, cu_k = masks
    q, k, v, key_weights = as_batch(cu_q is not None, q, k, v, key_weights)
    if key_weights.shape[-1] == 0:
        key_weights = key_weights.new_zeros((*key_weights.shape[:-1], 1))
    boolean = key_weights.dtype == torch.bool
    if cu_q is not None:
        # Checking lengths on a device would wait for it; clamped, wrong ones do not lead outside the tensors.
        cu_q, cu_k = cu_q.clamp(0, q.shape[1]), cu_k.clamp(0, k.shape[1])
    return Problem(
        *(last_contiguous(x) for x in (q, k, v)),
        key_weights.view(torch.uint8) if boolean else key_weights,
        boolean,
        None if padding is None else padding.view(torch.uint8),
        None if mask is None else mask.view(torch.uint8),
        cu_q,
        cu_k,
        options,
    )


def architecture(device: torch.device) -> int:
    """Compute capability times ten, as config.py's tables have it; 0 under the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def packed_tiles(cu: torch.Tensor, total: int, block: int, *, aligned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of all packed sequences, one after the other, made on the device without waiting for it.

    Args:
        cu: (sequences + 1,) int.
        total: rows of the packed tensor.
        block: rows of a tile.
        aligned: tiles begin at multiples of `block` (the first and the last tile of a sequence may be cut), or where
            the sequence does.

    Returns:
        (tiles,) int32 twice: the tile's sequence, -1 for tiles left over (their number depends on values), and the
        tile's first row.
    """
    cu = cu.long()
    starts, stops = cu[:-1], cu[1:]
    origins = starts // block * block if aligned else starts
    counts = torch.where(stops > starts, (stops - origins + block - 1) // block, 0)
    ends = counts.cumsum(0)
    tile = torch.arange(triton.cdiv(total, block) + starts.shape[0], device=cu.device)
    sequence = torch.searchsorted(ends, tile, right=True)
    used = sequence < starts.shape[0]
    sequence = sequence.clamp(max=starts.shape[0] - 1)
    first = origins[sequence] + (tile - (ends - counts)[sequence]) * block
    return torch.where(used, sequence, -1).int(), first.int()


def tiling(problem: Problem, block: int, *, of_keys: bool) -> dict[str, Any]:
    """Kernel arguments: num_tiles and, for packed inputs, which sequence and where each tile of rows or keys begins."""
    total = problem.k.shape[1] if of_keys else problem.q.shape[1]
    if not problem.packed:
        return {"tile_sequence": None, "tile_first": None, "num_tiles": triton.cdiv(total, block)}
    cu = problem.cu_k if of_keys else problem.cu_q
    sequence, first = packed_tiles(cu, total, block, aligned=of_keys)
    return {"tile_sequence": sequence, "tile_first": first, "num_tiles": first.shape[0]}


def strides(name: str, axes: str, tensor: torch.Tensor | None) -> dict[str, int]:
    """{stride_<name><axis>: stride}; zeros where there is no tensor."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()[: len(axes)]
    return {f"stride_{name}{axis}": stride for axis, stride in zip(axes, values, strict=True)}


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], settings: Settings) -> None:
    """Start `kernel` on the current device, which the operators make the tensors' own.

    Left to itself the assembler gives some kernels 80 or 128 registers, and spills: all may take 255.

    Args:
        arguments: by name; those that the kernel does not take are left out, so that all kernels share one dictionary.
    """
    taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    kernel[grid](**taken, num_warps=settings.warps, num_stages=settings.stages, maxnreg=255)
