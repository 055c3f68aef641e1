"""The attention benchmark as far as a CPU shows it: a run end to end, the GPU's cases and contenders, the goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import attention, present

GPU = torch.device("cuda", 0)


def test_a_run_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tower, fp32 = (4, 2, 8), {"dtype": torch.float32, "quick": True}
    cases = [
        attention.case("forward", 1, 64, tower, 0.5, **fp32),
        attention.case("train", 1, 40, tower, 0.5, train=True, **fp32),
        attention.case("decode", 2, 48, tower, 0.25, rows=1, **fp32),
        attention.case("suffix", 2, 48, tower, 0.25, rows=5, **fp32),
    ]
    monkeypatch.setattr(attention, "cases", lambda device: cases)
    uncompiled = r"^(?!.*(compiled|Flex)).*$"
    options = ["--quick", "--device", "cpu", "--results", str(tmp_path), "--budget", "600", "--contenders", uncompiled]
    assert attention.main(options) == 0
    record = json.loads((tmp_path / "attention-cpu.json").read_text())
    assert record["goals"] == []
    found = {(case["name"], row["name"]): row for case in record["cases"] for row in case["contenders"]}
    for (case, name), row in found.items():
        refused = case == "suffix" and name in ("sdpa+mass", "SDPA + visual_mass, text rows")
        assert row["status"].startswith("skipped: sdpa+mass aligns" if refused else "ok"), (case, name, row["status"])
        assert refused or row["seconds"][0] > 0
    assert {"out", "mass"} <= set(found["forward", "portable"]["errors"])
    assert {"out", "mass", "d_q", "d_k", "d_v"} <= set(found["train", "sdpa+mass"]["errors"])
    assert set(found["train", "portable (no mass)"]["errors"]) == {"out"}


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


def row(name: str, seconds: float, **errors: float) -> dict:
    return {"name": name, "seconds": [seconds] * 3, "errors": errors, "status": "ok", "baseline": False, "peer": False}


def test_goals_are_ratios_of_what_was_timed() -> None:
    rows = [
        row("eager with weights", 50.0, out=1e-3, mass=2e-3),
        row("SDPA flash (no mass)", 1.2),
        row("SDPA cuDNN (no mass)", 0.98),
        row("triton (no mass)", 1.0),
        row("triton", 1.02, out=1e-3, mass=1e-3),
        row("sdpa+mass", 1.1),
        row("SDPA + visual_mass, text rows", 1.05),
    ]
    cases = [
        {"name": "big", "params": {"T": 8192, "train": False}, "contenders": rows},
        {"name": "small", "params": {"T": 512, "train": True}, "contenders": [row("triton", 1.0)]},
    ]
    record = {
        "provenance": {"device": "cuda", "device_name": "x", "threads": 1, "date": "", "commit": "", "versions": {}}
    }
    record |= {"op": "attention", "cases": cases}
    found = {goal["goal"]: goal for goal in attention.goals(record)}
    assert len(found) == 5 and {goal["case"] for goal in found.values()} == {"big"}
    assert found["time with mass / without, our kernels"]["measured"] == pytest.approx(1.02)
    assert found["fastest attention's time / best with mass"]["measured"] == pytest.approx(0.98 / 1.02)
    assert found["fastest attention's time / mass of text rows"]["met"] is False
    assert found["eager's time / best with mass"]["measured"] == pytest.approx(50 / 1.02)
    assert found["largest error / eager's, our kernels"]["measured"] == pytest.approx(1.0)
    lengths = [
        {"name": f"forward-7b-{n}k", "params": {"T": n * 1024, "train": False}, "contenders": [row("triton", 1.0)]}
        for n in (8, 16)
    ]
    for n, case in zip((100, 199), lengths, strict=True):
        case["contenders"][0]["peak_bytes"] = n
    assert attention.goals(record | {"cases": lengths})[-1]["measured"] == pytest.approx(1.99)
    printed = present.table(record | {"goals": list(found.values())})
    assert "| fastest attention's time / mass of text rows | big | 0.933 | >= 0.94 | no |" in printed
    assert attention.goals(record | {"provenance": {"device": "cpu"}}) == []
