"""The stream over the vocabulary: rows of tokens in chunks, each chunk of logits visited once.

For every chunk: project to logits -> sums of the rows, finished to log-prob and entropy -> two coefficients per token,
asked of the caller -> gradient of the logits -> two matrix products for d hidden and d weight. The loop knows no loss;
the row arithmetic comes as a set of functions (`rows.RowKernels`), so that a faster set can take their place.

Runs outside autograd: its callers are custom operators and autograd functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from mmrpt_kernels.common.head import (
    chunk_rows,
    even_rows,
    gpu_chunk_rows,
    products_dtype,
    project,
    statistics_dtype,
)
from mmrpt_kernels.logprobs.gradients import Gradients, Head, unit_slopes
from mmrpt_kernels.logprobs.places import Places
from mmrpt_kernels.logprobs.rows import RowKernels, Slopes, finish, finish_exponentials, has_slope
from mmrpt_kernels.logprobs.shards import merge

__all__ = ["Coefficients", "check_targets", "visit"]

# On a CPU taller chunks gain nothing more.
MAX_TALL_ROWS = 1024
# On a GPU a chunk is sized by what the weight gradient costs: the product that adds n rows to it does 2 n H V FLOPs and
# reads and writes 8 H V bytes of float32 accumulator, n / 4 FLOPs a byte. An H100 needs about 300 (990 TFLOP/s dense in
# bfloat16, 3.35 TB/s), an H200 about 200: 4096 rows give 1024, so that the accumulator's traffic is at most a third of
# that one product's time even where nothing overlaps.
GPU_ROWS = 4096

# (logps (n,), entropy (n,) or None, rows (n,) int64) -> d loss / d logps (n,), d loss / d entropy (n,) or None
Coefficients = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], Slopes]
# Slopes -> matrix (n, V) and scale (n,) or None, as `Gradients.add` takes them; it may be called once
Grade = Callable[[Slopes], tuple[torch.Tensor, torch.Tensor | None]]


def check_targets(targets: torch.Tensor, places: Places, vocab: int) -> None:
    """Raise ValueError when a wanted row's target is no word. CPU only: elsewhere it would wait for the device."""
    if targets.device.type != "cpu":
        return
    wanted = targets[places.rows if places.counts is None else places.rows[places.counts]]
    if wanted.numel() == 0:
        return
    low, high = torch.aminmax(wanted)
    if int(low) < 0 or int(high) >= vocab:
        raise ValueError(
            f"targets: got ids from {int(low)} to {int(high)}, expected 0 to {vocab - 1}, the lm head's rows; mask "
            "these tokens out, set them to ignore_index, or keep placeholder ids out of sampling"
        )


