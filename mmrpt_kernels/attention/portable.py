"""The portable backend as custom operators: packed batches are walked sequence by sequence, each one dense.

Memory is linear in T and S: tiles of scores are made, used and dropped, and the backward pass makes them again from the
saved lse. On a CPU without a soft cap the products run in torch's fused attention (see portable_tiles.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.attention.operators import attention_operator, mass_operator, results_like
from mmrpt_kernels.attention.portable_dense import attend, attend_backward
from mmrpt_kernels.attention.portable_mass import selected_mass
from mmrpt_kernels.attention.portable_tiles import RowGradients
from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.common.packing import read_segments


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
    made = results_like(q, k, v, key_weights)
    for by_row, by_key, statistic in _sequences(q, k, masks):
        part = attend(by_row(q), by_key(k), by_key(v), by_key(key_weights), options, Masks())
        for target, x in zip((by_row(made[0]), statistic(made[1]), statistic(made[2])), part, strict=True):
            target.copy_(x)
    return made


def _attention_backward(inputs, results, gradients, masks: Masks, options: AttentionOptions):
    (q, k, v, key_weights), (out, mass, lse), (dout, dmass, dlse) = inputs, results, gradients
    if masks.cu_seqlens_q is None:
        return attend_backward(*inputs, RowGradients(dout, dmass, dlse, out, mass, lse), options, masks)
    into = tuple(torch.zeros(x.shape, dtype=statistics_dtype(q), device=q.device) for x in inputs)
    for by_row, by_key, statistic in _sequences(q, k, masks):
        known = RowGradients(
            by_row(dout), statistic(dmass), statistic(dlse), by_row(out), statistic(mass), statistic(lse)
        )
        tensors = (by_row(q), by_key(k), by_key(v), by_key(key_weights))
        part = attend_backward(*tensors, known, options, Masks())
        for target, gradient in zip((by_row(into[0]), *(by_key(x) for x in into[1:])), part, strict=True):
            if gradient is not None:
                target += gradient
    return into


attention = attention_operator("attention_with_mass", _attention, _attention_backward)


def _visual_mass(q, k, lse, key_weights, masks: Masks, options: AttentionOptions) -> torch.Tensor:
    if masks.cu_seqlens_q is None:
        return selected_mass(q, k, lse, key_weights, options, masks)
    mass = q.new_empty(tuple(lse.shape) + key_weights.shape[-1:], dtype=statistics_dtype(q))
    for by_row, by_key, statistic in _sequences(q, k, masks):
        tensors = (by_row(q), by_key(k), statistic(lse), by_key(key_weights))
        statistic(mass).copy_(selected_mass(*tensors, options, Masks(query_mask=by_row(masks.query_mask))))
    return mass


mass_and_lse = mass_operator("visual_mass", _visual_mass, _attention_backward)
