"""The lm head and the options that all its operators share, with their argument checks.

One order of operations everywhere:

    raw  = hidden @ weight.T + bias                            (N, V)
    s    = logit_scale * raw
    s    = softcap * tanh(s / softcap)        if softcap > 0
    z    = s / temperature

Log-probabilities are log_softmax(z). This is the order of models with a final soft cap (Gemma) that are sampled at a
temperature: the cap belongs to the model, the temperature to the sampler.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mmrpt_kernels import backends
from mmrpt_kernels.common import checks
from mmrpt_kernels.common.dtypes import FLOAT_DTYPES, statistics_dtype
from mmrpt_kernels.lm_head.row_selection import RowSelection
from mmrpt_kernels.lm_head.vocab_parallel import Shard, find_shard, group_traits


class HeadOptions(NamedTuple):
    """What happens between the raw logits and the softmax; the defaults change nothing."""

    temperature: float = 1.0
    softcap: float = 0.0
    logit_scale: float = 1.0

    @property
    def slope(self) -> float:
        """d z / d raw, where no soft cap saturates."""
        return self.logit_scale / self.temperature


class LoopOptions(NamedTuple):
    """How the chunk loop runs; nothing here changes a result beyond rounding (but for skip_below)."""

    backend: str  # whose row kernels: "portable", "triton" or "cuda"
    chunk_size: int | None = None  # rows of logits at a time; None: from a memory budget
    compact: bool = True  # count the rows to visit (one wait for the device) instead of visiting all
    skip_below: float = 0.0  # share of a chunk's gradient that `sparse_vocab` may approximate
    vocab_group: str | None = None  # name of the process group that the vocabulary is cut over
    cast: torch.dtype | None = None  # what autocast casts hidden, weight and bias to; None: nothing


# Both records field by field, as the schema of a custom operator names them; `option_records` puts them together again.
OPTIONS_SCHEMA = (
    "float temperature, float softcap, float logit_scale, "
    "str backend, int? chunk_size, bool compact, float skip_below, str? vocab_group, ScalarType? cast"
)


def option_records(values: tuple) -> tuple[HeadOptions, LoopOptions]:
    """The records of OPTIONS_SCHEMA's values."""
    count = len(HeadOptions._fields)
    return HeadOptions(*values[:count]), LoopOptions(*values[count:])


class Head(NamedTuple):
    """The lm head: weight (V, H), bias (V,) or None, and what happens between raw logits and softmax.

    With a shard, weight and bias are one rank's part of it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    options: HeadOptions
    shard: Shard | None = None

    @property
    def vocab(self) -> int:
        """Words of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab


