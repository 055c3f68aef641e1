"""The backend table: order of choice, refusals, overrides, tracing."""

from __future__ import annotations

import pytest
import torch

from mmrpt_kernels import backends
from mmrpt_kernels.backends import BackendError, Row, select, table, use_backend

CPU = torch.device("cpu")


def choose(op="perception", device=CPU, dtype=torch.float32, **kwargs):
    return select(op, device=device, dtype=dtype, **kwargs)


@pytest.fixture
def with_fast_row(monkeypatch):
    """A table with one row ahead of the others that takes bfloat16 on a GPU and nothing packed."""
    row = Row("perception", "triton", ("cuda",), (torch.bfloat16,), ("packed",), "for this test")
    monkeypatch.setattr(backends, "TABLE", [row, *backends.TABLE])


def test_every_operator_has_portable_and_reference():
    for op in backends.OPERATORS:
        assert choose(op) == "portable"
        assert choose(op, requested="reference") == "reference"


def test_the_first_row_that_serves_is_chosen(with_fast_row):
    gpu = torch.device("cuda", 0)
    assert choose(device=gpu, dtype=torch.bfloat16) == "triton"
    assert choose(device=gpu, dtype=torch.float32) == "portable"
    assert choose(device=gpu, dtype=torch.bfloat16, traits=frozenset({"packed"})) == "portable"
    assert choose(dtype=torch.bfloat16) == "portable"


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        ({"dtype": torch.bfloat16}, "runs on cuda"),
        ({"device": torch.device("cuda", 0)}, "takes torch.bfloat16"),
        ({"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "traits": frozenset({"packed"})}, "packed"),
    ],
)
def test_a_backend_that_cannot_serve_says_why_and_who_can(with_fast_row, kwargs, reason):
    with pytest.raises(BackendError) as error:
        choose(requested="triton", **kwargs)
    for word in ("perception", "'triton'", reason, "portable, reference"):
        assert word in str(error.value)


def test_a_row_by_name_serves_only_who_asks(monkeypatch):
    row = Row("perception", "triton", ("cpu",), (torch.float32,), (), "interpreted", by_name=True)
    monkeypatch.setattr(backends, "TABLE", [row, *backends.TABLE])
    assert choose() == "portable" and choose(requested="triton") == "triton"
    with use_backend("triton"):
        assert choose() == "triton"
    assert "cpu, by name" in table()


def test_a_backend_that_is_not_installed_says_so(monkeypatch):
    row = Row("perception", "triton", ("cpu",), (torch.float32,), (), "fast", missing="triton is not installed")
    monkeypatch.setattr(backends, "TABLE", [row, *backends.TABLE])
    assert choose() == "portable" and "triton is not installed" in table()
    with pytest.raises(BackendError, match="cannot serve this call: triton is not installed; use one of portable"):
        choose(requested="triton")


def test_of_a_backends_rows_the_one_for_the_device_gives_the_reason(monkeypatch):
    rows = [Row("perception", "triton", (kind,), (torch.float32,), ("packed",), "fast") for kind in ("cpu", "cuda")]
    for order in (rows, rows[::-1]):
        monkeypatch.setattr(backends, "TABLE", [*order, *backends.TABLE])
        with pytest.raises(BackendError, match="it does not support: packed"):
            choose("perception", requested="triton", traits=frozenset({"packed"}))


def test_the_tables_own_choice_asks_nobody():
    with use_backend("reference"):
        assert backends.first_choice("logprobs", device=CPU, dtype=torch.float32) == "portable"


def test_unknown_names_and_missing_backends_raise(monkeypatch):
    with pytest.raises(BackendError, match="expected one of cuda, triton, sdpa.mass, flash-attn.mass, portable"):
        choose(requested="fast")
    with pytest.raises(BackendError, match="has no such backend"):
        choose("perception", requested="cuda")
    with pytest.raises(BackendError, match="use_backend: got 'fast'"), use_backend("fast"):
        pass
    monkeypatch.setenv(backends.ENV_VARIABLE, "fast")
    with pytest.raises(BackendError, match=backends.ENV_VARIABLE):
        choose()


def test_no_backend_at_all_raises():
    with pytest.raises(BackendError, match="no backend serves torch.int32"):
        choose(dtype=torch.int32)


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


@pytest.mark.parametrize(
    "dtype, traits, expected",
    [
        (torch.bfloat16, "", "sdpa+mass"),
        (torch.bfloat16, "mass_gradient", "triton"),
        (torch.bfloat16, "window", "triton"),
        (torch.float16, "key_padding_mask", "triton"),
        (torch.float16, "attn_mask", "triton"),
        (torch.bfloat16, "attn_mask softcap", "triton"),
        (torch.bfloat16, "packed", "triton"),
        (torch.float32, "mass_gradient", "sdpa+mass"),
        (torch.float32, "softcap", "portable"),
        (torch.bfloat16, "head_size_over_256", "portable"),
    ],
    ids=str,
)
def test_what_serves_attention_on_a_gpu(dtype, traits, expected):
    gpu = torch.device("cuda", 0)
    assert choose("attention", gpu, dtype, traits=frozenset(traits.split()) or frozenset({"dense"})) == expected


def test_packed_halves_go_to_flash_attn_where_it_is_installed(monkeypatch):
    rows = [row._replace(missing="") if row.backend == "flash-attn+mass" else row for row in backends.TABLE]
    monkeypatch.setattr(backends, "TABLE", rows)
    gpu = torch.device("cuda", 0)
    for traits, expected in (
        ({"packed", "window", "softcap"}, "flash-attn+mass"),
        ({"packed", "mass_gradient"}, "triton"),
        ({"dense"}, "sdpa+mass"),
    ):
        assert choose("attention", gpu, torch.bfloat16, traits=frozenset(traits)) == expected
    assert choose("attention", gpu, torch.bfloat16, requested="flash-attn+mass") == "flash-attn+mass"


def test_triton_attention_refuses_float32():
    with pytest.raises(BackendError, match="it takes torch.bfloat16, torch.float16, the tensors are torch.float32"):
        choose("attention", torch.device("cuda", 0), torch.float32, requested="triton")
