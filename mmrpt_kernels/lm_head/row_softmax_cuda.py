"""Row kernels in CUDA C++ (csrc/lm_head), through the compiled extension; on CPU tensors their host build.

Plain calls, no custom operators: the chunk loop runs inside custom operators already, outside autograd and unseen by
compilers, and everything here is enqueued on torch's current stream, so memory is reused in the order of that stream.
A row's results do not depend on the other rows of a chunk, nor on where the row begins.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.common.extension import extension
from mmrpt_kernels.lm_head.options import HeadOptions, softcap_factors
from mmrpt_kernels.lm_head.row_softmax import Exponentials, Partials, RowKernels, Slopes, Softmax, max_above_target


def _run(
    kernel: str,
    rows: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    options: HeadOptions,
    numbers: torch.Tensor,
    out: torch.Tensor,
    entropy: bool,
) -> None:
    """Run a kernel of the extension where the tensors are.

    Args:
        rows: logits (n, V) float32, bias (V,) float32 or None, targets (n,) int64.
        numbers: (k, n) float32, contiguous: what the kernel gives of each row, or reads.
        out: (n, V), rows at any stride.
        entropy: whether one is wanted, or has a gradient.
    """
    logits, bias, targets = rows
    bias, targets = None if bias is None else bias.contiguous(), targets.contiguous()
    device, where = logits.device, None
    if device.type != "cpu":
        where = (device.index, torch.cuda.current_stream(device).cuda_stream)
    # The guard sets torch's current device to theirs, as the extension's own copy of the CUDA runtime does: the
    # driver's current context is one for both.
    with torch.cuda.device_of(logits):
        extension().row_softmax(
            kernel,
            str(out.dtype).removeprefix("torch."),
            addresses=[0 if t is None else t.data_ptr() for t in (logits, bias, targets, numbers, out)],
            sizes=[*logits.shape, logits.stride(0), out.stride(0)],
            entropy=entropy,
            max_above_target=max_above_target(entropy),
            head=[*softcap_factors(options), options.slope],
            capped=options.softcap > 0.0,
            where=where,
        )


def exponentials(logits, bias, targets, options: HeadOptions, want_entropy: bool, out) -> Exponentials:
    """`RowKernels.exponentials` for logits (n, V) float32; rows of logits and out at any stride."""
    numbers = logits.new_empty(3, logits.shape[0])
    _run("exponentials", (logits, bias, targets), options, numbers, out, want_entropy)
    return Exponentials(*numbers.unbind())


def statistics(
    logits, bias, targets, options: HeadOptions, want_entropy: bool, keep_logits: bool
) -> tuple[Partials, torch.Tensor]:
    """`RowKernels.statistics` for logits (n, V) float32, which stay as they are and are the state."""
    numbers = logits.new_empty(4, logits.shape[0])
    _run("statistics", (logits, bias, targets), options, numbers, logits, want_entropy)
    return Partials(*numbers.unbind()), logits


def gradient(state: torch.Tensor, bias, targets, options: HeadOptions, softmax: Softmax, slopes: Slopes, out) -> None:
    """`RowKernels.gradient`; state: the logits (n, V) float32. out: float32, bfloat16 or float16."""
    d_logps, d_entropy = slopes
    numbers = [softmax.top, softmax.total, d_logps]
    if d_entropy is not None:
        numbers += [softmax.entropy, d_entropy]
    numbers = torch.stack([t.float() for t in numbers])
    _run("gradient", (state, bias, targets), options, numbers, out, d_entropy is not None)


ROW_KERNELS = RowKernels(exponentials, statistics, gradient)