def build_head(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    options: HeadOptions,
    loop: LoopOptions,
    targets: torch.Tensor,
    work: tuple[torch.Tensor, ...],
    same: tuple,
) -> Head:
    """The head of (hidden (N, H), weight, bias). With a vocab_group its ranks compare what they were asked for; one
    collective.

    Args:
        work: (N,) bool each, what will be done for a token; where nothing is, its target does not matter.
        same: what all ranks must have in common besides hidden, targets and the options.
    """
    hidden, weight, bias = tensors
    shard = None
    if loop.vocab_group is not None:
        common = (options, loop.chunk_size, loop.compact, loop.skip_below, same)
        shard = find_shard(loop.vocab_group, hidden, weight, targets, work, common)
    return Head(weight, bias, options, shard)


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    options: HeadOptions,
    chunk_size: int | None,
    *,
    part: bool = False,
) -> None:
    """Check the arguments that every head operator takes. Raises ValueError.

    Args:
        hidden: (..., H) float.
        weight: (V, H) float.
        bias: (V,) float or None.
        targets: (...) int64, or None.
        part: weight and bias are one rank's words, and whether there are any the ranks find out together.
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
    if targets is not None:
        checks.check_shape("targets", targets, tuple(hidden.shape[:-1]), "(...): one token id per row of hidden")
        checks.check_dtype("targets", targets, (torch.int64,))
    checks.check_same_device(hidden=hidden, weight=weight, bias=bias, targets=targets)
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


def check_compact(compact: bool) -> None:
    """Raise ValueError unless `compact` is True or False."""
    checks.check(
        isinstance(compact, bool),
        f"compact: got {compact!r}, expected True (visit the rows that count, after one wait for the device) or False "
        "(visit all rows, without a wait); leave it True",
    )


def check_targets(targets: torch.Tensor, selection: RowSelection, vocab: int) -> None:
    """Raise ValueError where a selected one of targets (N,) is no word. CPU only: elsewhere it would wait for the
    device."""
    if targets.device.type != "cpu":
        return
    wanted = targets[selection.rows if selection.valid is None else selection.rows[selection.valid]]
    if wanted.numel() == 0:
        return
    low, high = torch.aminmax(wanted)
    if int(low) < 0 or int(high) >= vocab:
        raise ValueError(
            f"targets: got ids from {int(low)} to {int(high)}, expected 0 to {vocab - 1}, the lm head's rows; mask "
            "these tokens out, set them to ignore_index, or keep placeholder ids out of sampling"
        )


def check_word_ids(targets: torch.Tensor | None, vocab: int) -> None:
    """Raise ValueError for ids of targets (N,) beyond the vocabulary; negative ones mean that there is none. CPU
    only."""
    if targets is not None and targets.device.type == "cpu" and targets.numel():
        top = int(targets.max())
        checks.check(
            top < vocab, f"targets: got id {top}, expected ids below the vocabulary size {vocab}; check the tokenizer"
        )


def select_backend(op: str, hidden, weight, bias, requested: str | None, vocab_group=None) -> str:
    """The table's choice for a head of any mixture of dtypes: one float64 tensor makes the logits float64."""
    wide = statistics_dtype(hidden, weight, bias) == torch.float64
    dtype = torch.float64 if wide else hidden.dtype
    traits = group_traits(vocab_group)
    return backends.select(op, device=hidden.device, dtype=dtype, requested=requested, traits=traits)


def as_wide(hidden: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    """hidden in float64 where another tensor of the head is: products of two halves would round what is float64.
    Differentiable."""
    return hidden.double() if statistics_dtype(hidden, *others) == torch.float64 else hidden


def softcap_factors(options: HeadOptions) -> tuple[float, float]:
    """(inner, outer) of z = outer * tanh(inner * raw) with a soft cap, z = outer * raw without: what kernels take."""
    softcap = options.softcap
    return (options.logit_scale / softcap, softcap / options.temperature) if softcap > 0.0 else (1.0, options.slope)


def transform_logits(raw: torch.Tensor, options: HeadOptions, *, inplace: bool = False) -> torch.Tensor:
    """z = softcap(logit_scale * raw) / temperature, shape and dtype of `raw`; may return `raw` itself.

    `inplace=True` overwrites `raw` (for chunks outside autograd); otherwise differentiable by autograd.
    """
    inner, outer = softcap_factors(options)
    if options.softcap > 0.0:
        return raw.mul_(inner).tanh_().mul_(outer) if inplace else torch.tanh(raw * inner) * outer
    if outer == 1.0:
        return raw
    return raw.mul_(outer) if inplace else raw * outer


def transform_backward(grad: torch.Tensor, transformed: torch.Tensor | None, options: HeadOptions) -> torch.Tensor:
    """d loss / d raw from d loss / d z, in the memory of `grad`.

    Args:
        grad: d loss / d z, the shape of the logits.
        transformed: z as `transform_logits` returned it; read only when softcap > 0 (tanh' = 1 - tanh^2), else None.
    """
    if options.softcap > 0.0:
        capped = transformed * (options.temperature / options.softcap)
        return grad.mul_(capped.square_().neg_().add_(1.0).mul_(options.slope))
    return grad if options.slope == 1.0 else grad.mul_(options.slope)
