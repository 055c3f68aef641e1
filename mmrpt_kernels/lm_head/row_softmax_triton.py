"""Row kernels in Triton: one program walks a row of float32 logits in tiles, whatever its length and alignment.

In `_statistics_kernel` every lane keeps a maximum and sums of its own over the tiles, which are merged at the end: no
lane waits for another inside the loop, and a sum over 152,000 words is a tree of short sums, exact to 1e-6. A program
sees its own row alone, so a row's results do not depend on the other rows of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmrpt_kernels.common.tanh import tanh
from mmrpt_kernels.lm_head.options import HeadOptions, softcap_factors
from mmrpt_kernels.lm_head.row_softmax import Exponentials, Partials, RowKernels, Slopes, Softmax, max_above_target

# Words a tile and warps a program: 16 words a thread keep 64 KiB of loads in flight on a multiprocessor that holds four
# programs, which is what device memory needs; their sums take half of the registers. Compiled, not timed.
TILE = 4096
WARPS = 8
# Tiles of the gradient that one program makes: the row's numbers are read once for all of them.
GRADIENT_TILES = 4
# Most registers a thread: two programs of the statistics and four of the exponentials live on a multiprocessor. Left to
# itself the compiler aims lower, and spills.
STATISTICS_REGISTERS = 128
EXPONENTIALS_REGISTERS = 64

# Words of a tile that the exponentials' sums add up first: each thread has them (from tiles of 1024 on), no shuffles.
GROUP = tl.constexpr(4)
LOG2_E = tl.constexpr(1.4426950408889634)
# A word this far from the maximum has probability exactly 0; clamping there avoids 0 * inf.
FAR = tl.constexpr(1e4)
# A maximum before any word was seen: finite, so that subtracting it gives no NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# Vectors of one number a row. A chunk may begin at any of their elements, and one that does not begin at a multiple of
# 16 bytes would compile the kernels again.
VECTORS = (
    "targets_ptr", "top_ptr", "total_ptr", "dots_ptr", "chosen_ptr", "entropy_ptr", "d_logps_ptr", "d_entropy_ptr",
    "shift_ptr", "rest_ptr",
)  # fmt: skip


@triton.jit
def load_capped(logits, bias, word, mask, inner, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """z / outer of some words of the row at `logits`: tanh(inner * (raw + bias)), or raw + bias without a soft cap."""
    raw = tl.load(logits + word, mask=mask, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias + word, mask=mask, other=0.0)
    if CAPPED:
        raw = tanh(inner * raw)
    return raw


@triton.jit(do_not_specialize_on_alignment=VECTORS)
def _statistics_kernel(
    logits, bias, targets_ptr, top_ptr, total_ptr, dots_ptr, chosen_ptr, vocab, stride, inner, outer,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a row: logits (n, V) float32, `stride` from row to row -> the four partials (n,) float32."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, TILE)
    running_max = tl.full((TILE,), LOWEST, tl.float32)
    running_sum = tl.zeros((TILE,), tl.float32)
    running_dots = tl.zeros((TILE,), tl.float32)
    for start in range(0, vocab, TILE):
        word = start + lane
        capped = load_capped(logits, bias, word, word < vocab, inner, CAPPED, HAS_BIAS)  # (TILE,)
        z = tl.where(word < vocab, outer * capped, float("-inf"))
        gap = z - running_max
        # One of the two factors, of the old sums and of the new word, is always 1: one exponential a word.
        smaller = tl.exp2(-tl.abs(gap) * LOG2_E)
        rises = gap > 0.0
        if ENTROPY:
            gap = tl.minimum(tl.maximum(gap, -FAR), FAR)
            running_dots = tl.where(rises, smaller * (running_dots - gap * running_sum), running_dots + smaller * gap)
        running_sum = tl.where(rises, smaller * running_sum + 1.0, running_sum + smaller)
        running_max = tl.where(rises, z, running_max)

    row_max = tl.max(running_max, axis=0)
    gap = running_max - row_max
    scale = tl.exp2(gap * LOG2_E)
    row_sum = tl.sum(scale * running_sum, axis=0)
    row_dots = 0.0
    if ENTROPY:
        row_dots = tl.sum(scale * (running_dots + tl.maximum(gap, -FAR) * running_sum), axis=0)
    tl.store(top_ptr + row, tl.where(row_max == LOWEST, float("-inf"), row_max))
    tl.store(total_ptr + row, row_sum)
    tl.store(dots_ptr + row, row_dots)
    target = tl.load(targets_ptr + row)
    is_word = (target >= 0) & (target < vocab)
    capped = load_capped(logits, bias, target, is_word, inner, CAPPED, HAS_BIAS)
    tl.store(chosen_ptr + row, tl.where(is_word, outer * capped, float("-inf")))


@triton.jit(do_not_specialize_on_alignment=VECTORS)
def _gradient_kernel(
    logits, bias, targets_ptr, top_ptr, total_ptr, entropy_ptr, d_logps_ptr, d_entropy_ptr, out, vocab, stride,
    out_stride, inner, outer, slope,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (row, part): TILES tiles of d loss / d raw (n, V); slope: d z / d raw where tanh is flat.

    out may be the logits themselves: each lane reads its word before it writes it.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * out_stride
    first = tl.program_id(1) * (TILE * TILES)
    lane = tl.arange(0, TILE)
    d_logp = tl.load(d_logps_ptr + row)
    d_entropy = 0.0
    if ENTROPY:
        d_entropy = tl.load(d_entropy_ptr + row)
    if (d_logp == 0.0) & (d_entropy == 0.0):
        zeros = tl.zeros((TILE,), out.dtype.element_ty)
        for start in range(first, min(first + TILE * TILES, vocab), TILE):
            tl.store(out + start + lane, zeros, mask=start + lane < vocab)
    else:
        top = tl.load(top_ptr + row)
        total = tl.load(total_ptr + row)
        gap_factor, offset = 0.0, -d_logp / total  # d z = exp(z - top) * (gap_factor * (z - top) + offset)
        if ENTROPY:
            gap_factor = -d_entropy / total
            offset += d_entropy * (tl.log(total) - tl.load(entropy_ptr + row)) / total
        target = tl.load(targets_ptr + row)
        target = tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32)
        for start in range(first, min(first + TILE * TILES, vocab), TILE):
            word = start + lane
            capped = load_capped(logits, bias, word, word < vocab, inner, CAPPED, HAS_BIAS)  # (TILE,)
            gap = outer * capped - top
            d_raw = tl.exp2(gap * LOG2_E)
            if ENTROPY:
                d_raw *= gap_factor * tl.maximum(gap, -FAR) + offset
            else:
                d_raw *= offset
            d_raw = (d_raw + tl.where(word == target, d_logp, 0.0)) * slope
            if CAPPED:
                d_raw *= 1.0 - capped * capped
            tl.store(out + word, d_raw.to(out.dtype.element_ty), mask=word < vocab)


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
def _sweep(
    logits, bias, matrix, base, target, vocab, inner, outer,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, WRITE: tl.constexpr, AXIS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """max z over one row's words but the target. WRITE: also the sums of exp(z - base) and of (z - base) exp(z - base)
    over them; writes exp(z - base) to `matrix`, 0 for the target."""
    lane = tl.arange(0, TILE)
    running_max = tl.full((TILE // GROUP,), LOWEST, tl.float32)
    running_sum = tl.zeros((TILE // GROUP,), tl.float32)
    running_dots = tl.zeros((TILE // GROUP,), tl.float32)
    for start in range(0, vocab, TILE):
        word = start + lane
        capped = load_capped(logits, bias, word, word < vocab, inner, CAPPED, HAS_BIAS)  # (TILE,)
        z = tl.where((word < vocab) & (word != target), outer * capped, float("-inf"))
        running_max = tl.maximum(running_max, tl.max(_by_thread(z, AXIS), axis=AXIS))
        if WRITE:
            exps = tl.exp2((z - base) * LOG2_E)
            running_sum += tl.sum(_by_thread(exps, AXIS), axis=AXIS)
            if ENTROPY:
                running_dots += tl.sum(_by_thread(exps * tl.maximum(z - base, -FAR), AXIS), axis=AXIS)
            if CAPPED:
                exps *= 1.0 - capped * capped
            tl.store(matrix + word, exps.to(matrix.dtype.element_ty), mask=word < vocab)
    return tl.max(running_max, axis=0), tl.sum(running_sum, axis=0), tl.sum(running_dots, axis=0)


@triton.jit(do_not_specialize_on_alignment=VECTORS)
def _exponentials_kernel(
    logits, bias, targets_ptr, shift_ptr, rest_ptr, dots_ptr, matrix, vocab, stride, matrix_stride, inner, outer,
    max_above_target,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, IN_PLACE: tl.constexpr, AXIS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program a row: logits (n, V) float32 -> matrix (n, V), the logits if IN_PLACE, and three sums (n,).

    The target's z is the base, and a second sweep repairs the rare row that has words far above it. In place nothing
    could be read again: there a first sweep finds the maximum.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    matrix += row * matrix_stride
    target = tl.load(targets_ptr + row)
    is_word = (target >= 0) & (target < vocab)
    target_capped = load_capped(logits, bias, target, is_word, inner, CAPPED, HAS_BIAS)
    target_z = tl.where(is_word, outer * target_capped, float("nan"))  # an id that is no word makes a broken row
    base = target_z
    target = target.to(tl.int32)
    if IN_PLACE:
        top, rest, dots = _sweep(
            logits, bias, matrix, base, target, vocab, inner, outer, CAPPED, HAS_BIAS, False, False, AXIS, TILE
        )
        base = tl.where(top - target_z > max_above_target, top, target_z)
        tl.debug_barrier()  # every thread has read the target before one of them overwrites it
    rest, dots, too_low = 0.0, 0.0, 1
    while too_low > 0:  # twice at most: then base is top
        top, rest, dots = _sweep(
            logits, bias, matrix, base, target, vocab, inner, outer, CAPPED, HAS_BIAS, ENTROPY, True, AXIS, TILE
        )
        too_low = (top - base > max_above_target).to(tl.int32)
        base = tl.where(too_low > 0, top, base)
    tl.store(shift_ptr + row, target_z - base)
    tl.store(rest_ptr + row, rest)
    tl.store(dots_ptr + row, dots)
    tl.debug_barrier()  # what other threads wrote is written over
    if rest < float("inf"):
        slope = 1.0
        if CAPPED:
            slope -= target_capped * target_capped
        tl.store(matrix + target, (-rest * slope).to(matrix.dtype.element_ty))
    else:
        lane = tl.arange(0, TILE)
        zeros = tl.zeros((TILE,), matrix.dtype.element_ty)
        for start in range(0, vocab, TILE):
            tl.store(matrix + start + lane, zeros, mask=start + lane < vocab)


def head_arguments(bias: torch.Tensor | None, options: HeadOptions) -> dict[str, float | bool]:
    """Kernel arguments of z = outer * softcap(inner * (raw + bias)), multiplied as `transform_logits` does."""
    inner, outer = softcap_factors(options)
    return {"inner": inner, "outer": outer, "CAPPED": options.softcap > 0.0, "HAS_BIAS": bias is not None}


def _tile(vocab: int) -> int:
    return min(TILE, max(128, triton.next_power_of_2(vocab)))


def statistics(
    logits, bias, targets, options: HeadOptions, want_entropy: bool, keep_logits: bool
) -> tuple[Partials, torch.Tensor]:
    """`RowKernels.statistics`; logits (n, V) float32 stay as they are, and are the state."""
    rows, vocab = logits.shape
    partials = Partials(*(logits.new_empty(rows) for _ in Partials._fields))
    if rows:
        with torch.cuda.device_of(logits):
            _statistics_kernel[(rows,)](
                logits, bias, targets.contiguous(), *partials, vocab, logits.stride(0),
                **head_arguments(bias, options), ENTROPY=want_entropy, TILE=_tile(vocab), num_warps=WARPS,
                maxnreg=STATISTICS_REGISTERS,
            )  # fmt: skip
    return partials, logits


def gradient(state: torch.Tensor, bias, targets, options: HeadOptions, softmax: Softmax, slopes: Slopes, out) -> None:
    """`RowKernels.gradient`; state: the logits (n, V) float32."""
    rows, vocab = state.shape
    d_logps, d_entropy = slopes
    entropy = d_entropy is not None
    tile = _tile(vocab)
    if out.numel():
        with torch.cuda.device_of(state):
            _gradient_kernel[(rows, triton.cdiv(vocab, tile * GRADIENT_TILES))](
                state, bias, targets.contiguous(), softmax.top, softmax.total, softmax.entropy if entropy else None,
                d_logps.contiguous(), d_entropy.contiguous() if entropy else None, out, vocab, state.stride(0),
                out.stride(0), slope=options.slope, **head_arguments(bias, options),
                ENTROPY=entropy, TILE=tile, TILES=GRADIENT_TILES, num_warps=WARPS,
            )  # fmt: skip


def exponentials(logits, bias, targets, options: HeadOptions, want_entropy: bool, out) -> Exponentials:
    """`RowKernels.exponentials`; logits (n, V) float32."""
    rows, vocab = logits.shape
    sums = Exponentials(*(logits.new_empty(rows) for _ in Exponentials._fields))
    wide = vocab % 16 == logits.stride(0) % 16 == 0  # else every word is a load, with an address of its own
    # What EXPONENTIALS_REGISTERS hold: TILE where 16 bytes are read and 8 written at a time, else half of it.
    fits = wide and out.dtype != torch.float32 and (bias is None or options.softcap == 0.0)
    tile = min(_tile(vocab), TILE if fits else TILE // 2)
    if rows:
        with torch.cuda.device_of(logits):
            _exponentials_kernel[(rows,)](
                logits,
                bias,
                targets.contiguous(),
                *sums,
                out,
                vocab,
                logits.stride(0),
                out.stride(0),
                max_above_target=max_above_target(want_entropy),
                **head_arguments(bias, options),
                ENTROPY=want_entropy,
                IN_PLACE=out.dtype == logits.dtype and out.data_ptr() == logits.data_ptr(),
                AXIS=int(wide),
                TILE=tile,
                # In place, no second thread may read a word that one overwrites.
                num_warps=min(WARPS, tile // 32),
                maxnreg=EXPONENTIALS_REGISTERS,
            )
    return sums


ROW_KERNELS = RowKernels(exponentials, statistics, gradient)
