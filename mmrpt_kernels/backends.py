"""Which backend serves which call, and why: one table.

The order of choice is: `backend=` of the call, then `use_backend(...)`, then the environment variable
MMRPT_KERNELS_BACKEND, then the first row of TABLE that serves the call. Nothing falls back in silence: a backend that
was asked for and cannot serve raises BackendError. `python -m mmrpt_kernels.backends` prints the table. Compiled graphs
guard on `use_backend`, not on the environment: set the variable before the first compiled call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from mmrpt_kernels.common.dtypes import FLOAT_DTYPES as FLOATS
from mmrpt_kernels.common.extension import TRITON_MISSING, build_info, installed

__all__ = [
    "BACKENDS",
    "TABLE",
    "TRITON_MISSING",
    "BackendError",
    "Row",
    "first_choice",
    "print_table",
    "select",
    "table",
    "use_backend",
]

BACKENDS = ("cuda", "triton", "sdpa+mass", "flash-attn+mass", "portable", "reference")
OPERATORS = ("attention", "visual_mass", "logprobs", "policy_loss", "token_loss", "divergence", "perception")
ENV_VARIABLE = "MMRPT_KERNELS_BACKEND"


class BackendError(ValueError):
    """A backend was asked for that cannot serve the call; the message names the reason and the backends that can."""


# Triton decides when a kernel is defined whether it is compiled or interpreted, so this holds for the process.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _why_no_extension(device: str) -> str:
    """Why the compiled extension cannot serve tensors on `device`, "cpu" or "cuda"; "" when it can."""
    built = build_info()
    if not built["built"]:
        return f"extension not built ({built['reason']}): python setup.py build_ext --inplace"
    if device == "cuda" and not built["cuda_architectures"]:
        return "extension built without CUDA sources: build it where nvcc is (python setup.py build_ext --inplace)"
    return ""


class Row(NamedTuple):
    """One backend of one operator. Rows of an operator stand in order of preference: the fastest first. A backend may
    have two: one for what it is best at, one by name for all that it can."""

    op: str  # in ROWS: words of OPERATORS that have the row alike
    backend: str
    devices: tuple[str, ...]  # device types; () = any
    dtypes: tuple[torch.dtype, ...]
    lacks: tuple[str, ...]  # traits of a call it does not serve, e.g. "packed"
    why: str  # what it is good for
    by_name: bool = False  # chosen only where it is asked for
    missing: str = ""  # why it cannot serve at all here


NO_CUDA, NO_HOST = _why_no_extension("cuda"), _why_no_extension("cpu")
NO_FLASH_ATTN = "" if installed("flash_attn") or installed("flash_attn_interface") else "flash-attn is not installed"
INTERPRETER = "Triton's interpreter, for tests"
HALVES, WIDE, NO_DOUBLE = FLOATS[1:3], (torch.float32, torch.float64), FLOATS[:3]
LOSSES = "logprobs policy_loss token_loss"
# Of attention: what no vendor's kernel takes, and the cases in which SDPA's causal masks are not bottom-right aligned.
BIG = ("head_size_over_256",)
VENDOR = ("key_padding_mask", "attn_mask", "value_dim", "scale_not_positive")
SDPA = ("packed", "window", "softcap", "causal_suffix", *VENDOR)
FLASH_ATTN, SDPA_GPU = (*VENDOR, "head_size_not_8s", *BIG), (*SDPA, "head_size_not_8s", *BIG)

ROWS = (
    Row("attention", "flash-attn+mass", ("cuda",), HALVES, ("dense", "mass_gradient", *FLASH_ATTN),
        "flash-attn's varlen kernel, then visual_mass on its lse, for packed sequences", missing=NO_FLASH_ATTN),
    Row("attention", "sdpa+mass", ("cuda",), HALVES, ("mass_gradient", *SDPA_GPU),
        "SDPA's cuDNN or flash kernel, then visual_mass on its lse, where the mass needs no gradient"),
    Row("attention", "triton", ("cuda",), HALVES, BIG,
        "mass beside the row sum of a flash kernel, both differentiable; compute capability 8.0 or newer",
        missing=TRITON_MISSING),
    Row("attention", "sdpa+mass", ("cuda",), FLOATS[:1], SDPA_GPU,
        "SDPA's memory-efficient kernel, then visual_mass on its lse"),
    Row("attention", "flash-attn+mass", ("cuda",), HALVES, FLASH_ATTN, "also dense, and with a gradient of the mass",
        True, NO_FLASH_ATTN),
    Row("attention", "sdpa+mass", ("cuda",), HALVES, SDPA_GPU, "also with a gradient of the mass", True),
    # No halves: the CPU kernel's exponential makes their lse wrong by 5e-5, ours are good to float32.
    Row("attention", "sdpa+mass", ("cpu",), WIDE, SDPA, "SDPA's flash kernel; portable needs one pass, not two", True),
    # Float32 besides, so that sums are checked to its accuracy; bfloat16 products are wrong there.
    Row("attention visual_mass", "triton", ("cpu",), (torch.float32, torch.float16), BIG, INTERPRETER, True,
        TRITON_MISSING),
    Row("visual_mass", "triton", ("cuda",), HALVES, BIG,
        "wanted rows and weighted key blocks alone; compute capability 8.0 or newer", missing=TRITON_MISSING),
    Row(LOSSES, "cuda", ("cuda",), NO_DOUBLE, (),
        "row kernels in CUDA C++; by name until they are measured against the others on a GPU", True, NO_CUDA),
    Row(LOSSES, "cuda", ("cpu",), NO_DOUBLE, (), "the host's build of the CUDA row kernels, for tests", True, NO_HOST),
    Row(LOSSES, "triton", ("cuda",), NO_DOUBLE, (),
        "Triton's row kernels between the vendor's products; compute capability 8.0 or newer; not yet timed",
        missing=TRITON_MISSING),
    Row(LOSSES, "triton", ("cpu",), NO_DOUBLE, (), INTERPRETER, True, TRITON_MISSING),
    Row("divergence", "triton", ("cuda",), NO_DOUBLE, (),
        "one sweep over both views' logits (two for js); gradients in the products' dtype",
        missing=TRITON_MISSING),
    Row("divergence", "triton", ("cpu",), NO_DOUBLE, (), INTERPRETER, True, TRITON_MISSING),
    Row(" ".join(OPERATORS), "portable", (), FLOATS, (), "chunked PyTorch, any device"),
    Row(" ".join(OPERATORS), "reference", (), FLOATS, ("vocab_group",), "the definition: slow, float64-capable"),
)  # fmt: skip
TABLE = [row._replace(op=op) for row in ROWS for op in row.op.split() if _INTERPRETED or row.why is not INTERPRETER]

# A plain module variable, not a ContextVar: torch.compile guards on it and traces through.
_override: str | None = None


def _refusal(row: Row, device: torch.device, dtype: torch.dtype, traits: frozenset[str]) -> str | None:
    """Why `row` cannot serve the call, or None when it can."""
    if row.missing:
        return row.missing
    if row.devices and device.type not in row.devices:
        return f"it runs on {', '.join(row.devices)}, the tensors are on {device.type}"
    if dtype not in row.dtypes:
        return f"it takes {', '.join(str(d) for d in row.dtypes)}, the tensors are {dtype}"
    missing = [trait for trait in row.lacks if trait in traits]
    if missing:
        return f"it does not support: {', '.join(missing)}"
    return None


def _check_name(name: str, origin: str) -> None:
    if name not in BACKENDS:
        raise BackendError(f"{origin}: got {name!r}, expected one of {', '.join(BACKENDS)}; choose one, or None")


def _asked_for(requested: str | None) -> tuple[str | None, str]:
    """The backend somebody asked for, if any, and where they asked."""
    if requested is not None:
        return requested, "backend"
    if _override is not None:
        return _override, "use_backend"
    return os.environ.get(ENV_VARIABLE) or None, ENV_VARIABLE


def first_choice(op: str, *, device: torch.device, dtype: torch.dtype, traits: frozenset[str] = frozenset()) -> str:
    """The table's own choice, whatever was asked for; arguments and errors as in `select`."""
    for row in TABLE:
        if row.op == op and not row.by_name and _refusal(row, device, dtype, traits) is None:
            return row.backend
    raise BackendError(f"{op}: no backend serves {dtype} on {device.type} with {sorted(traits)}; see print_table()")


