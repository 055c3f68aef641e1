"""The public function `linear_logprobs`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from mmrpt_kernels.common import checks
from mmrpt_kernels.common.autocast import autocast_dtype, cast_to, dtypes_of
from mmrpt_kernels.lm_head.options import HeadOptions, LoopOptions, as_wide, check_compact, check_head, select_backend
from mmrpt_kernels.lm_head.sparse_vocab import skip_threshold
from mmrpt_kernels.lm_head.vocab_parallel import group_name, local_head
from mmrpt_kernels.logprobs import operator, reference
from mmrpt_kernels.logprobs.fused import LogProbsFunction


class LogProbs(NamedTuple):
    """logps (...) <= 0 and entropy (...) in [0, log V] or None, natural log, float32 (float64 for float64 inputs)."""

    logps: torch.Tensor
    entropy: torch.Tensor | None


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    compact: bool = True,
    skip_below: float | str | None = None,
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> LogProbs:
    """Log-probabilities of target tokens, and entropies, from hidden states: the (N, V) logits never exist.

        z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        logp = log_softmax(z)[target]          entropy = -sum_v p_v log p_v,  p = softmax(z)

    Both results are differentiable in hidden, weight and bias (once, in reverse: what asks for more raises). The
    backward does no work for rows whose incoming gradient is exactly zero, so filtering tokens pays off in any trainer,
    unmodified.

    Args:
        hidden: (..., H) half, bfloat16, float32 or float64.
        weight: (V, H), the lm head, best in hidden's dtype: of two dtypes all products are made in float32, exact but
            without a GPU's tensor cores (there a warning says so once). A DTensor is gathered, or used in parts
            (docs/sharded_head.md).
        targets: (...) int64; rows of `ignore_index` give logp 0, entropy 0, no gradient and no work.
        bias: (V,) or None.
        temperature: > 0, divides the logits.
        softcap: >= 0, s -> softcap * tanh(s / softcap) before the temperature; 0 = none.
        logit_scale: multiplies the raw logits.
        return_entropy: also compute the entropy, about a tenth more work.
        chunk_size: rows of logits held at once; None: from a memory budget. Results do not depend on it beyond
            rounding.
        compact: True: compute the rows that count and no others; the forward and the backward pass each wait for the
            device once, to count them. False: compute all rows, without a wait, as CUDA graphs need it. Same results.
        skip_below: None: exact gradients. A number: the words that together have at most this share of a chunk's
            gradient (sum of its absolute values over rows) may leave the backward's products, their part replaced by an
            estimate of rank one; rows that would lose far more than others are computed whole. "auto": half the inputs'
            eps, 2^-8 for bfloat16, which keeps the error near eager's; exact for inputs wider than half precision. Pays
            where few words get nearly all the probability (a trained model's); waits for the device twice a chunk.
        backend: "cuda", "triton", "portable", "reference" or None for the table's choice (`mmrpt_kernels.backends`).
        vocab_group: process group over which the vocabulary is cut: weight (V_r, H) and bias (V_r,) are then this
            rank's words, ranks in word order, any V_r >= 1; targets stay ids of the whole vocabulary. All other
            arguments, and the incoming gradients, must be the same on all its ranks, which must all make the call and
            its backward. Results are then bit-identical on all ranks; d weight is this rank's part, d hidden the whole
            sum. Each of the two passes waits for the device once more, whatever `compact` is.

    Precision, whatever the inputs' dtype and the backend: the logits are float32 and never rounded below it, so a
    log-probability is within 1e-5 of float64's given the same inputs, at vocabularies up to 152k and logits of trained
    models' sizes; it depends on the chunk and on the other rows by no more than float32 rounding of one dot product.
    That is at torch's default precision of float32 products: torch.set_float32_matmul_precision("high" or "medium")
    and allow_tf32 round float32 inputs here as everywhere (a log-probability erred by 6e-3 at "medium" on a CPU).
    bfloat16 inputs lose nothing by it: on a CPU with AMX `torch.backends.mkldnn.matmul.fp32_precision = "bf16"` makes
    their logits faster; it holds for the whole process, so it is the caller's to say.
    bfloat16 inputs' d logits are rounded to bfloat16 for their products where these have instructions of their own
    (CUDA; AMX and AVX512-BF16), float16's on CUDA, each row in units of its own.
    Under autocast hidden, weight and bias are cast inside, anew in each pass: gradients come in the dtypes given here,
    those of a float32 head never rounded to the autocast dtype (but for backend "reference").

    Raises:
        ValueError: a shape, dtype, device or option that cannot be meant; on a CPU also a target outside [0, V); on all
            ranks of vocab_group, where their tokens or options differ.
        BackendError: `backend` cannot serve the call.
    """
    options = HeadOptions(float(temperature), float(softcap), float(logit_scale))
    weight, bias, vocab_group = local_head(hidden, targets, weight, bias, vocab_group)
    check_head(hidden, weight, bias, targets, options, chunk_size, part=vocab_group is not None)
    check_compact(compact)
    name = select_backend("logprobs", hidden, weight, bias, backend, vocab_group)
    cast = autocast_dtype(hidden)
    if name == "reference":
        hidden, weight, bias = cast_to(cast, hidden, weight, bias)
        return LogProbs(
            *reference.linear_logprobs(hidden, weight, targets, bias, options, ignore_index, return_entropy)
        )
    checks.check_reverse_mode("linear_logprobs", hidden, weight, bias)
    flat, shape = as_wide(hidden, weight, bias).reshape(-1, hidden.shape[-1]), targets.shape
    skipped = skip_threshold(skip_below, dtypes_of(flat, weight, cast=cast), compact)
    loop = LoopOptions(name, chunk_size, compact, skipped, group_name(vocab_group), cast)
    arguments = (flat, weight, bias, targets.reshape(-1), ignore_index, return_entropy)
    if torch.compiler.is_compiling():
        logps, entropy = operator.linear_logprobs(*arguments, *options, *loop)
    else:
        need = checks.gradients_wanted(flat, weight, bias)
        logps, entropy = LogProbsFunction.apply(*arguments, need, options, loop)
    return LogProbs(logps.view(shape), entropy.view(shape) if return_entropy else None)
