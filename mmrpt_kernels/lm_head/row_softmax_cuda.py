"""Row kernels in CUDA C++ (csrc/logprobs), through the compiled extension; on CPU tensors their host build.

Plain calls, no custom operators: the stream runs inside custom operators already, outside autograd and unseen by
compilers, and everything here is enqueued on torch's current stream, so memory is reused in the order of that stream.
"""

from __future__ import annotations

import torch

from mmrpt_kernels.common.extension import extension
from mmrpt_kernels.common.head import HeadOptions
from mmrpt_kernels.logprobs.rows import (
    Exponentials,
    Partials,
    RowKernels,
    Slopes,
    Softmax,
    most_above,
    register_rows,
)

__all__ = ["ROW_KERNELS"]


def _call(kernel: str, device: torch.device, *arguments) -> None:
    """Run a kernel of the extension where the tensors are.

    The guard sets torch's current device to theirs, as the extension's own copy of the CUDA runtime does: the driver's
    current context is one for both.
    """
    function = getattr(extension(), kernel)
    if device.type == "cpu":
        function(*arguments, None)
        return
    with torch.cuda.device(device):
        function(*arguments, (device.index, torch.cuda.current_stream().cuda_stream))


def _column(values: torch.Tensor) -> torch.Tensor:
    """(n,) float32 without gaps."""
    return values.to(torch.float32).contiguous()


def row_statistics(
    raw: torch.Tensor, targets: torch.Tensor, options: HeadOptions, want_entropy: bool, keep_logits: bool
) -> tuple[Partials, torch.Tensor]:
    """`RowKernels.statistics` for raw (n, V) float32, rows at any stride; raw stays as it is and is the state."""
    raw = raw if raw.stride(-1) == 1 else raw.contiguous()
    targets = targets.contiguous()
    out = raw.new_empty(4, raw.shape[0])
    addresses = (targets.data_ptr(), out.data_ptr())
    _call(
        "row_partials", raw.device, raw.data_ptr(), raw.stride(0), tuple(raw.shape), *addresses, want_entropy, options
    )
    return Partials(*out.unbind()), raw


def row_gradient(
    raw: torch.Tensor,
    targets: torch.Tensor,
    options: HeadOptions,
    softmax: Softmax,
    slopes: Slopes,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """`RowKernels.gradient` for raw (n, V) float32; into (n, V) float32, bfloat16 or float16, rows at any stride."""
    out = raw if into is None else into
    targets, (d_logps, d_entropy) = targets.contiguous(), slopes
    entropy = softmax.entropy if d_entropy is not None else None
    columns = [None if c is None else _column(c) for c in (softmax.top, softmax.total, entropy, d_logps, d_entropy)]
    addresses = [0 if column is None else column.data_ptr() for column in columns]
    _call(
        "row_gradient",
        raw.device,
        raw.data_ptr(),
        raw.stride(0),
        tuple(raw.shape),
        targets.data_ptr(),
        addresses,
        out.data_ptr(),
        out.stride(0),
        str(out.dtype).removeprefix("torch."),
        options,
    )
    return out


def row_exponentials(
    raw: torch.Tensor,
    targets: torch.Tensor,
    options: HeadOptions,
    want_entropy: bool,
    into: torch.Tensor | None = None,
) -> tuple[Exponentials, torch.Tensor]:
    """`RowKernels.exponentials` for raw (n, V) float32; into (n, V) float32 or bfloat16; rows of both at any stride."""
    out = raw if into is None else into
    targets, sums = targets.contiguous(), raw.new_empty(3, raw.shape[0])
    _call(
        "row_exponentials",
        raw.device,
        raw.data_ptr(),
        raw.stride(0),
        tuple(raw.shape),
        targets.data_ptr(),
        sums.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        str(out.dtype).removeprefix("torch."),
        want_entropy,
        most_above(want_entropy),
        options,
    )
    return Exponentials(*sums.unbind()), out


ROW_KERNELS = RowKernels(row_statistics, row_gradient, row_exponentials, rounds=True)
register_rows("cuda", ROW_KERNELS)
