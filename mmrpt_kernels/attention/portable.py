"""The portable backend as custom operators: packed batches are walked sequence by sequence, each one dense.

Memory is linear in T and S: tiles of scores are made, used and dropped, and the backward pass makes them again from the
saved lse. On a CPU without a soft cap the products run in torch's fused attention (see portable_tiles.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.operators import attention_operator, mass_operator, statistics_dtype
from mmrpt_kernels.attention.portable_dense import attend, attend_backward
from mmrpt_kernels.attention.portable_mass import selected_mass, selected_mass_backward
from mmrpt_kernels.attention.portable_tiles import Gradients, RowGradients
from mmrpt_kernels.common.packing import read_segments

__all__ = ["attention", "mass_and_lse"]


def _sequences(q: torch.Tensor, k: torch.Tensor, masks: Masks) -> Iterator[tuple]:
    """What makes a dense batch of one sequence at a time: (of tensors by rows, by keys, of statistics by rows)."""
    for rows, keys in read_segments(masks.cu_seqlens_q, masks.cu_seqlens_k, q.shape[0], k.shape[0]):
        yield (
            lambda x, rows=rows: None if x is None else x[None, rows],
            lambda x, keys=keys: x[None, keys],
            lambda x, rows=rows: None if x is None else x[None, :, rows],
        )


def _attention(q, k, v, key_weights, masks: Masks, options: AttentionOptions):
    if masks.cu_seqlens_q is None:
        return attend(q, k, v, key_weights, options, masks)
    made = _empty(q, v, key_weights)
    for by_row, by_key, statistic in _sequences(q, k, masks):
        part = attend(by_row(q), by_key(k), by_key(v), by_key(key_weights), options, Masks())
        for target, x in zip((by_row(made[0]), statistic(made[1]), statistic(made[2])), part, strict=True):
            target.copy_(x)
    return made


def _empty(q: torch.Tensor, v: torch.Tensor, key_weights: torch.Tensor):
    """Results of packed attention before any sequence is computed."""
    rows, dtype = (q.shape[1], q.shape[0]), statistics_dtype(q)
    mass = q.new_empty(rows + key_weights.shape[-1:], dtype=dtype)
    return q.new_empty(q.shape[:-1] + v.shape[-1:]), mass, q.new_empty(rows, dtype=dtype)


def _attention_backward(inputs, results, gradients, masks: Masks, options: AttentionOptions):
    (q, k, v, key_weights), (out, mass, lse), (dout, dmass, dlse) = inputs, results, gradients
    if masks.cu_seqlens_q is None:
        return attend_backward(*inputs, RowGradients(dout, dmass, dlse, out, mass, lse), options, masks)
    into = _zeros(q, k, v, key_weights)
    for by_row, by_key, statistic in _sequences(q, k, masks):
        known = RowGradients(
            by_row(dout), statistic(dmass), statistic(dlse), by_row(out), statistic(mass), statistic(lse)
        )
        tensors = (by_row(q), by_key(k), by_key(v), by_key(key_weights))
        part = attend_backward(*tensors, known, options, Masks())
        _add((by_row(into[0]), *(by_key(x) for x in into[1:])), part)
    return into


def _zeros(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients before any sequence is computed: in float32 or float64, the last, the weights', maybe unused."""
    return tuple(torch.zeros(x.shape, dtype=statistics_dtype(inputs[0]), device=x.device) for x in inputs)


def _add(targets: tuple[torch.Tensor, ...], part: Gradients | tuple[torch.Tensor | None, ...]) -> None:
    for target, gradient in zip(targets, part, strict=True):
        if gradient is not None:
            target += gradient


attention = attention_operator("attention_with_mass", _attention, _attention_backward)


def _visual_mass(q, k, lse, key_weights, masks: Masks, options: AttentionOptions) -> torch.Tensor:
    if masks.cu_seqlens_q is None:
        return selected_mass(q, k, lse, key_weights, options, masks)
    mass = q.new_empty(tuple(lse.shape) + key_weights.shape[-1:], dtype=statistics_dtype(q))
    for by_row, by_key, statistic in _sequences(q, k, masks):
        tensors = (by_row(q), by_key(k), statistic(lse), by_key(key_weights))
        statistic(mass).copy_(selected_mass(*tensors, options, Masks(query_mask=by_row(masks.query_mask))))
    return mass


def _visual_mass_backward(q, k, lse, key_weights, mass, dmass, dlse, masks: Masks, options: AttentionOptions):
    if masks.cu_seqlens_q is None:
        return selected_mass_backward(
            q, k, key_weights, RowGradients(None, dmass, dlse, None, mass, lse), options, masks
        )
    into = _zeros(q, k, key_weights)
    for by_row, by_key, statistic in _sequences(q, k, masks):
        known = RowGradients(None, statistic(dmass), statistic(dlse), None, statistic(mass), statistic(lse))
        wanted = Masks(query_mask=by_row(masks.query_mask))
        part = selected_mass_backward(by_row(q), by_key(k), by_key(key_weights), known, options, wanted)
        _add((by_row(into[0]), by_key(into[1]), by_key(into[2])), part)
    return into


mass_and_lse = mass_operator("visual_mass", _visual_mass, _visual_mass_backward)
