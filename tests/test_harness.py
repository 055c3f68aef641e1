"""The benchmarks' harness on an operator of three lines: gate, timing in turns, memory, tables."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import goals, harness, measure, plot, present
from benchmarks.harness import Case, Contender
from mmrpt_kernels import BackendError

SEED = 3
CPU = torch.device("cpu")
EAGER = "baseline"


def make_inputs(rows: int, dtype: torch.dtype = torch.float32):
    def make(device: torch.device) -> dict:
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(rows, 16, generator=generator).to(device, dtype)
        return {"x": x.requires_grad_(True), "shift": None, "rows": torch.arange(rows)}

    return make


def log_sum_exp(x, shift, rows):
    return x.exp().sum(-1).log()


def stable(x, shift, rows):
    return torch.logsumexp(x, -1)


def wrong(x, shift, rows):
    return torch.logsumexp(x, -1) + 1e-3


def compared(*contenders: Contender, case: Case | None = None, **options) -> dict[str, dict]:
    case = case or Case("c", {}, make_inputs(8))
    return harness.compare(case, contenders, CPU, **{"budget": 0.2, "quick": True} | options)


def test_every_contender_is_gated_timed_and_weighed() -> None:
    case = Case("large", {"N": 4096}, make_inputs(4096), flops=1e6)
    rows = compared(Contender("eager", log_sum_exp, EAGER), Contender("stable", stable), case=case)
    for name, row in rows.items():
        assert row["status"] == "ok" and len(row["samples"]) >= 3 and min(row["samples"]) > 0, name
        assert set(row["errors"]) == {"out"} and row["errors"]["out"] < 1e-5, name
        median, low, high = row["speedup"]
        assert low <= median <= high and row["tflops"] > 0 and row["peak_bytes"] > 0
    assert rows["eager"]["speedup"] == [1.0, 1.0, 1.0] and rows["eager"]["memory_ratio"] == 1.0
    ratios = [b / s for b, s in zip(rows["eager"]["samples"], rows["stable"]["samples"], strict=True)]
    assert rows["stable"]["speedup"] == measure.quartiles(ratios), "the ratio is taken within a round"


def test_our_own_wrong_result_is_not_timed_and_a_peers_is() -> None:
    rows = compared(
        Contender("eager", log_sum_exp, EAGER), Contender("ours", wrong), Contender("theirs", wrong, "peer")
    )
    assert rows["ours"]["status"].startswith("inaccurate: out: max error") and "samples" not in rows["ours"]
    assert rows["theirs"]["status"].startswith("inaccurate") and rows["theirs"]["samples"]
    assert rows["theirs"]["errors"] == rows["ours"]["errors"]


def test_the_gate_alone_times_nothing() -> None:
    rows = compared(Contender("eager", log_sum_exp, EAGER), Contender("ours", wrong), time=False)
    assert rows["ours"]["status"].startswith("inaccurate") and "samples" not in rows["eager"]
    assert rows["eager"]["status"] == "ok"


def test_what_raises_or_is_skipped_leaves_the_others_alone() -> None:
    def breaks(**inputs):
        raise RuntimeError("no such kernel")

    def refuses(**inputs):
        raise NotImplementedError("takes no shift")

    def unserved(**inputs):
        raise BackendError("triton: it runs on cuda")

    rows = compared(
        Contender("eager", log_sum_exp, EAGER),
        Contender("breaks", breaks),
        Contender("absent", breaks, skip="liger is not installed"),
        Contender("peer refuses", refuses, "peer"),
        Contender("ours refuses", refuses),
        Contender("unserved", unserved),
        Contender("stable", stable),
        Contender("variant", stable, variant=True),
    )
    assert rows["breaks"]["status"] == "RuntimeError: no such kernel"
    assert rows["absent"]["status"] == "skipped: liger is not installed"
    assert rows["peer refuses"]["status"] == "skipped: takes no shift"
    assert rows["ours refuses"]["status"] == "NotImplementedError: takes no shift", "ours must do what is asked"
    assert rows["unserved"]["status"] == "skipped: triton: it runs on cuda"
    assert rows["stable"]["samples"]
    assert rows["variant"]["status"].startswith("skipped: passed the gate") and rows["variant"]["errors"]


def test_a_contender_may_be_absent_from_some_cases_and_may_compute_something_else() -> None:
    few = Contender("small only", stable, skip=lambda case: None if case.params["N"] < 100 else "N is too large")
    other = Contender("other", lambda x, shift, rows: {"another": x}, "peer", compare=())
    contenders = Contender("eager", log_sum_exp, EAGER), few, other
    small = compared(*contenders, case=Case("small", {"N": 8}, make_inputs(8)))
    large = compared(*contenders, case=Case("large", {"N": 128}, make_inputs(128)))
    assert small["small only"]["status"] == "ok" and large["small only"]["status"] == "skipped: N is too large"
    assert small["other"]["status"] == "ok" and small["other"]["errors"] == {}


def test_an_approximate_contender_is_timed_and_its_error_reported() -> None:
    def broken(x, shift, rows):
        return stable(x, shift, rows).masked_fill(rows == 0, torch.nan)

    rows = compared(
        Contender("eager", log_sum_exp, EAGER),
        Contender("near", wrong, approximate=True, facts=lambda x, shift, rows: {"words kept": rows.shape[0] / 16}),
        Contender("NaN", broken, approximate=True),
    )
    assert rows["near"]["status"] == "ok" and rows["near"]["samples"]
    assert rows["near"]["facts"] == {"words kept": 0.5}
    assert rows["near"]["absolute_errors"]["out"] == pytest.approx(1e-3, rel=1e-2)
    assert "the truth is finite" in rows["NaN"]["status"] and "samples" not in rows["NaN"]
    for row in rows.values():
        if samples := row.pop("samples", None):
            row["seconds"] = measure.quartiles(samples)
    printed = present.table(goals.CaseRows("op", "c", {}, rows))
    near = rows["near"]["errors"]["out"] / rows["eager"]["errors"]["out"]
    assert "| words kept 0.5 " in printed and f"| {near:.2g} " in printed


def test_the_floor_is_not_gated_and_others_are_multiples_of_it() -> None:
    floor = Contender("products", lambda x, shift, rows: {"nothing": x}, "floor")
    rows = compared(Contender("eager", log_sum_exp, EAGER), floor)
    assert rows["products"]["status"] == "ok" and rows["products"]["of_floor"] == [1.0, 1.0, 1.0]
    ratios = [a / b for a, b in zip(rows["eager"]["samples"], rows["products"]["samples"], strict=True)]
    assert rows["eager"]["of_floor"] == measure.quartiles(ratios)


def test_goals_are_judged_where_they_were_measured() -> None:
    rows = {
        "ours": {
            "kind": "ours",
            "seconds": [2.0] * 3,
            "peak_bytes": 10,
            "errors": {"a": 1e-3, "b": 3e-3, "value": 1.0},
        },
        "slow": {"kind": "peer", "seconds": [5.0] * 3},
        "fast": {"kind": "peer", "seconds": [3.0] * 3},
        "eager": {"kind": "baseline", "errors": {"a": 1e-3, "b": 1e-3, "value": 0.0}},
    }
    case = goals.CaseRows("op", "c", {"keep": 0.4}, rows)
    assert case.fastest(lambda name, row: row["kind"] == "peer") == "fast"
    assert case.fastest(lambda name, row: False) is None and case.baseline is rows["eager"]
    assert case.of("ours", "peak_bytes") == 10 and case.of("eager", "seconds") is None and case.of(None, "x") is None
    assert case.error_ratio("ours", "eager") == pytest.approx(3.0) and case.error_ratio("fast", "eager") is None
    found = goals.Goals()
    found.at_least("faster", case.name, goals.ratio(case.of("fast", "seconds"), case.of("ours", "seconds")), 1.5)
    found.at_most("less", case.name, 0.51, 0.5)
    found.at_most("unknown", case.name, goals.ratio(None, 1.0), 0.5)
    assert [tuple(one.values()) for one in found.rows] == [
        ("faster", "c", 1.5, ">= 1.5", True),
        ("less", "c", 0.51, "<= 0.5", False),
    ]


def total(out, inputs):
    return out.sum()


def test_the_gate_sees_a_wrong_gradient_behind_a_right_value() -> None:
    def detached(x, shift, rows):
        return torch.logsumexp(x, -1) + (x - x.detach()).sum(-1)

    rows = compared(
        Contender("eager", harness.with_backward(log_sum_exp, ["x"], total), EAGER),
        Contender("ours", harness.with_backward(detached, ["x"], total)),
        Contender("forward only", harness.with_backward(stable, ["x"], total), compare=("value",)),
    )
    assert rows["ours"]["status"].startswith("inaccurate: d_x")
    assert set(rows["eager"]["errors"]) == {"value", "d_x"}
    assert set(rows["forward only"]["errors"]) == {"value"}


def test_a_floor_for_what_is_subtracted_does_not_excuse_gradients() -> None:
    def scaled(x, shift, rows):
        return torch.logsumexp(1.001 * x, -1)

    rows = compared(
        Contender("eager", harness.with_backward(log_sum_exp, ["x"], total), EAGER),
        Contender("ours", harness.with_backward(scaled, ["x"], total)),
        case=Case("c", {}, make_inputs(8), floor=1e6),
    )
    assert rows["ours"]["status"].startswith("inaccurate: d_x")


def test_a_missing_result_and_a_wrong_mask_are_caught() -> None:
    def both(x, shift, rows):
        return {"lse": stable(x, shift, rows), "mask": x[:, 0] > 0, "absent": None}

    def flipped(x, shift, rows):
        return both(x, shift, rows) | {"mask": x[:, 0] <= 0}

    def less(x, shift, rows):
        return {"lse": stable(x, shift, rows)}

    rows = compared(Contender("eager", both, EAGER), Contender("flipped", flipped), Contender("less", less))
    assert rows["flipped"]["status"] == "inaccurate: mask differs from the baseline's"
    assert rows["less"]["status"] == "inaccurate: mask is missing; results: lse"


def test_a_name_that_no_result_has_is_refused() -> None:
    rows = compared(Contender("eager", stable, EAGER), Contender("ours", stable, compare=("typing error",)))
    assert rows["ours"]["status"] == "inaccurate: none of ('typing error',) is among out"


def test_half_precision_is_judged_by_half_precision() -> None:
    def rounded(x, shift, rows):
        return torch.logsumexp(x.float(), -1).to(x.dtype)

    case = Case("bf16", {"dtype": "bfloat16"}, make_inputs(64, torch.bfloat16))
    rows = compared(Contender("eager", stable, EAGER), Contender("rounded", rounded), case=case)
    assert rows["rounded"]["status"] == "ok" and rows["rounded"]["errors"]["out"] > 1e-5


def test_cpu_peak_counts_temporaries_also_inside_custom_ops() -> None:
    @torch.library.custom_op("harness_test::temporary", mutates_args=())
    def temporary(x: torch.Tensor) -> torch.Tensor:
        scratch = torch.empty(2**20).fill_(1.0)  # 4 MiB, gone when the op returns
        return x + scratch[0]

    x = torch.ones(10)
    assert 2**22 <= measure.peak_bytes(lambda: temporary(x), CPU) < 1.01 * 2**22
    assert 2**22 <= measure.peak_bytes(lambda: torch.empty(2**20), CPU) < 1.01 * 2**22
    two_at_once = measure.peak_bytes(lambda: (torch.ones(2**20) + 1).sum(), CPU)
    one_after_another = measure.peak_bytes(lambda: [float(torch.ones(2**20).sum()) for _ in range(2)], CPU)
    assert 2**23 <= two_at_once < 1.01 * 2**23
    assert 2**22 <= one_after_another < 1.01 * 2**22


def test_contenders_take_turns() -> None:
    order: list[str] = []
    samples = measure.time_in_turns(
        [lambda: (order.append("a"), time.sleep(0.004)), lambda: (order.append("b"), time.sleep(0.004))],
        CPU,
        budget=0.0,
        low=4,
    )
    assert [len(times) for times in samples] == [4, 4]
    assert "".join(order[2:]) == "abbaabba"  # after one call each that fixes the number of rounds
    assert min(samples[0] + samples[1]) >= 0.004


def test_quartiles() -> None:
    assert measure.quartiles([3.0]) == [3.0, 3.0, 3.0]
    assert measure.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == [3.0, 2.0, 4.0]


def test_a_table_shows_the_fastest_first_and_says_who_was_not_timed() -> None:
    timed = {"status": "ok", "peak_bytes": 2**20}
    rows = {
        "eager": timed | {"kind": "baseline", "seconds": [0.2] * 3, "speedup": [1.0] * 3},
        "fast": timed | {"kind": "ours", "seconds": [0.1] * 3, "speedup": [2.0] * 3},
        "a": {"kind": "peer", "status": "skipped: not here"},
        "b": {"kind": "peer", "status": "skipped: not here"},
        "broken": {"kind": "peer", "status": "RuntimeError: x"},
    }
    lines = present.table(goals.CaseRows("op", "c", {"N": 8, "bias": True, "train": False}, rows)).splitlines()
    assert lines[0] == "op, c: N 8, bias"
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["contender", "-" * 11, "fast", "eager"]
    assert "TFLOP/s" not in lines[2], "a column that nobody fills is left out"
    assert len({line.count("|") for line in lines[2:6]}) == 1
    assert lines[-1] == "Not timed: a, b (not here); broken (RuntimeError: x)"


def test_a_record_without_times_has_no_plot(tmp_path: Path) -> None:
    case = goals.CaseRows("x", "c", {}, {"a": {"kind": "baseline", "status": "out of memory"}})
    assert plot.draw([case], {"device_name": "cpu", "threads": 2}, tmp_path / "x.png") is None
    assert not (tmp_path / "x.png").exists() and goals.cases_of({"some": "other file"}) == []
