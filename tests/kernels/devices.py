"""Where a test of Triton kernels runs: on the CPU in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
EVERYWHERE = (
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETING, reason="not interpreting")),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
on_devices = pytest.mark.parametrize("device", EVERYWHERE)


def on(device: str, implementation: Callable) -> Callable:
    """`implementation`, a tensor or a tuple of them, run on `device`: tensors are taken there and brought back."""

    def moved(*tensors, **keywords):
        keywords = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
        found = implementation(*(x.to(device) for x in tensors), **keywords)
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(x.cpu() for x in found)

    return moved
