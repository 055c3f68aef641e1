"""The custom operators of a backend: their schema, the shapes they return, what they save, how they differentiate.

A backend gives plain functions; here they become `torch.ops.mmrpt_kernels.<name>` and `<name>_backward`, which
torch.compile traces as one node each. The gradients of q, k, v are in their dtypes; those of the statistics never flow
back through the lse that a mass was made from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmrpt_kernels.attention.masks import AttentionOptions, Masks
from mmrpt_kernels.common.autocast import without_autocast
from mmrpt_kernels.common.dtypes import statistics_dtype

# Masks and AttentionOptions, field by field: an operator takes tensors and numbers alone.
_CALL = (
    "Tensor? key_padding_mask, Tensor? attn_mask, Tensor? query_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "int window_left, int window_right, float scale, float softcap"
)


def _split(call: tuple) -> tuple[Masks, AttentionOptions]:
    count = len(Masks._fields)
    return Masks(*call[:count]), AttentionOptions(*call[count:])


def results_like(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_weights: torch.Tensor, *_: object):
    """Empty out (..., T, Hq, Dv), mass (..., Hq, T, G) and lse (..., Hq, T)."""
    rows, dtype = q.shape[:-3] + (q.shape[-2], q.shape[-3]), statistics_dtype(q)  # (B, Hq, T) or (Hq, sum T)
    out = q.new_empty(q.shape[:-1] + v.shape[-1:])
    return out, q.new_empty(rows + key_weights.shape[-1:], dtype=dtype), q.new_empty(rows, dtype=dtype)


def _gradients_like(key_weights: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Empty gradients of the inputs and, last, of the weights: (0,) for boolean ones, which have none."""
    made = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    if key_weights.is_floating_point():
        return *made, torch.empty_like(key_weights, memory_format=torch.contiguous_format)
    return *made, inputs[0].new_empty(0)


def _as_inputs(gradients: tuple[torch.Tensor | None, ...], key_weights: torch.Tensor, *inputs: torch.Tensor):
    """What a backend made, in the inputs' shapes and dtypes; zeros where it made nothing."""
    *made, dw = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) if g is None else g.reshape(x.shape).to(x.dtype)
        for x, g in zip((*inputs, key_weights), gradients, strict=True)
    )
    return *made, (dw if key_weights.is_floating_point() else inputs[0].new_empty(0))


def _nothing() -> tuple[None, ...]:
    """Gradients of the masks and options."""
    return (None,) * (len(Masks._fields) + len(AttentionOptions._fields))


