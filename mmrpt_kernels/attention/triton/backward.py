"""Backward pass of out, mass and lse together, without atomics: the same bits every time.

    P = exp(s - lse),  dP = dout v^T + dmass w^T,  delta = rowsum(dout * out) + rowsum(dmass * mass) - dlse
    dS = P * (dP - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout,  dw = sum over heads of P^T dmass

The gradient of a mass costs next to nothing: it is a constant of the row in delta, in blocks full of weight another one
in dP, in free blocks nothing at all, and only in mixed blocks a product per element. One kernel makes delta, one walks
rows for each block of keys (backward_keys.py), one walks keys for each block of rows (backward_rows.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from mmrpt_kernels.attention.config import MAX_GROUPS, PROGRAMS_WANTED, ROW_TERMS, keys_settings, rows_settings
from mmrpt_kernels.attention.triton.backward_keys import backward_keys
from mmrpt_kernels.attention.triton.backward_rows import backward_rows, row_terms
from mmrpt_kernels.attention.triton.call import Problem, architecture, last_contiguous, launch, packed_tiles
from mmrpt_kernels.attention.triton.kinds import classify

__all__ = ["backward"]


def _splits(programs: int, repeat: int) -> int:
    """Over how many programs to spread the query heads of a key head: the fewest that keep a large GPU busy.

    From shapes alone, so that results do not depend on the device.
    """
    divisors = (n for n in range(1, repeat + 1) if repeat % n == 0)
    return next((n for n in divisors if programs * n >= PROGRAMS_WANTED), repeat)


def _tiling(problem: Problem, block: int, of_keys: bool) -> dict[str, Any]:
    """num_tiles and, for packed inputs, which sequence and where each tile begins."""
    total = problem.k.shape[1] if of_keys else problem.q.shape[1]
    if not problem.packed:
        return {"tile_sequence": None, "tile_first": None, "num_tiles": triton.cdiv(total, block)}
    cu = problem.cu_k if of_keys else problem.cu_q
    sequence, first = packed_tiles(cu, total, block, aligned=of_keys)
    return {"tile_sequence": sequence, "tile_first": first, "num_tiles": first.shape[0]}


def _row_terms(
    problem: Problem, results: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """lse in units of log2, delta (B, Hq, T), dmass (B, Hq, T, G): as `row_terms` says."""
    out, mass, lse = results
    dout, dmass, dlse = gradients
    made = (torch.empty_like(lse), torch.empty_like(lse), None if dmass is None else torch.empty_like(mass))
    block = ROW_TERMS.rows
    arguments = {
        "q": problem.q,
        "out": out,
        "dout": dout,
        "mass_in": mass,
        "dmass": dmass,
        "lse_in": lse,
        "dlse": dlse,
        "lse_out": made[0],
        "delta_out": made[1],
        "dmass_out": made[2],
        "num_rows": lse.shape[2],
        "heads": lse.shape[1],
        "groups": mass.shape[3],
        **_strides("do", "bth", dout),
        **_strides("dm", "bhtg", dmass),
        **_strides("dl", "bht", dlse),
        "DIM_V": out.shape[3],
        "BLOCK_V": problem.block_dims()[1],
        "BLOCK_M": block,
        "HAS_DOUT": dout is not None,
        "HAS_DMASS": dmass is not None,
        "HAS_DLSE": dlse is not None,
    }
    launch(row_terms, triton.cdiv(lse.shape[2], block) * lse.shape[0] * lse.shape[1], arguments, ROW_TERMS)
    return made


def _strides(name: str, axes: str, tensor: torch.Tensor | None) -> dict[str, int]:
    """{name_axis: stride}; zeros where there is no tensor."""
    strides = (0,) * len(axes) if tensor is None else tensor.stride()[: len(axes)]
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}


def backward(
    problem: Problem,
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk, dv in the dtypes of q, k, v; dw (B, S, G) float32, None for boolean weights.

    Args:
        results: out (B, T, Hq, Dv), mass (B, Hq, T, G), lse (B, Hq, T) as `forward` made them.
        gradients: theirs, None where none arrived.
    """
    q, k, v = problem.q, problem.k, problem.v
    (batch, _, heads, _), (num_keys, heads_kv), groups = q.shape, k.shape[1:3], problem.weights.shape[2]
    dout, dmass, dlse = gradients
    dmass = None if groups == 0 else dmass
    wants_dw = not problem.boolean and dmass is not None
    # Packed rows and keys that no sequence owns are visited by no program.
    idle = problem.packed or q.numel() == 0 or k.numel() == 0
    fresh = torch.zeros_like if idle else torch.empty_like
    dq, dk, dv = (fresh(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dw = None if problem.boolean else torch.zeros(problem.weights.shape, dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk, dv, dw
    dout = None if dout is None else last_contiguous(dout)
    lse_rows, delta, dmass_rows = _row_terms(problem, results, (dout, dmass, dlse))
    shared = problem.arguments() | {
        "dout": dout,
        "dmass": dmass_rows,
        "lse_in": lse_rows,
        "delta_in": delta,
        **_strides("do", "bth", dout),
        "groups": groups,
        "GROUPS": triton.next_power_of_2(groups) if groups <= MAX_GROUPS else 0,
        "HAS_DOUT": dout is not None,
        "HAS_DMASS": dmass is not None,
    }
    size = max(problem.block_dims())
    chip = architecture(q.device)

    settings = rows_settings(chip, q.dtype, size)
    own = _tiling(problem, settings.rows, of_keys=False) | {
        "kinds": classify(problem.weights, problem.padding, settings.keys).kinds,
        "dq_out": dq,
        "num_heads": batch * heads,
        "section": problem.section(problem.repeat),
        "BLOCK_M": settings.rows,
        "BLOCK_N": settings.keys,
    }
    launch(backward_rows, own["num_tiles"] * batch * heads, shared | own, settings)

    settings = keys_settings(chip, q.dtype, size)
    tiling = _tiling(problem, settings.keys, of_keys=True)
    splits = _splits(tiling["num_tiles"] * batch * heads_kv, problem.repeat)
    parts = (dk, dv)
    if splits > 1:
        parts = tuple(x.new_zeros((splits, *x.shape), dtype=torch.float32) for x in (dk, dv))
    dw_parts = q.new_zeros((batch, heads_kv * splits, num_keys, groups), dtype=torch.float32) if wants_dw else None
    own = tiling | {
        "kinds": classify(problem.weights, problem.padding, settings.keys).kinds,
        "dk_out": parts[0],
        "dv_out": parts[1],
        "dw_out": dw_parts,
        "num_heads": batch * heads_kv * splits,
        "splits": splits,
        "section": problem.section(splits),
        "BLOCK_M": settings.rows,
        "BLOCK_N": settings.keys,
    }
    # dw of more groups than fit the registers takes a launch each MAX_GROUPS; dk and dv come out the same every time.
    for start in range(0, groups if wants_dw else 1, MAX_GROUPS):
        count = triton.next_power_of_2(min(groups - start, MAX_GROUPS)) if wants_dw else 0
        own |= {"dw_first": start, "DW_GROUPS": count}
        launch(backward_keys, own["num_tiles"] * own["num_heads"], shared | own, settings)
    if splits > 1:
        dk.copy_(parts[0].sum(0))
        dv.copy_(parts[1].sum(0))
    if dout is None:
        dv.zero_()
    return dq, dk, dv, (dw if dw_parts is None else dw_parts.sum(1))
