"""Row kernels in Triton: one program walks a row of float32 logits in tiles, whatever its length and alignment.

Every lane keeps a maximum and sums of its own over the tiles, which are merged at the end: no lane waits for another
inside the loop, and a sum over 152,000 words is a tree of short sums, exact to 1e-6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmrpt_kernels.common.head import HeadOptions, bend_factors
from mmrpt_kernels.common.tanh import tanh
from mmrpt_kernels.logprobs.rows import (
    Exponentials,
    Partials,
    RowKernels,
    Slopes,
    Softmax,
    most_above,
)

__all__ = ["ROW_KERNELS"]

# Words a tile and warps a program: 16 words a thread keep 64 KiB of loads in flight on a multiprocessor that holds four
# programs, which is what device memory needs; their sums take half of the registers. Compiled, not timed.
TILE = 4096
WARPS = 8
# Tiles of the gradient that one program makes: the row's numbers are read once for all of them.
GRADIENT_TILES = 4
# Registers a thread of the exponentials' kernel: four programs live on a multiprocessor. They hold TILE where 16 bytes
# are read and written at a time, and half of it elsewhere. Left to itself the compiler aims lower, and spills.
SWEEP_REGISTERS = 64

# Words of a tile that the exponentials' sums add up first: those of one thread, from tiles of 1024 on.
GROUP = tl.constexpr(4)
LOG2_E = tl.constexpr(1.4426950408889634)
# A word this far from the maximum has probability exactly 0; clamping there keeps 0 * inf out.
FAR = tl.constexpr(1e4)
# A maximum before any word was seen: finite, so that subtracting it gives no NaN.
UNSEEN = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _bend(raw, inner, CAPPED: tl.constexpr):
    """z / outer of raw logits: tanh(inner * raw), or raw itself without a cap."""
    if CAPPED:
        return tanh(inner * raw)
    else:
        return raw


@triton.jit
def _statistics_kernel(
    logits,
    targets,
    top_out,
    total_out,
    dots_out,
    chosen_out,
    vocab,
    stride,
    inner,
    outer,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row: logits (n, V) float32, `stride` from row to row -> the four partials (n,) float32."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    lane = tl.arange(0, TILE)
    top = tl.full((TILE,), UNSEEN, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    dots = tl.zeros((TILE,), tl.float32)
    for start in range(0, vocab, TILE):
        word = start + lane
        raw = tl.load(base + word, mask=word < vocab, other=0.0)  # (TILE,)
        z = tl.where(word < vocab, outer * _bend(raw, inner, CAPPED), float("-inf"))
        gap = z - top
        # One of the two factors, of the old sums and of the new word, is always 1: one exponential a word.
        small = tl.exp2(-tl.abs(gap) * LOG2_E)
        rises = gap > 0.0
        if ENTROPY:
            gap = tl.minimum(tl.maximum(gap, -FAR), FAR)
            dots = tl.where(rises, small * (dots - gap * total), dots + small * gap)
        total = tl.where(rises, small * total + 1.0, total + small)
        top = tl.where(rises, z, top)

    row_top = tl.max(top, axis=0)
    gap = top - row_top
    scale = tl.exp2(gap * LOG2_E)
    row_total = tl.sum(scale * total, axis=0)
    row_dots = 0.0
    if ENTROPY:
        row_dots = tl.sum(scale * (dots + tl.maximum(gap, -FAR) * total), axis=0)
    tl.store(top_out + row, tl.where(row_top == UNSEEN, float("-inf"), row_top))
    tl.store(total_out + row, row_total)
    tl.store(dots_out + row, row_dots)
    target = tl.load(targets + row)
    here = (target >= 0) & (target < vocab)
    raw = tl.load(base + target, mask=here, other=0.0)
    tl.store(chosen_out + row, tl.where(here, outer * _bend(raw, inner, CAPPED), float("-inf")))


@triton.jit
def _gradient_kernel(
    logits,
    targets,
    top_in,
    total_in,
    entropy_in,
    d_logps,
    d_entropy,
    gradient,
    vocab,
    stride,
    gradient_stride,
    inner,
    outer,
    slope,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (row, part): TILES tiles of d loss / d raw (n, V); slope: d z / d raw where tanh is flat.

    gradient may be the logits themselves: each lane reads its word before it writes it.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    out = gradient + row * gradient_stride
    first = tl.program_id(1) * (TILE * TILES)
    lane = tl.arange(0, TILE)
    at_target = tl.load(d_logps + row)
    uncertain = 0.0
    if ENTROPY:
        uncertain = tl.load(d_entropy + row)
    if (at_target == 0.0) & (uncertain == 0.0):
        nothing = tl.zeros((TILE,), gradient.dtype.element_ty)
        for start in range(first, min(first + TILE * TILES, vocab), TILE):
            tl.store(out + start + lane, nothing, mask=start + lane < vocab)
    else:
        top = tl.load(top_in + row)
        total = tl.load(total_in + row)
        rise, level = 0.0, -at_target / total  # d z = exp(z - top) * (rise * (z - top) + level)
        if ENTROPY:
            rise = -uncertain / total
            level += uncertain * (tl.log(total) - tl.load(entropy_in + row)) / total
        target = tl.load(targets + row)
        target = tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)
        for start in range(first, min(first + TILE * TILES, vocab), TILE):
            word = start + lane
            raw = tl.load(base + word, mask=word < vocab, other=0.0)  # (TILE,)
            bent = _bend(raw, inner, CAPPED)
            gap = outer * bent - top
            d_raw = tl.exp2(gap * LOG2_E)
            if ENTROPY:
                d_raw *= rise * tl.maximum(gap, -FAR) + level
            else:
                d_raw *= level
            d_raw = (d_raw + tl.where(word == target, at_target, 0.0)) * slope
            if CAPPED:
                d_raw *= 1.0 - bent * bent
            tl.store(out + word, d_raw.to(gradient.dtype.element_ty), mask=word < vocab)


@triton.jit
def _by_thread(x, AXIS: tl.constexpr):
    """(TILE,) as a matrix whose `AXIS`, of GROUP, lies within a thread: reducing it moves nothing between threads.

    1 where a thread has neighbouring words, as wide loads give them; 0 where it has every so many-th word.
    """
    if AXIS == 1:
        return tl.reshape(x, (x.shape[0] // GROUP, GROUP))
    else:
        return tl.reshape(x, (GROUP, x.shape[0] // GROUP))


@triton.jit
def _highest(logits, vocab, inner, outer, CAPPED: tl.constexpr, AXIS: tl.constexpr, TILE: tl.constexpr):
    """max z of the row at `logits`; UNSEEN where there is nothing above it."""
    lane = tl.arange(0, TILE)
    top = tl.full((TILE // GROUP,), UNSEEN, tl.float32)
    for start in range(0, vocab, TILE):
        raw = tl.load(logits + start + lane, mask=start + lane < vocab, other=0.0)  # (TILE,)
        z = tl.where(start + lane < vocab, outer * _bend(raw, inner, CAPPED), UNSEEN)
        top = tl.maximum(top, tl.max(_by_thread(z, AXIS), axis=AXIS))
    return tl.max(top, axis=0)


@triton.jit
def _sweep(
    logits,
    matrix,
    base,
    target,
    vocab,
    inner,
    outer,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    AXIS: tl.constexpr,
    TILE: tl.constexpr,
):
    """exp(z - base) of one row's words, written to `matrix`; 0 for the target -> of the others max z, sum, and sum of
    (z - base) exp(z - base)."""
    lane = tl.arange(0, TILE)
    top = tl.full((TILE // GROUP,), UNSEEN, tl.float32)
    rest = tl.zeros((TILE // GROUP,), tl.float32)
    dots = tl.zeros((TILE // GROUP,), tl.float32)
    for start in range(0, vocab, TILE):
        word = start + lane
        raw = tl.load(logits + word, mask=word < vocab, other=0.0)  # (TILE,)
        bent = _bend(raw, inner, CAPPED)
        z = tl.where((word < vocab) & (word != target), outer * bent, float("-inf"))
        top = tl.maximum(top, tl.max(_by_thread(z, AXIS), axis=AXIS))
        exps = tl.exp2((z - base) * LOG2_E)
        rest += tl.sum(_by_thread(exps, AXIS), axis=AXIS)
        if ENTROPY:
            dots += tl.sum(_by_thread(exps * tl.maximum(z - base, -FAR), AXIS), axis=AXIS)
        if CAPPED:
            exps *= 1.0 - bent * bent
        tl.store(matrix + word, exps.to(matrix.dtype.element_ty), mask=word < vocab)
    return tl.max(top, axis=0), tl.sum(rest, axis=0), tl.sum(dots, axis=0)


@triton.jit
def _exponentials_kernel(
    logits,
    targets,
    shift_out,
    rest_out,
    dots_out,
    matrix,
    vocab,
    stride,
    matrix_stride,
    inner,
    outer,
    most_above,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    OVER: tl.constexpr,
    AXIS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row: logits (n, V) float32 -> matrix (n, V) and three sums (n,) float32. OVER: matrix is logits.

    The target's z is the base, and a second sweep repairs the rare row that has words far above it. Over the logits
    themselves nothing could be read again: there a first sweep looks.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    matrix += row * matrix_stride
    target = tl.load(targets + row)
    here = (target >= 0) & (target < vocab)  # an id that is no word makes a broken row
    bent = _bend(tl.load(logits + target, mask=here, other=float("nan")), inner, CAPPED)
    own = outer * bent
    base = own
    target = target.to(tl.int32)
    if OVER:
        top = _highest(logits, vocab, inner, outer, CAPPED, AXIS, TILE)
        base = tl.where(top - own > most_above, top, own)
        tl.debug_barrier()  # every thread has read the target before one of them overwrites it
    rest, dots, unfit = 0.0, 0.0, 1
    while unfit > 0:  # twice at most: then base is top
        top, rest, dots = _sweep(logits, matrix, base, target, vocab, inner, outer, CAPPED, ENTROPY, AXIS, TILE)
        unfit = (top - base > most_above).to(tl.int32)
        base = tl.where(unfit > 0, top, base)
    tl.store(shift_out + row, own - base)
    tl.store(rest_out + row, rest)
    tl.store(dots_out + row, dots)
    tl.debug_barrier()  # what other threads wrote is written over
    if rest < float("inf"):
        slope = 1.0
        if CAPPED:
            slope -= bent * bent
        tl.store(matrix + target, (-rest * slope).to(matrix.dtype.element_ty))
    else:
        lane = tl.arange(0, TILE)
        for start in range(0, vocab, TILE):
            nothing = tl.zeros((TILE,), matrix.dtype.element_ty)
            tl.store(matrix + start + lane, nothing, mask=start + lane < vocab)


def _scalars(options: HeadOptions) -> dict[str, float | bool]:
    """z = outer * bend(inner * raw), multiplied as transform_logits does."""
    inner, outer = bend_factors(options)
    return {"inner": inner, "outer": outer, "CAPPED": options.softcap > 0.0}


def _tile(vocab: int) -> int:
    return min(TILE, max(128, triton.next_power_of_2(vocab)))


def row_statistics(
    raw: torch.Tensor, targets: torch.Tensor, options: HeadOptions, want_entropy: bool, keep_logits: bool
) -> tuple[Partials, torch.Tensor]:
    """`RowKernels.statistics`; raw (n, V) float32 with dense rows stays as it is, and is the state."""
    rows, vocab = raw.shape
    partials = Partials(*(raw.new_empty(rows) for _ in Partials._fields))
    if rows:
        with torch.cuda.device_of(raw):
            _statistics_kernel[(rows,)](
                raw,
                targets.contiguous(),
                *partials,
                vocab,
                raw.stride(0),
                **_scalars(options),
                ENTROPY=want_entropy,
                TILE=_tile(vocab),
                num_warps=WARPS,
            )
    return partials, raw


def row_gradient(
    raw: torch.Tensor,
    targets: torch.Tensor,
    options: HeadOptions,
    softmax: Softmax,
    slopes: Slopes,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """`RowKernels.gradient`; raw is overwritten where `into` is None."""
    rows, vocab = raw.shape
    gradient = raw if into is None else into
    d_logps, d_entropy = slopes
    entropy_learns = d_entropy is not None
    tile = _tile(vocab)
    if rows:
        with torch.cuda.device_of(raw):
            _gradient_kernel[(rows, triton.cdiv(vocab, tile * GRADIENT_TILES))](
                raw,
                targets.contiguous(),
                softmax.top,
                softmax.total,
                softmax.entropy if entropy_learns else softmax.total,
                d_logps.contiguous(),
                d_entropy.contiguous() if entropy_learns else d_logps,
                gradient,
                vocab,
                raw.stride(0),
                gradient.stride(0),
                slope=options.logit_scale / options.temperature,
                **_scalars(options),
                ENTROPY=entropy_learns,
                TILE=tile,
                TILES=GRADIENT_TILES,
                num_warps=WARPS,
            )
    return gradient


def row_exponentials(
    raw: torch.Tensor,
    targets: torch.Tensor,
    options: HeadOptions,
    want_entropy: bool,
    into: torch.Tensor | None = None,
) -> tuple[Exponentials, torch.Tensor]:
    """`RowKernels.exponentials`; raw is overwritten where `into` is None."""
    rows, vocab = raw.shape
    matrix = raw if into is None else into
    sums = Exponentials(*(raw.new_empty(rows) for _ in Exponentials._fields))
    wide = vocab % 16 == raw.stride(0) % 16 == 0  # else every word is a load, with an address of its own
    tile = min(_tile(vocab), TILE if wide and matrix.dtype != torch.float32 else TILE // 2)
    if rows:
        with torch.cuda.device_of(raw):
            _exponentials_kernel[(rows,)](
                raw,
                targets.contiguous(),
                *sums,
                matrix,
                vocab,
                raw.stride(0),
                matrix.stride(0),
                most_above=most_above(want_entropy),
                **_scalars(options),
                ENTROPY=want_entropy,
                OVER=into is None,
                AXIS=int(wide),
                TILE=tile,
                # Over the logits, no second thread may read a word that one overwrites.
                num_warps=min(WARPS, tile // 32),
                maxnreg=SWEEP_REGISTERS,
            )
    return sums, matrix


ROW_KERNELS = RowKernels(row_statistics, row_gradient, row_exponentials, rounds=True)