def attention_operator(name: str, forward: Callable, backward: Callable) -> Callable:
    """Attention with mass, differentiable, under `name`.

    Args:
        forward: (q, k, v, key_weights (..., G), masks, options) -> out, mass, lse.
        backward: (inputs, results, gradients, masks, options) -> dq, dk, dv, dw, each maybe None for zero; inputs q, k,
            v, key_weights, results out, mass, lse, and their gradients, None where none arrived.

    Returns:
        attention(q, k, v, key_weights, options, masks=Masks()) -> out, mass, lse.
    """
    inputs = "Tensor q, Tensor k, Tensor v, Tensor key_weights"
    results = "Tensor? dout, Tensor? dmass, Tensor? dlse, Tensor out, Tensor mass, Tensor lse"

    @without_autocast
    def run(q, k, v, key_weights, *call):
        return tuple(forward(q, k, v, key_weights, *_split(call)))

    @without_autocast
    def run_backward(q, k, v, key_weights, dout, dmass, dlse, out, mass, lse, *call):
        gradients = (dout, dmass if key_weights.shape[-1] else None, dlse)
        made = backward((q, k, v, key_weights), (out, mass, lse), gradients, *_split(call))
        return _as_inputs(made, key_weights, q, k, v)

    def save(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        masks, ctx.options = _split(inputs[4:])
        ctx.save_for_backward(*inputs[:4], *output, *masks)

    def differentiate(ctx, *gradients):
        saved = ctx.saved_tensors
        if all(g is None for g in gradients):
            return None, None, None, None, *_nothing()
        *grads, dw = operator_backward(*saved[:4], *gradients, *saved[4:], *ctx.options)
        return *grads, (dw if saved[3].is_floating_point() else None), *_nothing()

    three = "(Tensor, Tensor, Tensor)"
    operator = _register(name, run, f"({inputs}, {_CALL}) -> {three}")
    schema = f"({inputs}, {results}, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor)"
    operator_backward = _register(f"{name}_backward", run_backward, schema)
    operator.register_fake(results_like)
    operator_backward.register_fake(lambda q, k, v, key_weights, *_: _gradients_like(key_weights, q, k, v))
    operator.register_autograd(differentiate, setup_context=save)

    def attention(q, k, v, key_weights, options, masks=Masks()):  # noqa: B008
        return operator(q, k, v, key_weights, *masks, *options)

    return attention


def mass_operator(name: str, forward: Callable, attention_backward: Callable) -> Callable:
    """The mass from a known lse, differentiable in q, k and the weights, under `name`.

    lse is a statistic of q and k: the gradient of a mass is that of attention whose out has none, from every key that a
    row sees. The lse comes out again as a result with a gradient of its own, whatever attention made it and whether
    that one can differentiate it; the lse that goes in receives none.

    Args:
        forward: (q, k, lse, key_weights (..., G), masks, options) -> mass.
        attention_backward: as in `attention_operator`.

    Returns:
        mass_and_lse(q, k, lse, key_weights, options, masks=Masks()) -> mass, lse.
    """
    inputs = "Tensor q, Tensor k, Tensor lse, Tensor key_weights"

    @without_autocast
    def run(q, k, lse, key_weights, *call):
        return forward(q, k, lse, key_weights, *_split(call)), lse.clone()

    @without_autocast
    def run_backward(q, k, lse, key_weights, mass, dmass, dlse, *call):
        masks, options = _split(call)
        if masks.query_mask is not None:
            # Rows that are not wanted count as rows without keys, whatever they hold, NaN included.
            q = q.masked_fill(~masks.query_mask[..., None, None], 0.0)
            lse = lse.masked_fill(~masks.query_mask.unsqueeze(-2), -torch.inf)
        no_values = (q, k, k[..., :0], key_weights)
        known = (None, mass, lse.to(mass.dtype).contiguous())
        gradients = (None, dmass if key_weights.shape[-1] else None, dlse)
        dq, dk, _, dw = attention_backward(no_values, known, gradients, masks, options)
        return _as_inputs((dq, dk, dw), key_weights, q, k)

    def save(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        masks, ctx.options = _split(inputs[4:])
        ctx.save_for_backward(*inputs[:4], output[0], *masks)

    def differentiate(ctx, dmass, dlse):
        q, k, lse, key_weights, mass, *masks = ctx.saved_tensors
        if dmass is None and dlse is None:
            return None, None, None, None, *_nothing()
        dq, dk, dw = operator_backward(q, k, lse, key_weights, mass, dmass, dlse, *masks, *ctx.options)
        return dq, dk, None, (dw if key_weights.is_floating_point() else None), *_nothing()

    def empty(q, k, lse, key_weights, *_):
        shape = tuple(lse.shape) + key_weights.shape[-1:]
        return q.new_empty(shape, dtype=statistics_dtype(q)), torch.empty_like(lse)

    operator = _register(name, run, f"({inputs}, {_CALL}) -> (Tensor, Tensor)")
    schema = f"({inputs}, Tensor mass, Tensor? dmass, Tensor? dlse, {_CALL}) -> (Tensor, Tensor, Tensor)"
    operator_backward = _register(f"{name}_backward", run_backward, schema)
    operator.register_fake(empty)
    operator_backward.register_fake(lambda q, k, lse, key_weights, *_: _gradients_like(key_weights, q, k))
    operator.register_autograd(differentiate, setup_context=save)

    def mass_and_lse(q, k, lse, key_weights, options, masks=Masks()):  # noqa: B008
        return operator(q, k, lse, key_weights, *masks, *options)

    return mass_and_lse


def _register(name: str, function: Callable, schema: str) -> torch.library.CustomOpDef:
    return torch.library.custom_op(f"mmrpt_kernels::{name}", function, mutates_args=(), schema=schema)
