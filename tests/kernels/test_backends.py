"""The backend table: order of choice, refusals, overrides, tracing."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels import backends
from mmrpt_kernels.backends import BackendError, Row, select, table, use_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SINGLE, HALF = torch.float32, torch.bfloat16


def choose(op="perception", device=CPU, dtype=torch.float32, traits="", **kwargs):
    return select(op, device=device, dtype=dtype, traits=frozenset(traits.split()), **kwargs)


def test_every_operator_has_portable_and_reference():
    for op in backends.OPERATORS:
        assert choose(op) == "portable"
        assert choose(op, requested="reference") == "reference"


FAST = Row("perception", "triton", ("cuda",), (HALF,), ("packed",), "for this test")
BY_NAME = Row("perception", "triton", ("cpu",), (SINGLE,), (), "interpreted", by_name=True)
MISSING = Row("perception", "triton", ("cpu",), (SINGLE,), (), "fast", missing="triton is not installed")
OF_A_CPU, OF_A_GPU = (Row("perception", "triton", (kind,), (SINGLE,), ("packed",), "fast") for kind in ("cpu", "cuda"))
FLASH = next(row for row in backends.TABLE if row.backend == "flash-attn+mass" and row.op == "attention")
ASK, ATTENTION = {"requested": "triton"}, {"op": "attention", "device": GPU, "dtype": HALF}
WHO_CAN = "perception.*'triton'.*{}.*portable, reference"
# Rows ahead of the table, a call, and the backend that serves it.
CHOICES = [
    ([FAST], {"device": GPU, "dtype": HALF}, "triton"),
    ([FAST], {"device": GPU}, "portable"),
    ([FAST], {"device": GPU, "dtype": HALF, "traits": "packed"}, "portable"),
    ([FAST], {"dtype": HALF}, "portable"),
    ([BY_NAME], {}, "portable"),
    ([BY_NAME], ASK, "triton"),
    ([MISSING], {}, "portable"),
    ([], ATTENTION | {"traits": "dense"}, "sdpa+mass"),
    ([], ATTENTION | {"traits": "mass_gradient"}, "triton"),
    ([], ATTENTION | {"traits": "window"}, "triton"),
    ([], ATTENTION | {"traits": "key_padding_mask", "dtype": torch.float16}, "triton"),
    ([], ATTENTION | {"traits": "attn_mask", "dtype": torch.float16}, "triton"),
    ([], ATTENTION | {"traits": "attn_mask softcap"}, "triton"),
    ([], ATTENTION | {"traits": "packed"}, "triton"),
    ([], ATTENTION | {"traits": "mass_gradient", "dtype": SINGLE}, "sdpa+mass"),
    ([], ATTENTION | {"traits": "softcap", "dtype": SINGLE}, "portable"),
    ([], ATTENTION | {"traits": "head_size_over_256"}, "portable"),
    ([FLASH._replace(missing="")], ATTENTION | {"requested": "flash-attn+mass"}, "flash-attn+mass"),
]
# And what is said to a call that cannot be served.
REFUSALS = [
    ([FAST], ASK | {"dtype": HALF}, WHO_CAN.format("runs on cuda")),
    ([FAST], ASK | {"device": GPU}, WHO_CAN.format("takes torch.bfloat16")),
    ([FAST], ASK | {"device": GPU, "dtype": HALF, "traits": "packed"}, WHO_CAN.format("packed")),
    ([MISSING], ASK, "cannot serve this call: triton is not installed; use one of portable"),
    # Of a backend's rows the one for the device gives the reason.
    ([OF_A_CPU, OF_A_GPU], ASK | {"traits": "packed"}, "it does not support: packed"),
    ([OF_A_GPU, OF_A_CPU], ASK | {"traits": "packed"}, "it does not support: packed"),
    ([], ATTENTION | ASK | {"dtype": SINGLE}, "it takes torch.bfloat16, torch.float16, the tensors are torch.float32"),
    ([], {"requested": "fast"}, "expected one of cuda, triton, sdpa.mass, flash-attn.mass, portable"),
    ([], {"requested": "cuda"}, "has no such backend"),
    ([], {"dtype": torch.int32}, "no backend serves torch.int32"),
]


@pytest.mark.parametrize(("rows", "call", "expected"), CHOICES)
def test_who_serves(rows, call, expected, monkeypatch):
    monkeypatch.setattr(backends, "TABLE", [*rows, *backends.TABLE])
    assert choose(**call) == expected
    if rows == [BY_NAME]:
        assert "cpu, by name" in table()
        with use_backend("triton"):
            assert choose() == "triton"
    assert rows != [MISSING] or "triton is not installed" in table()


@pytest.mark.parametrize(("rows", "call", "words"), REFUSALS)
def test_what_cannot_be_served_is_refused(rows, call, words, monkeypatch):
    monkeypatch.setattr(backends, "TABLE", [*rows, *backends.TABLE])
    with pytest.raises(BackendError, match=f"(?s){words}"):
        choose(**call)


@pytest.mark.parametrize(
    ("traits", "expected"),
    [("packed window softcap", "flash-attn+mass"), ("packed mass_gradient", "triton"), ("dense", "sdpa+mass")],
)
def test_packed_halves_go_to_flash_attn_where_it_is_installed(traits, expected, monkeypatch):
    rows = [row._replace(missing="") if row.backend == "flash-attn+mass" else row for row in backends.TABLE]
    monkeypatch.setattr(backends, "TABLE", rows)
    assert choose(**ATTENTION, traits=traits) == expected


def test_names_of_no_backend_are_refused_wherever_they_stand(monkeypatch):
    with pytest.raises(BackendError, match="use_backend: got 'fast'"), use_backend("fast"):
        pass
    monkeypatch.setenv(backends.ENV_VARIABLE, "fast")
    with pytest.raises(BackendError, match=backends.ENV_VARIABLE):
        choose()


def test_the_tables_own_choice_asks_nobody():
    with use_backend("reference"):
        assert backends.first_choice("logprobs", device=CPU, dtype=torch.float32) == "portable"


def test_call_beats_context_beats_environment_beats_table(monkeypatch):
    monkeypatch.setenv(backends.ENV_VARIABLE, "reference")
    assert choose() == "reference"
    with use_backend("portable"):
        assert choose() == "portable"
        assert choose(requested="reference") == "reference"
        with use_backend(None):
            assert choose() == "reference"
        assert choose() == "portable"
    assert choose() == "reference"
    monkeypatch.setenv(backends.ENV_VARIABLE, "")
    assert choose() == "portable"


def test_use_backend_is_undone_by_an_exception():
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert choose() == "portable"


def test_select_is_traced_and_guarded_on_the_context(fresh_compiler):
    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        return x + (1 if select("logprobs", device=x.device, dtype=x.dtype) == "portable" else 2)

    x = torch.zeros(1)
    assert step(x) == 1
    with use_backend("reference"):
        assert step(x) == 2
    assert step(x) == 1


def test_the_table_prints_every_row(capsys):
    backends.print_table()
    printed = capsys.readouterr().out.splitlines()
    assert printed == table().splitlines() and len(printed) == len(backends.TABLE) + 1
    assert printed[0].split()[:2] == ["operator", "backend"]
