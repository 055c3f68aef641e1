"""The three matrix products of the lm head, the dtypes they are made in, and what a device can multiply.

All run outside autograd. Logits are float32 (float64) products of the inputs as they are: a product of two
half-precision numbers is exact in float32.
"""

from __future__ import annotations

import functools
import warnings

import torch

from mmrpt_kernels.common.dtypes import statistics_dtype
from mmrpt_kernels.lm_head.chunk_sizes import device_type

# Words of a half-precision weight that are widened to float32 at a time: few stay in a CPU's cache until they are used.
WIDEN_ROWS = 2048
# Words whose products are made at a time where they cannot be added to an accumulator as they are made.
PRODUCT_ROWS = 8192
# Rows of a half-precision matrix that a sum over rows widens at a time: a small part of a tall chunk.
SUM_ROWS = 256
# torch 2.13's bfloat16 product on a CPU with AMX reads past the end of a row unless the inner size is a multiple of
# this: a NaN there, in the next row or beyond, reaches the result.
AMX_DEPTH = 32


def products_dtype(hidden: torch.Tensor, weight: torch.Tensor, *, scaled: bool = False) -> torch.dtype:
    """The dtype that the logits' gradient may be rounded to for its two products.

    bfloat16 where hidden and weight are: as the backward of `F.linear` would see it, and fit for tensor cores. float16
    likewise, but only where rows are `scaled` to its range, which ends at 6e-8: a word's gradient, its probability
    times 1 / tokens, would be lost.
    """
    half = (torch.bfloat16, torch.float16) if scaled else (torch.bfloat16,)
    return hidden.dtype if hidden.dtype == weight.dtype in half else statistics_dtype(hidden, weight)


def multiplies_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of matrices in `dtype`, a half precision, are faster on `device` than float32's."""
    kind = device_type(device)
    return kind == "cuda" or (kind == "cpu" and dtype == torch.bfloat16 and _cpu_multiplies_bfloat16())


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Instructions of its own (AMX, AVX512-BF16), which sum in float32; elsewhere the products are emulated."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(supported is not None and supported() for supported in asked)


@functools.cache
def _warn_of_mixed_dtypes(hidden: torch.dtype, weight: torch.dtype) -> None:
    """Once a process for a pair of dtypes."""
    warnings.warn(
        f"lm head: got hidden states in {hidden} with a weight in {weight}: their products are made in float32, exact "
        "but without a GPU's tensor cores, several times as slow as in one half precision; convert one of the two, or "
        "call under torch.autocast",
        stacklevel=2,
    )


def _vocab_blocks(weight: torch.Tensor, dtype: torch.dtype):
    """(start, stop, rows of `weight` in `dtype`), widened block by block so that no second copy of the head exists."""
    vocab = weight.shape[0]
    step = vocab if weight.dtype == dtype else WIDEN_ROWS
    scratch = None if weight.dtype == dtype else weight.new_empty(min(step, vocab), weight.shape[1], dtype=dtype)
    for start in range(0, vocab, step):
        stop = min(start + step, vocab)
        yield start, stop, weight[start:stop] if scratch is None else scratch[: stop - start].copy_(weight[start:stop])


