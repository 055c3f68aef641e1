"""The attention benchmark as far as a CPU shows it: a run end to end, the GPU's cases and contenders, the goals."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_attention as attention
from benchmarks import harness, present
from benchmarks.goals import CaseRows

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


UNCOMPILED = [c for c in attention.contenders(CPU) if "compiled" not in c.name and "Flex" not in c.name]


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("forward", (1, 64), {}),
        ("train", (1, 40), {"train": True}),
        ("decode", (2, 48), {"rows": 1}),
        ("suffix", (2, 48), {"rows": 5}),
    ],
)
def test_all_contenders_pass_the_gate_and_are_timed(name: str, sizes: tuple[int, int], options: dict) -> None:
    case = attention.case(name, *sizes, (4, 2, 8), 0.5, dtype=torch.float32, **options)
    rows = harness.compare(case, UNCOMPILED, CPU, budget=0.1)
    for contender, row in rows.items():
        refused = name == "suffix" and contender in ("sdpa+mass", "SDPA + visual_mass, text rows")
        assert row["status"].startswith("skipped: sdpa+mass aligns" if refused else "ok"), (contender, row["status"])
        assert refused or min(row["samples"]) > 0
    gradients = {"d_q", "d_k", "d_v"} if name == "train" else set()
    assert set(rows["portable"]["errors"]) == {"out", "mass"} | gradients
    assert set(rows["portable (no mass)"]["errors"]) == {"out"}


def test_the_gpus_cases_are_those_of_the_goals_first() -> None:
    cases = attention.cases(GPU)
    keys = [(case.params["S"], round(case.params["S"] * case.params["visual"])) for case in cases if case.quick]
    assert set(keys) == {(8192, 2048), (16384, 2048)} and all(case.quick for case in cases[: len(keys)])
    assert {case.params["Hq"] for case in cases} == {16, 28, 32, 40}
    assert {case.params["S"] for case in cases} >= {2048, 4096, 8192, 16384, 32768}
    assert {case.params["T"] for case in cases if "decode" in case.name} == {1, 16}
    assert {case.params["visual"] for case in cases} >= {0.25, 0.5, 0.75}
    assert all(case.params["D"] == 128 and case.params["dtype"] == "bfloat16" for case in cases)


def test_whoever_is_absent_on_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    square = attention.case("c", 1, 64, (4, 2, 8), 0.5)
    few = attention.case("d", 2, 64, (4, 2, 8), 0.5, rows=16)
    train = attention.case("e", 1, 64, (4, 2, 8), 0.5, train=True)
    found = {c.name: c for c in attention.contenders(GPU)}

    def why(name: str, case) -> str | None:
        return found[name].skip(case) if callable(found[name].skip) else found[name].skip

    assert why("flash-attn 2 (no mass)", square) == "flash_attn is not installed"
    assert why("flash-attn 3 (no mass)", square) == "flash_attn_interface is not installed"
    assert why("flash_colreduce (per key)", square) == "flash_colreduce is not installed"
    assert why("flash_colreduce (per key)", train) == "flash_colreduce has no backward pass"
    assert why("flash_colsum (per key)", few) == "flash_colsum's causal pass takes one sample"
    for name in ("SDPA cuDNN (no mass)", "sdpa+mass", "SDPA + visual_mass, text rows"):
        assert why(name, square) is None and "aligns causality with the first key" in why(name, few), name
    assert why("SDPA flash (no mass)", few) is None


def row(seconds: float, **errors: float) -> dict:
    return {"kind": "ours", "seconds": [seconds] * 3, "errors": errors}


def test_goals_are_ratios_of_what_was_timed() -> None:
    rows = {
        "eager with weights": row(50.0, out=1e-3, mass=2e-3),
        "SDPA flash (no mass)": row(1.2),
        "SDPA cuDNN (no mass)": row(0.98),
        "triton (no mass)": row(1.0),
        "triton": row(1.02, out=1e-3, mass=1e-3),
        "sdpa+mass": row(1.1),
        "SDPA + visual_mass, text rows": row(1.05),
    }
    big = CaseRows("attention", "big", {"T": 8192, "train": False}, rows)
    small = CaseRows("attention", "small", {"T": 512, "train": True}, {"triton": row(1.0)})
    found = {goal["goal"]: goal for goal in attention.goals([big, small], "cuda")}
    assert len(found) == 5 and {goal["case"] for goal in found.values()} == {"big"}
    assert found["time with mass / without, our kernels"]["measured"] == pytest.approx(1.02)
    assert found["fastest attention's time / best with mass"]["measured"] == pytest.approx(0.98 / 1.02)
    assert found["fastest attention's time / mass of text rows"]["met"] is False
    assert found["eager's time / best with mass"]["measured"] == pytest.approx(50 / 1.02)
    assert found["largest error / eager's, our kernels"]["measured"] == pytest.approx(1.0)
    lengths = [
        CaseRows(
            "attention", f"forward-7b-{n}k", {"T": n * 1024, "train": False}, {"triton": row(1.0) | {"peak_bytes": p}}
        )
        for n, p in ((8, 100), (16, 199))
    ]
    assert attention.goals(lengths, "cuda")[-1]["measured"] == pytest.approx(1.99)
    printed = present.goals_table(list(found.values()))
    assert "| fastest attention's time / mass of text rows | big  | 0.933    | >= 0.94 | no  |" in printed
    assert attention.goals([big], "cpu") == []
