"""What every test shares: a seed that failures print, GPU tests skipped elsewhere, a clean compiler and backend."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest
import torch

# Before any kernel is defined: without a GPU Triton's interpreter runs them. (Compile tests use a child process.)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Inductor's cache does not tell instruction sets apart: code made for wider registers, found by a run that is held to
# narrower ones (or the other way round), gives wrong numbers or writes behind its tensors.
CPU = torch.backends.cpu.get_cpu_capability().lower()
CACHE = Path(tempfile.gettempdir(), f"mmrpt-inductor-{os.getuid()}-{torch.__version__}-{CPU}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))

SEED = int(os.environ.get("MMRPT_TEST_SEED", "0"))


def pytest_configure(config: pytest.Config) -> None:
    from mmrpt_kernels.testing.interpreter import mend_interpreter

    mend_interpreter()


def pytest_report_header(config: pytest.Config) -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, MMRPT_TEST_SEED={SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"run again with MMRPT_TEST_SEED={SEED}"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """The run's seed, already given to random, numpy (where installed) and torch."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        import numpy
    except ImportError:
        return SEED
    numpy.random.seed(SEED % 2**32)
    return SEED


@pytest.fixture(autouse=True)
def no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests name their backends; one set in the shell must not change what they test."""
    monkeypatch.delenv("MMRPT_KERNELS_BACKEND", raising=False)


@pytest.fixture
def fresh_compiler():
    """Forget compiled code before and after, so that tests do not share recompile limits."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