def logits(hidden: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Raw logits (n, V) = hidden (n, H) @ weight (V, H).T in the statistics dtype, without the bias.

    out: (n, V) to write to; None: fresh memory.
    """
    dtype = statistics_dtype(hidden, weight)
    if hidden.is_cuda and dtype == torch.float32:
        if hidden.dtype == weight.dtype != dtype:  # tensor cores
            return torch.mm(hidden, weight.t(), out_dtype=dtype, **({} if out is None else {"out": out}))
        if hidden.dtype != weight.dtype:
            _warn_of_mixed_dtypes(hidden.dtype, weight.dtype)
    hidden = hidden.to(dtype)
    out = hidden.new_empty(hidden.shape[0], weight.shape[0]) if out is None else out
    for start, stop, block in _vocab_blocks(weight, dtype):
        torch.mm(hidden, block.t(), out=out[:, start:stop])
    return out


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b of half-precision matrices, summed in float32 and given as `dtype`. A CPU, which has no such product,
    rounds to theirs before."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b).to(dtype)


def d_hidden(matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """matrix (n, V) @ weight (V, H) in the statistics dtype."""
    dtype = statistics_dtype(matrix)
    halves = matrix.dtype == weight.dtype != dtype and multiplies_halves(weight.device, weight.dtype)
    if halves and (weight.is_cuda or weight.shape[0] % AMX_DEPTH == 0):
        return _product(matrix, weight, dtype)
    out = matrix.new_zeros(matrix.shape[0], weight.shape[1], dtype=dtype)
    for start, stop, block in _vocab_blocks(weight, dtype):
        out.addmm_(matrix[:, start:stop].to(dtype), block)
    return out


def add_d_weight(
    matrix: torch.Tensor,
    hidden: torch.Tensor,
    into: torch.Tensor,
    *,
    fresh: bool = False,
    factor: torch.Tensor | None = None,
) -> None:
    """into (V, H) += factor * matrix (n, V).T @ hidden (n, H); `into`: an accumulator in the statistics dtype.

    fresh: `into` holds nothing yet and is overwritten. factor: 0-d in the dtype of `into`, or None for 1.
    """
    beta = 0 if fresh else 1
    halves = matrix.dtype == hidden.dtype != into.dtype
    halves = halves and multiplies_halves(into.device, hidden.dtype)
    if factor is None and not halves:
        into.addmm_(matrix.to(into.dtype).t(), hidden.to(into.dtype), beta=beta)
        return
    if factor is None and into.is_cuda and _adds_wide(matrix.dtype, into.device):
        torch.addmm(into, matrix.t(), hidden, beta=beta, out_dtype=into.dtype, out=into)
        return
    for start in range(0, into.shape[0], PRODUCT_ROWS):
        words = slice(start, start + PRODUCT_ROWS)
        if halves:
            product = _product(matrix[:, words].t(), hidden, into.dtype)
        else:
            product = matrix[:, words].to(into.dtype).t() @ hidden.to(into.dtype)
        if factor is None:
            into[words] = product if fresh else product.add_(into[words])
        elif fresh:
            torch.mul(product, factor, out=into[words])
        else:
            into[words].addcmul_(product, factor)


@functools.cache
def _adds_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds a product of `dtype` matrices to a float32 one; older releases want three of one dtype."""
    square = torch.ones(16, 16, dtype=dtype, device=device)
    total = square.float()
    try:
        torch.addmm(total, square, square, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def scaled_rows(
    hidden: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """hidden (n, H) times factor (n,), in `dtype`, and a 0-d number that they lack (float16 alone: its range), or
    None. Rows of factor 0 are 0, whatever their hidden states are."""
    rest = None
    if dtype == torch.float16:
        rest = factor.abs().amax()
        factor = torch.where(factor == 0, 0.0, factor / rest)
    scaled = (hidden * factor[:, None]).masked_fill_((factor == 0)[:, None], 0.0)
    return scaled.to(dtype), rest


def column_sums(
    matrix: torch.Tensor, factor: torch.Tensor | None, dtype: torch.dtype, *, absolute: bool = False
) -> torch.Tensor:
    """(V,) sum over the rows of factor (n, 1) * matrix (n, V), or of factor * |matrix|, in `dtype`."""
    if factor is None and not absolute:
        return matrix.sum(0, dtype=dtype)
    if matrix.dtype == dtype and not absolute:
        return factor @ matrix
    total = matrix.new_zeros(matrix.shape[1], dtype=dtype)
    for part, weights in zip(matrix.split(SUM_ROWS), factor.split(SUM_ROWS), strict=True):
        total.addmv_((part.abs() if absolute else part).to(dtype).t(), weights)
    return total