def rows_per_chunk(num_rows: int, head: Head, chunk_size: int | None, dtype: torch.dtype, *, matrices: int = 1) -> int:
    """Rows a chunk: `chunk_size` or a memory budget at most, and all chunks alike so that the last is no stub.

    Every chunk reads and writes the whole weight gradient, which only tall chunks pay back: on a CPU the budget may
    grow to an eighth of the weight gradient's own size.

    dtype: of the logits. matrices: how many of that dtype the row kernels hold of a chunk; a gradient in half precision
        may come on top.
    """
    vocab, width = head.weight.shape
    if head.shard is not None:
        vocab = head.shard.largest  # the same chunks on every rank
    if chunk_size is not None:
        limit = chunk_size
    elif head.weight.is_cuda:
        limit = gpu_chunk_rows(vocab, GPU_ROWS, matrices * dtype.itemsize + 2)
    else:
        limit = max(chunk_rows(num_rows, vocab, None, dtype), min(width // 8, MAX_TALL_ROWS))
    return even_rows(num_rows, limit)


def logits_of(hidden_rows: torch.Tensor, head: Head, held: torch.Tensor | None) -> torch.Tensor:
    """Raw logits (n, V), in memory that every chunk takes (held) or in fresh memory."""
    return project(hidden_rows, head.weight, head.bias, out=None if held is None else held[: hidden_rows.shape[0]])


def read_once(
    kernels: RowKernels,
    head: Head,
    want_entropy: bool,
    hidden_rows: torch.Tensor,
    targets: torch.Tensor,
    into: torch.Tensor | None,
    *,
    held: torch.Tensor | None,
    may_wait: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Grade]:
    """logps (n,), entropy (n,) or None and the gradient of a chunk, whose logits become exponentials in one sweep."""
    made = None
    if kernels.product is not None and may_wait:
        made = kernels.product(hidden_rows, head.weight, head.bias, targets, head.options, want_entropy, into)
    if made is None:
        raw = logits_of(hidden_rows, head, held)
        made = kernels.exponentials(raw, targets, head.options, want_entropy, into)
    sums, matrix = made
    logps, entropy, total = finish_exponentials(sums, head.vocab, want_entropy)
    slope = head.options.logit_scale / head.options.temperature

    def grade(slopes: Slopes) -> tuple[torch.Tensor, torch.Tensor]:
        # What a broken row's total is does not matter where it has no slope.
        return matrix, torch.where(slopes[0] == 0, 0.0, slopes[0] * (-slope / total))

    return logps, entropy, grade


def read_twice(
    kernels: RowKernels,
    head: Head,
    want_entropy: bool,
    hidden_rows: torch.Tensor,
    targets: torch.Tensor,
    into: torch.Tensor | None,
    *,
    held: torch.Tensor | None,
    keep_logits: bool,
    units: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Grade]:
    """Likewise, in two sweeps of the logits; units: make the gradient in units of its own row (`unit_slopes`)."""
    raw = logits_of(hidden_rows, head, held)
    partials, state = kernels.statistics(raw, targets, head.options, want_entropy, keep_logits)
    if head.shard is not None:
        partials = merge(partials, head.shard)
    logps, entropy, softmax = finish(partials, head.vocab, want_entropy)

    def grade(slopes: Slopes) -> tuple[torch.Tensor, torch.Tensor | None]:
        slopes, factor = unit_slopes(slopes, head.vocab, head.options) if units else (slopes, None)
        return kernels.gradient(state, targets, head.options, softmax, slopes, into), factor

    return logps, entropy, grade


def visit(
    kernels: RowKernels,
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    places: Places,
    *,
    want_entropy: bool,
    entropy_learns: bool = False,
    chunk_size: int | None = None,
    coefficients: Coefficients | None = None,
    gradients: Gradients | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Visit the logits of `places` once, chunk by chunk.

    Args:
        hidden: (N, H). targets: (N,) int64, valid at the places that count.
        places: n tokens to visit; all others cost nothing. Those that do not count have log-prob and entropy 0 and give
            no gradient, whatever they hold.
        want_entropy: compute the entropy.
        entropy_learns: `coefficients` may give a second coefficient; False saves a second buffer of logits.
        chunk_size: rows a chunk at most; None: from a memory budget.
        coefficients: called once a chunk; None: statistics only.
        gradients: where the chunks' gradients go; None: `coefficients` is called for what else it does.

    Returns:
        logps (n,), entropy (n,) or None, in the order of `places`, float32 (float64 where an input is).
    """
    dtype = statistics_dtype(hidden, head.weight, head.bias)
    rows, counts = places
    logps = hidden.new_empty(rows.shape, dtype=dtype)
    entropy = hidden.new_empty(rows.shape, dtype=dtype) if want_entropy else None
    count = rows.shape[0]
    if coefficients is None or gradients is None or not gradients.wanted():
        gradients = None
    matrices = 1 if kernels.rounds else 2  # those that write over the logits keep exponentials beside them
    step = rows_per_chunk(count, head, chunk_size, dtype, matrices=matrices)
    how = {"want_entropy": want_entropy, "entropy_learns": entropy_learns, "may_wait": counts is None}
    read, into = reader(kernels, hidden, head, gradients, min(step, count), **how)
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        taken, some = rows[chunk], None if counts is None else counts[chunk]
        hidden_rows, wanted = hidden[taken], targets[taken]
        if some is not None:  # 0 * NaN would reach d weight, and a target that is no word would be looked up
            hidden_rows.masked_fill_(~some[:, None], 0.0)
            wanted = torch.where(some, wanted, 0)
        if head.shard is not None:
            wanted = wanted - head.shard.start
        seen, uncertain, grade = read(hidden_rows, wanted, None if into is None else into[: taken.shape[0]])
        if some is not None:
            seen, uncertain = (None if t is None else torch.where(some, t, 0.0) for t in (seen, uncertain))
        logps[chunk] = seen
        if entropy is not None:
            entropy[chunk] = uncertain
        if coefficients is not None:
            slopes = coefficients(seen, uncertain, taken)
            if gradients is not None:
                if some is not None:
                    slopes = tuple(None if t is None else torch.where(some, t, 0.0) for t in slopes)
                    # Of a token that only statistics look at neither: 0 * NaN again.
                    hidden_rows.masked_fill_(~has_slope(slopes)[:, None], 0.0)
                matrix, scale = grade(slopes)
                grade = None  # two sweeps' logits, which the products need no more
                gradients.add(taken, hidden_rows, matrix, scale, alone=step >= count)
        grade = matrix = None  # the next chunk's logits take this one's memory
    return logps, entropy


def reader(
    kernels: RowKernels,
    hidden: torch.Tensor,
    head: Head,
    gradients: Gradients | None,
    most_rows: int,
    *,
    want_entropy: bool,
    entropy_learns: bool,
    may_wait: bool,
) -> tuple[Callable, torch.Tensor | None]:
    """How a chunk's logits are read, and the buffer (most_rows, V) of the products' dtype that the gradient goes to.

    One sweep where the gradient needs nothing but the log-probability's slope and a row's own words; no buffer where it
    overwrites the logits.
    """
    dtype = statistics_dtype(hidden, head.weight, head.bias)
    scales = gradients is not None and gradients.takes_scale()
    rounded = products_dtype(hidden, head.weight, scaled=scales)
    units = scales and rounded == torch.float16 and (kernels.rounds or hidden.is_cuda)
    into = None
    if gradients is not None and kernels.rounds and rounded != dtype:
        vocab = head.weight.shape[0]
        # Tensor cores want rows that start at multiples of 16 bytes. A CPU's bfloat16 product (AMX, torch 2.13) reads
        # what lies behind a row, and a NaN there reaches its result.
        behind = -vocab % 16 if hidden.is_cuda else 0
        into = hidden.new_empty(most_rows, vocab + behind, dtype=rounded)[:, :vocab]
    held = None  # elsewhere an allocator keeps what is freed; on a CPU fresh memory costs a visit of its own
    if not hidden.is_cuda:
        held = hidden.new_empty(most_rows, head.weight.shape[0], dtype=dtype)
    if scales and not (units or entropy_learns or head.shard is not None):
        return partial(read_once, kernels, head, want_entropy, held=held, may_wait=may_wait), into
    keep_logits = gradients is not None and (entropy_learns or head.options.softcap > 0.0)
    how = {"held": held, "keep_logits": keep_logits, "units": units}
    return partial(read_twice, kernels, head, want_entropy, **how), into
