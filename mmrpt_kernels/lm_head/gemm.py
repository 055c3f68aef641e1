"""The lm head as logprobs, policy_loss and divergence share it: options, projection, chunk sizes.

One order of operations, everywhere:

    raw  = hidden @ weight.T + bias                            (N, V)
    s    = logit_scale * raw
    s    = softcap * tanh(s / softcap)        if softcap > 0
    z    = s / temperature

Log-probabilities are log_softmax(z). This is the order of models with a final soft cap (Gemma) that are sampled at a
temperature: the cap belongs to the model, the temperature to the sampler.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import NamedTuple

import torch

from mmrpt_kernels.common import checks

__all__ = [
    "HeadOptions",
    "as_wide",
    "check_head",
    "bend_factors",
    "chunk_rows",
    "even_rows",
    "gpu_chunk_rows",
    "multiplies_halves",
    "products_dtype",
    "project",
    "project_backward_hidden",
    "project_backward_weight",
    "statistics_dtype",
    "transform_backward",
    "transform_logits",
]

# One float32 chunk of logits. 32 MiB is 256 rows of a 32,000-word vocabulary: long enough for the matrix product to run
# at full speed on a CPU, short enough that the softmax passes over it stay near the cache.
CHUNK_BYTES = 32 * 2**20
MIN_CHUNK_ROWS = 16
# Up to SHORT_CHUNK_ROWS rows may take all of that, and from there to MAX_CHUNK_ROWS half of it: measured on two cores,
# 1.5 times as fast at V = 1024, where every chunk's calls count, and no slower at 8192.
SHORT_CHUNK_ROWS = 256
MAX_CHUNK_ROWS = 1024
# What a chunk may take of a GPU's memory. How many rows pay there, each caller says: a chunk reads the whole head.
GPU_BYTES = 4 * 2**30
# Words of a half-precision weight that are widened to float32 at a time: few stay in a CPU's cache until they are used.
WIDEN_ROWS = 2048
# Words whose products are made at a time where they cannot be added to an accumulator as they are made.
PRODUCT_ROWS = 8192

# Where a CPU's bfloat16 product sums over another number of words, it reads behind a row (torch 2.13 with AMX): a NaN
# in the next row, or in memory beyond, reaches this one's result.
AMX_DEPTH = 32

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadOptions(NamedTuple):
    """What happens between the raw logits and the softmax; the defaults change nothing."""

    temperature: float = 1.0
    softcap: float = 0.0
    logit_scale: float = 1.0


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    options: HeadOptions,
    chunk_size: int | None,
    *,
    part: bool = False,
) -> None:
    """Door check of the arguments every head operator takes. Raises ValueError.

    Args:
        hidden: (..., H) float.
        weight: (V, H) float.
        bias: (V,) float or None.
        part: weight and bias are one rank's words; that there are some, the ranks find out together.
    """
    checks.check(
        isinstance(hidden, torch.Tensor) and hidden.dim() >= 1,
        "hidden: got something without a last dimension, expected a tensor (..., H); pass the last hidden states",
    )
    checks.check_shape("weight", weight, (None, hidden.shape[-1]), "(V, H): the lm head, H as in hidden")
    checks.check(
        part or weight.shape[0] >= 1,
        "weight: got an empty vocabulary, expected (V, H) with V >= 1; pass the lm head's weight",
    )
    checks.check_dtype("hidden", hidden, FLOAT_DTYPES)
    checks.check_dtype("weight", weight, FLOAT_DTYPES)
    if bias is not None:
        checks.check_shape("bias", bias, (weight.shape[0],), "(V,): one value per word")
        checks.check_dtype("bias", bias, FLOAT_DTYPES)
    checks.check_same_device(hidden=hidden, weight=weight, bias=bias)
    checks.check_range("temperature", options.temperature, 0.0, None, low_open=True)
    checks.check_range("softcap", options.softcap, 0.0, None)
    checks.check(
        options.logit_scale != 0.0 and abs(options.logit_scale) < math.inf,
        f"logit_scale: got {options.logit_scale}, expected a finite number other than 0; 1.0 leaves the logits as they "
        "are",
    )
    if chunk_size is not None:
        checks.check(
            isinstance(chunk_size, int),
            f"chunk_size: got {chunk_size!r}, expected a whole number of rows; pass an int, or leave it None",
        )
        checks.check_range("chunk_size", chunk_size, 1, None)


def statistics_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 when any tensor is float64, else float32: the dtype of statistics and of gradient accumulators."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def as_wide(hidden: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    """hidden in float64 where another tensor of the head is: else products of two halves would round what is float64.
    Differentiable."""
    return hidden.double() if statistics_dtype(hidden, *others) == torch.float64 else hidden


def chunk_rows(num_rows: int, vocab: int, chunk_size: int | None, dtype: torch.dtype) -> int:
    """Rows of logits to hold at once: `chunk_size` where given, else what fits CHUNK_BYTES in the statistics dtype."""
    if chunk_size is None:
        itemsize = 8 if dtype == torch.float64 else 4
        fitting = CHUNK_BYTES // (vocab * itemsize)
        chunk_size = max(MIN_CHUNK_ROWS, min(fitting, SHORT_CHUNK_ROWS), min(fitting // 2, MAX_CHUNK_ROWS))
    return max(1, min(chunk_size, num_rows))


def gpu_chunk_rows(vocab: int, most: int, bytes_a_logit: int) -> int:
    """Rows of logits to hold at once on a GPU: `most`, or what fits GPU_BYTES."""
    return max(1, min(most, GPU_BYTES // (bytes_a_logit * vocab)))


def even_rows(num_rows: int, limit: int) -> int:
    """Rows a chunk, at most `limit` >= 1, such that all chunks of `num_rows` are alike and the last is no stub."""
    chunks = max(1, -(-num_rows // limit))
    return max(1, -(-num_rows // chunks))


def bend_factors(options: HeadOptions) -> tuple[float, float]:
    """(inner, outer) of z = outer * tanh(inner * raw) with a soft cap, z = outer * raw without: what kernels take."""
    temperature, softcap, logit_scale = options
    return (logit_scale / softcap, softcap / temperature) if softcap > 0.0 else (1.0, logit_scale / temperature)


def transform_logits(raw: torch.Tensor, options: HeadOptions, *, inplace: bool = False) -> torch.Tensor:
    """z = softcap(logit_scale * raw) / temperature, shape and dtype of `raw`; may return `raw` itself.

    `inplace=True` overwrites `raw` (for chunks outside autograd); otherwise differentiable by autograd.
    """
    temperature, softcap, logit_scale = options
    if softcap > 0.0:
        if inplace:
            return raw.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
        return torch.tanh(raw * (logit_scale / softcap)) * (softcap / temperature)
    factor = logit_scale / temperature
    if factor == 1.0:
        return raw
    return raw.mul_(factor) if inplace else raw * factor


def transform_backward(
    grad: torch.Tensor, transformed: torch.Tensor | None, options: HeadOptions, *, inplace: bool = False
) -> torch.Tensor:
    """d loss / d raw from d loss / d z.

    Args:
        grad: d loss / d z, the shape of the logits; overwritten with `inplace=True`.
        transformed: z as `transform_logits` returned it; read only when softcap > 0 (tanh' = 1 - tanh^2), else None.
    """
    temperature, softcap, logit_scale = options
    factor = logit_scale / temperature
    if softcap > 0.0:
        slope = (transformed * (temperature / softcap)).square_().neg_().add_(1.0).mul_(factor)
        return grad.mul_(slope) if inplace else grad * slope
    if factor == 1.0:
        return grad
    return grad.mul_(factor) if inplace else grad * factor


def _vocab_blocks(weight: torch.Tensor, dtype: torch.dtype):
    """(start, stop, rows of `weight` in `dtype`), widened block by block so that no second copy of the head exists."""
    vocab = weight.shape[0]
    step = vocab if weight.dtype == dtype else WIDEN_ROWS
    held = None if weight.dtype == dtype else weight.new_empty(min(step, vocab), weight.shape[1], dtype=dtype)
    for start in range(0, vocab, step):
        stop = min(start + step, vocab)
        yield start, stop, weight[start:stop] if held is None else held[: stop - start].copy_(weight[start:stop])


@functools.cache
def _warn_of_mixed_dtypes(hidden: torch.dtype, weight: torch.dtype) -> None:
    """Once a process for a pair of dtypes."""
    warnings.warn(
        f"lm head: got hidden states in {hidden} with a weight in {weight}: their products are made in float32, exact "
        "but without a GPU's tensor cores, several times as slow as in one half precision; convert one of the two, or "
        "call under torch.autocast",
        stacklevel=2,
    )


def project(
    hidden_rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Raw logits (n, V) of a chunk of rows in the statistics dtype, products accumulated there. Outside autograd.

    Args:
        hidden_rows: (n, H).
        weight: (V, H), any float dtype; a half-precision weight is widened a block at a time.
        bias: (V,) or None.
        out: (n, V) in the statistics dtype to write to, on a CPU, where fresh memory is slow; None: fresh memory.
    """
    dtype = statistics_dtype(hidden_rows, weight, bias)
    if hidden_rows.is_cuda and hidden_rows.dtype == weight.dtype and dtype == torch.float32 != weight.dtype:
        logits = torch.mm(hidden_rows, weight.t(), out_dtype=dtype)  # tensor cores; half products are exact in float32
        return logits if bias is None else logits.add_(bias.to(dtype))
    if hidden_rows.is_cuda and hidden_rows.dtype != weight.dtype and dtype == torch.float32:
        _warn_of_mixed_dtypes(hidden_rows.dtype, weight.dtype)
    rows = hidden_rows.to(dtype)
    logits = rows.new_empty(rows.shape[0], weight.shape[0]) if out is None else out
    for start, stop, block in _vocab_blocks(weight, dtype):
        torch.mm(rows, block.t(), out=logits[:, start:stop])
    return logits if bias is None else logits.add_(bias.to(dtype))


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
    return device.type == "cuda" or (device.type == "cpu" and dtype == torch.bfloat16 and _cpu_multiplies_bfloat16())


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Instructions of its own (AMX, AVX512-BF16), which sum in float32; elsewhere the products are emulated."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(supported is not None and supported() for supported in asked)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b of half-precision matrices with sums in float32, given as `dtype`: rounded to theirs before on a CPU alone,
    which has no such product."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b).to(dtype)


def project_backward_hidden(grad_raw: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """d loss / d hidden (n, H) = grad_raw (n, V) @ weight (V, H), in the statistics dtype. Outside autograd."""
    dtype = statistics_dtype(grad_raw)
    halves = grad_raw.dtype == weight.dtype != dtype and multiplies_halves(weight.device, weight.dtype)
    if halves and (weight.is_cuda or weight.shape[0] % AMX_DEPTH == 0):
        return _product(grad_raw, weight, dtype)
    out = grad_raw.new_zeros(grad_raw.shape[0], weight.shape[1], dtype=dtype)
    for start, stop, block in _vocab_blocks(weight, dtype):
        out.addmm_(grad_raw[:, start:stop].to(dtype), block)
    return out


def project_backward_weight(
    grad_raw: torch.Tensor,
    hidden_rows: torch.Tensor,
    into: torch.Tensor,
    *,
    fresh: bool = False,
    factor: torch.Tensor | None = None,
) -> None:
    """into (V, H) += factor * grad_raw (n, V).T @ hidden_rows (n, H); `into`: an accumulator in the statistics dtype.

    fresh: `into` holds nothing yet and is overwritten. factor: 0-d in the dtype of `into`, or None for 1.
    """
    beta = 0 if fresh else 1
    halves = grad_raw.dtype == hidden_rows.dtype != into.dtype
    halves = halves and multiplies_halves(into.device, hidden_rows.dtype)
    if factor is None and not halves:
        into.addmm_(grad_raw.to(into.dtype).t(), hidden_rows.to(into.dtype), beta=beta)
        return
    if factor is None and into.is_cuda and _adds_wide(grad_raw.dtype):
        torch.addmm(into, grad_raw.t(), hidden_rows, beta=beta, out_dtype=into.dtype, out=into)
        return
    for start in range(0, into.shape[0], PRODUCT_ROWS):
        words = slice(start, start + PRODUCT_ROWS)
        if halves:
            product = _product(grad_raw[:, words].t(), hidden_rows, into.dtype)
        else:
            product = grad_raw[:, words].to(into.dtype).t() @ hidden_rows.to(into.dtype)
        if factor is None:
            into[words] = product if fresh else product.add_(into[words])
        elif fresh:
            torch.mul(product, factor, out=into[words])
        else:
            into[words].addcmul_(product, factor)


@functools.cache
def _adds_wide(dtype: torch.dtype) -> bool:
    """Whether torch adds a product of `dtype` matrices to a float32 one; older releases want three of one dtype."""
    square = torch.ones(16, 16, dtype=dtype, device="cuda")
    total = square.float()
    try:
        torch.addmm(total, square, square, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
