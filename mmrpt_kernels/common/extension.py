"""The compiled extension, where it was built: `extension()` is the module or None; its absence is never an error."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

__all__ = ["build_info", "extension"]


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
