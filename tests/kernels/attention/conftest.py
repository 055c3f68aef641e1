"""Fixtures of the attention tests."""

from __future__ import annotations

import pytest

from mmrpt_kernels.attention import portable_dense
from tests.kernels.attention.attention_checks import PLAIN


@pytest.fixture(autouse=True)
def plain_tiles(request, monkeypatch) -> None:
    """With the parameter run=PLAIN the portable backend does without torch's fused CPU attention."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("run") is PLAIN:
        monkeypatch.setattr(portable_dense, "FLASH_AVAILABLE", False)
