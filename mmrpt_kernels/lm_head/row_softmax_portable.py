"""Row kernels in plain PyTorch for any device: what CPU users run.

All passes over a block of rows that fits a CPU's level-2 cache are made before the next block, and exponentials and
gradient overwrite the logits: on a CPU an exp costs more than the memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmrpt_kernels.lm_head.chunk_sizes import block_rows
from mmrpt_kernels.lm_head.options import HeadOptions, transform_backward, transform_logits
from mmrpt_kernels.lm_head.row_softmax import FAR_BELOW, Exponentials, Partials, RowKernels, Slopes, Softmax

# Logits that a CPU takes through several elementwise passes at a time: 1 MiB of float32 stays in a level-2 cache.
CACHED_ELEMENTS = 2**18
# And elsewhere, 64 MiB of float32: each pass's launch is short beside it, and its result beside a chunk of 2048 rows.
GPU_ELEMENTS = 2**24


class RowState(NamedTuple):
    """A chunk between its statistics and its gradient; exps and z own the chunk's memory."""

    exps: torch.Tensor  # (n, V) exp(z - top)
    z: torch.Tensor | None  # (n, V) transformed logits, where they are kept for the gradient
    top: torch.Tensor  # (n,) max z of these words, which exps are relative to


def rows_at_a_time(logits: torch.Tensor) -> int:
    """Rows of logits (n, V) that several elementwise passes take together; their temporaries are as large."""
    elements = CACHED_ELEMENTS if logits.device.type == "cpu" else GPU_ELEMENTS
    return block_rows(elements // logits.shape[-1], logits.shape[0])


def raw_to_z(raw: torch.Tensor, bias: torch.Tensor | None, options: HeadOptions) -> torch.Tensor:
    """z of raw logits, in their memory."""
    return transform_logits(raw if bias is None else raw.add_(bias), options, inplace=True)


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """(n, 1) sums of x (n, V), each row's the same whatever n is.

    torch splits the sum of a lone row of 32,768 and more over its threads, and adds in another order than of two rows.
    """
    lone = x.shape[0] == 1 and rows_at_a_time(x) > 1
    return x.expand(2, -1).sum(-1, keepdim=True)[:1] if lone else x.sum(-1, keepdim=True)


def words_here(targets: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """targets (n, 1) brought into [0, vocab), and whether they were there."""
    return targets.clamp(0, vocab - 1), (targets >= 0) & (targets < vocab)


def exponentials(logits, bias, targets, options: HeadOptions, want_entropy: bool, out) -> Exponentials:
    """`RowKernels.exponentials`; overwrites logits."""
    blocks = zip(*(t.split(rows_at_a_time(logits)) for t in (logits, targets, out)), strict=True)
    parts = [block_exponentials(block, bias, *rest, options, want_entropy) for block, *rest in blocks]
    return Exponentials(*(torch.cat(part).squeeze(-1) for part in zip(*parts, strict=True)))


def block_exponentials(
    logits, bias, targets, out, options: HeadOptions, want_entropy: bool
) -> tuple[torch.Tensor, ...]:
    """The three sums of some rows, each (n, 1), and their matrix in out (n, V)."""
    z, word = raw_to_z(logits, bias, options), targets[:, None]
    own, base = z.gather(-1, word), z.amax(-1, keepdim=True)
    cap_slope = None
    if options.softcap > 0.0:
        cap_slope = (z * (options.temperature / options.softcap)).square_().neg_().add_(1.0)
    shifted = z.sub_(base)
    finite = shifted.clamp_min(FAR_BELOW) if want_entropy else None
    exps = shifted.exp_().scatter_(-1, word, 0.0)
    rest = row_sums(exps)
    dots = row_sums(finite.mul_(exps)) if want_entropy else torch.zeros_like(rest)
    exps.scatter_(-1, word, -rest)
    if cap_slope is not None:
        exps.mul_(cap_slope)
    broken = rest.isfinite().logical_not_().logical_or_((own - base).isnan())  # a lone word has a rest of 0
    if broken.device.type != "cpu" or bool(broken.any()):
        exps.masked_fill_(broken, 0.0)
    if out.data_ptr() != exps.data_ptr():
        out.copy_(exps)
    return own - base, rest, dots


def statistics(
    logits, bias, targets, options: HeadOptions, want_entropy: bool, keep_logits: bool
) -> tuple[Partials, RowState]:
    """`RowKernels.statistics`; overwrites logits.

    The sum is torch's pairwise one: torch.softmax's own running sum is off by 5e-6 at 152,000 words.
    """
    exps = torch.empty_like(logits) if keep_logits else logits
    blocks = zip(*(t.split(rows_at_a_time(logits)) for t in (logits, exps, targets)), strict=True)
    parts = [block_statistics(raw_to_z(block, bias, options), *rest, want_entropy) for block, *rest in blocks]
    partials = Partials(*(torch.cat(part).squeeze(-1) for part in zip(*parts, strict=True)))
    return partials, RowState(exps, logits if keep_logits else None, partials.top)


def block_statistics(
    z: torch.Tensor, exps: torch.Tensor, targets: torch.Tensor, want_entropy: bool
) -> tuple[torch.Tensor, ...]:
    """The four partials of some rows, each (n, 1); writes exps (n, V).

    Plain pairwise sums: a batched matrix product errs by 1e-3 at 152,000 words.
    """
    top = z.amax(-1, keepdim=True)
    words, here = words_here(targets[:, None], z.shape[-1])
    chosen = torch.where(here, z.gather(-1, words), -torch.inf)
    # A row of -inf alone has no finite maximum to subtract: its exponentials are 0, not NaN.
    shifted = torch.sub(z, top.clamp_min(torch.finfo(z.dtype).min), out=exps)
    finite = shifted.clamp_min(FAR_BELOW) if want_entropy else None
    total = row_sums(exps.exp_())
    dots = row_sums(finite.mul_(exps)) if want_entropy else torch.zeros_like(total)
    return top, total, dots, chosen


def gradient(state: RowState, bias, targets, options: HeadOptions, softmax: Softmax, slopes: Slopes, out) -> None:
    """`RowKernels.gradient`; overwrites the state's exponentials."""
    d_logps, d_entropy = (None if t is None else t[:, None] for t in slopes)
    top, total = softmax.top[:, None], softmax.total[:, None]
    scale = (state.top[:, None] - top).exp_().div_(total)  # exps * scale = p
    words, here = words_here(targets[:, None], state.exps.shape[-1])
    idle, slope, offset = d_logps == 0, None, -d_logps * scale
    if d_entropy is not None:
        idle = idle & (d_entropy == 0)
        slope = -d_entropy * scale
        offset = offset + d_entropy * (total.log() - softmax.entropy[:, None]) * scale
    at_target = torch.where(here, d_logps, 0.0)
    columns = (state.exps, state.z, top, words, at_target, idle, slope, offset)
    step = rows_at_a_time(state.exps)
    for start in range(0, targets.shape[0], step):
        rows = slice(start, start + step)
        grad = block_gradient(*(None if t is None else t[rows] for t in columns), options)
        if out.data_ptr() != state.exps.data_ptr():
            out[rows].copy_(grad)


def block_gradient(grad, z, top, words, at_target, idle, slope, offset, options: HeadOptions) -> torch.Tensor:
    """exps (n, V) of some rows becomes exps * (slope * (z - top) + offset) + at_target at their words, then d raw.

    The per-row arguments are (n, 1); slope is None where no entropy has a gradient.
    """
    if slope is None:
        grad.mul_(offset)
    else:
        grad.mul_((z - top).clamp_min_(FAR_BELOW).mul_(slope).add_(offset))
    grad.scatter_add_(-1, words, at_target)
    transform_backward(grad, z, options)
    if idle.device.type != "cpu" or bool(idle.any()):  # looking is free on a CPU and waits for the queue elsewhere
        grad.masked_fill_(idle, 0.0)
    return grad


ROW_KERNELS = RowKernels(exponentials, statistics, gradient)
