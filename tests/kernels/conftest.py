"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmrpt_kernels.lm_head import gemm


@pytest.fixture(params=(True, False), ids=("half_products", "single_products"))
def multiplies(request, monkeypatch) -> None:
    """As on a CPU with instructions for bfloat16 products, whose matrix is bfloat16, and as on one without."""
    monkeypatch.setattr(gemm, "_cpu_multiplies_bfloat16", lambda: request.param)


@pytest.fixture
def products(monkeypatch) -> Callable[[], tuple[int, int, int]]:
    """Tells how many rows of logits were made, and how many of the matrix went into d hidden and d weight, since it was
    asked last."""
    counts = dict.fromkeys(("logits", "d_hidden", "add_d_weight"), 0)

    def counted(name: str, real: Callable) -> Callable:
        def product(first, *rest, **options):
            counts[name] += first.shape[0]
            return real(first, *rest, **options)

        return product

    def seen() -> tuple[int, int, int]:
        found = tuple(counts.values())
        counts.update(dict.fromkeys(counts, 0))
        return found

    for name in counts:
        monkeypatch.setattr(gemm, name, counted(name, getattr(gemm, name)))
    return seen