def select(
    op: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None = None,
    traits: frozenset[str] = frozenset(),
) -> str:
    """The backend that serves a call: a word of BACKENDS.

    Args:
        op: a word of OPERATORS.
        device, dtype: of the call's main tensors.
        requested: the call's `backend=` argument.
        traits: what else the call needs, in words that rows may list under `lacks`.

    Raises:
        BackendError: the backend asked for does not exist for this operator or cannot serve the call, or none can.
    """
    asked, origin = _asked_for(requested)
    if asked is None:
        return first_choice(op, device=device, dtype=dtype, traits=traits)
    _check_name(asked, origin)
    able, reason = [], None
    for row in (row for row in TABLE if row.op == op):
        refusal = _refusal(row, device, dtype, traits)
        if refusal is None and row.backend == asked:
            return asked
        if refusal is None:
            able += [] if row.by_name else [row.backend]  # what is for tests is no advice
        elif row.backend == asked and (reason is None or device.type in row.devices):
            reason = refusal  # of its rows the one for this device knows best
    raise BackendError(
        f"{op}: {origin} asks for {asked!r}, which cannot serve this call: {reason or f'{op} has no such backend'}; "
        f"use one of {', '.join(able) or 'none'}, or leave the choice to the table"
    )


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Calls inside the `with` block use backend `name` unless they ask for another one; None lifts an outer choice.

    The choice is process-wide: threads share it. Raises BackendError for an unknown name.
    """
    global _override
    if name is not None:
        _check_name(name, "use_backend")
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def table() -> str:
    """TABLE as text, one line a row, in the order of choice."""
    head = ("operator", "backend", "devices", "dtypes", "does not serve", "what it is")
    lines = [head]
    for row in TABLE:
        dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
        devices = (" ".join(row.devices) or "any") + (", by name" if row.by_name else "")
        lines.append((row.op, row.backend, devices, dtypes, ", ".join(row.lacks) or "-", row.missing or row.why))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def print_table() -> None:
    """Print `table()`."""
    print(table())


if __name__ == "__main__":
    print_table()
