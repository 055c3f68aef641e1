"""What is installed beside torch: the compiled extension, where it was built, and triton. Absence is never an error."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The module or None, and the reason it is missing."""
    try:
        return importlib.import_module("mmrpt_kernels._C"), ""
    except ImportError as error:
        return None, str(error)


def extension() -> ModuleType | None:
    """mmrpt_kernels._C, or None where it was not built or cannot be loaded."""
    return _load()[0]


def build_info() -> dict[str, Any]:
    """What was built: {"built": bool, "reason": why not, "compiler", "cuda_architectures"}."""
    module, reason = _load()
    if module is None:
        return {"built": False, "reason": reason}
    return {"built": True, "reason": ""} | module.build_info()


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent is missing
        return False


def _why_no_triton() -> str:
    """Why triton cannot be imported; "" when it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error}): pip install triton"
    return ""


TRITON_MISSING = _why_no_triton()
