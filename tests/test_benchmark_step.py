"""The benchmark of an optimiser step as far as a quick run shows it: same numbers, wrong ones refused, goals."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as all_benchmarks
from benchmarks import bench_step, harness
from benchmarks.bench_step import NORM, SMALL
from benchmarks.goals import CaseRows
from benchmarks.harness import Contender
from benchmarks.measure import quartiles
from benchmarks.steps import Shape, Step

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PARTS = {"perception s", "update s", "optimiser s", NORM}


def measured(dtype: torch.dtype, contenders: list[Contender], time: bool = True) -> CaseRows:
    case = bench_step.case("small", SMALL, dtype, quick=True)
    rows = harness.compare(case, contenders, CPU, budget=0.1, quick=True, time=time)
    for row in rows.values():
        row |= {"seconds": quartiles(row["samples"])} if "samples" in row else {}
    return CaseRows("step", case.name, case.params, rows)


def check_results(case: CaseRows) -> None:
    for name, row in case.rows.items():
        assert row["status"] == "ok" or row["status"].startswith("skipped: "), (name, row["status"])
        compared = {"kl", "logps"} if name == "shared prompts, fused head" else {"kl", "logps", "value", "d_weights"}
        assert set(row.get("errors", compared)) == compared, name


def test_every_way_makes_the_same_step_and_says_where_its_time_went() -> None:
    case = measured(torch.float32, bench_step.contenders(CPU))
    check_results(case)
    timed = {name: row for name, row in case.rows.items() if "samples" in row}
    for name, row in timed.items():
        assert set(row["facts"]) == PARTS and min(row["facts"].values()) > 0, name
        # Of the five calls that a median is taken over, three at least are timed: no part exceeds its longest.
        assert sum(row["facts"][part] for part in PARTS - {NORM}) < 3 * max(row["samples"]), name
    (goal,) = bench_step.goals([case], "cpu")
    assert goal["goal"] == "gradient norm off eager's" and goal["met"]
    assert timed["trainer"]["memory_ratio"] < timed["eager, head on response tokens"]["memory_ratio"] < 1


def test_every_way_makes_the_same_step_under_autocast() -> None:
    case = measured(torch.bfloat16, bench_step.contenders(CPU), time=False)
    check_results(case)
    errors = case.rows["trainer"]["errors"]
    assert errors["logps"] > 2**-15, f"as exact as float32: {errors['logps']}"


def test_a_step_that_keeps_other_tokens_is_refused() -> None:
    wrong = Contender("wrong", Step(bench_step.trainer_views, partial(bench_step.trainer_update, keep=0.5)))
    baseline = [c for c in bench_step.contenders(CPU) if c.kind == "baseline"]
    row = measured(torch.float32, [*baseline, wrong], time=False).rows["wrong"]
    assert row["status"].startswith("inaccurate: value") and row["errors"]["kl"] < 1e-4 < row["errors"]["d_weights"]


def test_a_gpus_cases_are_real_sizes_at_the_length_that_is_asked_of_it() -> None:
    shapes = {case.name: case.make_inputs.keywords["shape"] for case in bench_step.cases(GPU)}
    for name, hidden, vocab in (("3b", 2048, 151_936), ("7b", 3584, 152_064)):
        shape: Shape = shapes[name]
        assert (shape.hidden, shape.vocab, shape.prompts * shape.responses) == (hidden, vocab, 16)
        assert 4000 <= shape.width + (shape.side // 28) ** 2 <= 4096 and shape.checkpointing


def test_it_runs_when_named_alone_and_then_has_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = []
    monkeypatch.setattr(all_benchmarks, "run_one", lambda command, limit: ran.append(command) or (0, ""))
    all_benchmarks.main(["--results", str(tmp_path)])
    assert ran and not any("bench_step.py" in word for command in ran for word in command)
    all_benchmarks.main(["step", "--results", str(tmp_path)])
    assert ran[-1][3].endswith("bench_step.py") and float(ran[-1][ran[-1].index("--budget") + 1]) > 1000


def test_goals() -> None:
    def row(seconds: float, speedup: float, peak: int, norm: float) -> dict:
        facts = {NORM: norm}
        return {"seconds": [seconds] * 3, "speedup": [speedup] * 3, "peak_bytes": peak, "facts": facts, "kind": "ours"}

    rows = {"eager": row(8.0, 1.0, 100, 2.0), "TRL": row(6.0, 1.33, 80, 2.0), "trainer": row(5.0, 1.6, 40, 2.0004)}
    few, every = ({"layers": n, "dtype": "float32"} for n in (4, 24))
    cases = [CaseRows("step", name, params, rows) for name, params in (("few", few), ("every", every))]
    found = {(goal["goal"], goal["case"]): (goal["limit"], goal["met"]) for goal in bench_step.goals(cases, "cpu")}
    assert found["eager's time / trainer", "few"] == (">= 1.5", True)
    assert found["eager's time / trainer", "every"] == (">= 1", True)
    assert found["gradient norm off eager's", "few"] == ("<= 0.0001", False), "two parts in ten thousand are too many"
    found = {goal["goal"]: (goal["measured"], goal["met"]) for goal in bench_step.goals(cases[:1], "cuda")}
    assert found["TRL's time / trainer"] == (pytest.approx(1.2), False)
    assert found["memory / TRL's, trainer"] == (0.5, True)
