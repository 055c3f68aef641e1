"""Where a test of Triton kernels runs: on the CPU in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import pytest
import torch

__all__ = ["INTERPRETING", "by_case_and_device", "on", "on_devices"]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
EVERYWHERE = (
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETING, reason="not interpreting")),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
on_devices = pytest.mark.parametrize("device", EVERYWHERE)


def by_case_and_device(chosen: Iterable, gpu_chosen: Iterable = ()) -> pytest.MarkDecorator:
    """Parameters `case` and `device`: `chosen` everywhere, `gpu_chosen` on a GPU besides."""
    made = [pytest.param(case, device.values[0], marks=device.marks) for device in EVERYWHERE for case in chosen]
    made += [pytest.param(case, "cuda", marks=pytest.mark.gpu) for case in gpu_chosen]
    return pytest.mark.parametrize("case, device", made, ids=lambda x: getattr(x, "name", x))


def on(device: str, implementation: Callable) -> Callable:
    """`implementation`, a tensor or a tuple of them, run on `device`: tensors are taken there and brought back."""

    def moved(*tensors, **keywords):
        keywords = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
        found = implementation(*(x.to(device) for x in tensors), **keywords)
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(x.cpu() for x in found)

    return moved
