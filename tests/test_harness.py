"""The benchmark harness on an operator of three lines: gate, timing, memory, files, budget, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as all_benchmarks
from benchmarks import goals, harness, measure, present
from benchmarks.harness import Case, Contender

ROOT = Path(__file__).resolve().parent.parent
SEED = 3
CPU = torch.device("cpu")


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


def arguments(tmp_path: Path, *more: str):
    return harness.parse_args("tiny", ["--device", "cpu", "--results", str(tmp_path), "--quick", *more])


def rows_of(tmp_path: Path) -> dict[str, dict]:
    record = json.loads((tmp_path / "tiny-cpu.json").read_text())
    return {f"{case['name']}/{row['name']}": row for case in record["cases"] for row in case["contenders"]}


def test_a_run_writes_what_was_measured_where_and_when(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cases = [Case("small", {"N": 8}, make_inputs(8), flops=1e6), Case("large", {"N": 4096}, make_inputs(4096))]
    contenders = [Contender("eager", log_sum_exp, baseline=True), Contender("stable", stable)]
    assert harness.run("tiny", cases, contenders, arguments(tmp_path)) == 0
    record = json.loads((tmp_path / "tiny-cpu.json").read_text())
    assert {"date", "device", "device_name", "commit", "versions", "threads", "command"} <= set(record["provenance"])
    assert record["provenance"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    for name, row in rows_of(tmp_path).items():
        assert row["status"] == "ok", name
        median, low, high = row["seconds"]
        assert 0 < low <= median <= high and row["rounds"] >= 3, name
        assert set(row["errors"]) == {"out"} and row["errors"]["out"] < 1e-5, name
    assert rows_of(tmp_path)["small/eager"]["speedup"] == [1.0, 1.0, 1.0]
    assert rows_of(tmp_path)["small/eager"]["tflops"] > 0
    assert (tmp_path / "tiny-cpu.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| large | stable " in printed and "FAILED" not in printed


def test_our_own_wrong_result_is_not_timed_and_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    contenders = [Contender("eager", log_sum_exp, baseline=True), Contender("ours", wrong)]
    assert harness.run("tiny", [Case("c", {}, make_inputs(8))], contenders, arguments(tmp_path)) == 1
    row = rows_of(tmp_path)["c/ours"]
    assert row["status"].startswith("inaccurate: out: max error") and "seconds" not in row
    assert "FAILED tiny: c, ours" in capsys.readouterr().out


def test_a_peers_wrong_result_is_timed_and_marked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    contenders = [Contender("eager", log_sum_exp, baseline=True), Contender("theirs", wrong, peer=True)]
    assert harness.run("tiny", [Case("c", {}, make_inputs(8))], contenders, arguments(tmp_path)) == 0
    row = rows_of(tmp_path)["c/theirs"]
    assert row["status"].startswith("inaccurate") and row["seconds"][0] > 0
    assert "inaccurate" in capsys.readouterr().out


def test_what_raises_or_is_skipped_leaves_the_others_alone(tmp_path: Path) -> None:
    def breaks(**inputs):
        raise RuntimeError("no such kernel")

    contenders = [
        Contender("eager", log_sum_exp, baseline=True),
        Contender("breaks", breaks),
        Contender("absent", breaks, skip="triton is not installed"),
        Contender("stable", stable),
    ]
    assert harness.run("tiny", [Case("c", {}, make_inputs(8))], contenders, arguments(tmp_path)) == 1
    rows = rows_of(tmp_path)
    assert rows["c/breaks"]["status"] == "RuntimeError: no such kernel"
    assert rows["c/absent"]["status"] == "skipped: triton is not installed"
    assert rows["c/stable"]["seconds"][0] > 0


def test_a_contender_may_be_absent_from_some_cases_and_may_compute_something_else(tmp_path: Path) -> None:
    contenders = [
        Contender("eager", log_sum_exp, baseline=True),
        Contender("small only", stable, skip=lambda case: None if case.params["N"] < 100 else "N is too large"),
        Contender("other", lambda x, shift, rows: {"another": x}, peer=True, compare=()),
    ]
    cases = [Case("small", {"N": 8}, make_inputs(8)), Case("large", {"N": 128}, make_inputs(128))]
    assert harness.run("tiny", cases, contenders, arguments(tmp_path)) == 0
    rows = rows_of(tmp_path)
    assert rows["small/small only"]["status"] == "ok"
    assert rows["large/small only"]["status"] == "skipped: N is too large"
    assert rows["small/other"]["status"] == "ok" and rows["small/other"]["errors"] == {}


def test_an_approximate_contender_is_timed_and_its_error_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def broken(x, shift, rows):
        return stable(x, shift, rows).masked_fill(rows == 0, torch.nan)

    facts = {"facts": lambda x, shift, rows: {"words kept": rows.shape[0] / 16}}
    contenders = [
        Contender("eager", log_sum_exp, baseline=True),
        Contender("near", wrong, approximate=True, **facts),
        Contender("peer", wrong, peer=True),
        Contender("NaN", broken, approximate=True),
    ]
    assert harness.run("tiny", [Case("c", {}, make_inputs(8))], contenders, arguments(tmp_path)) == 1
    rows = rows_of(tmp_path)
    assert rows["c/near"]["status"] == "ok" and rows["c/near"]["seconds"][0] > 0
    assert rows["c/near"]["facts"] == {"words kept": 0.5}
    assert rows["c/near"]["absolute_errors"]["out"] == pytest.approx(1e-3, rel=1e-2)
    assert rows["c/near"]["errors"] == rows["c/peer"]["errors"], "a peer that breaks the rule shows its error too"
    assert "the truth is finite" in rows["c/NaN"]["status"] and "seconds" not in rows["c/NaN"]
    printed = capsys.readouterr().out
    near = rows["c/near"]["errors"]["out"] / rows["c/eager"]["errors"]["out"]
    assert "| words kept 0.5 " in printed and f"| {near:.2g} " in printed


def test_goals_are_judged_where_they_were_measured() -> None:
    def row(name: str, seconds: float, **more) -> dict:
        return {"name": name, "seconds": [seconds] * 3, "peer": name != "ours", **more}

    timed = [
        row("ours", 2.0, peak_bytes=10, errors={"a": 1e-3, "b": 3e-3, "value": 1.0}),
        row("slow", 5.0),
        row("fast", 3.0),
    ]
    timed.append({"name": "eager", "peer": False, "errors": {"a": 1e-3, "b": 1e-3, "value": 0.0}})
    (case,) = goals.cases_of({"cases": [{"name": "c", "params": {"keep": 0.4}, "contenders": timed}]})
    assert case.fastest(lambda one: one["peer"]) == "fast" and case.fastest(lambda one: False) is None
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


def test_goals_stand_in_the_record_and_below_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def goals(record: dict) -> list[dict]:
        return [
            {"goal": "quick", "case": c["name"], "measured": 1.5, "limit": ">= 2", "met": False}
            for c in record["cases"]
        ]

    contenders = [Contender("eager", stable, baseline=True)]
    assert harness.run("tiny", [Case("c", {}, make_inputs(8))], contenders, arguments(tmp_path), goals=goals) == 0
    assert json.loads((tmp_path / "tiny-cpu.json").read_text())["goals"][0]["measured"] == 1.5
    assert "| quick | c | 1.5 | >= 2 | no |" in capsys.readouterr().out


def test_the_gate_sees_a_wrong_gradient_behind_a_right_value(tmp_path: Path) -> None:
    def detached(x, shift, rows):
        return torch.logsumexp(x, -1) + (x - x.detach()).sum(-1)

    def total(out, inputs):
        return out.sum()

    contenders = [
        Contender("eager", harness.with_backward(log_sum_exp, ["x"], total), baseline=True),
        Contender("ours", harness.with_backward(detached, ["x"], total)),
        Contender("forward only", harness.with_backward(stable, ["x"], total), compare=("value",)),
    ]
    assert harness.run("tiny", [Case("c", {}, make_inputs(8))], contenders, arguments(tmp_path)) == 1
    rows = rows_of(tmp_path)
    assert rows["c/ours"]["status"].startswith("inaccurate: d_x")
    assert set(rows["c/eager"]["errors"]) == {"value", "d_x"}
    assert set(rows["c/forward only"]["errors"]) == {"value"}


def test_a_floor_for_what_is_subtracted_does_not_excuse_gradients(tmp_path: Path) -> None:
    def scaled(x, shift, rows):
        return torch.logsumexp(1.001 * x, -1)

    def total(out, inputs):
        return out.sum()

    contenders = [
        Contender("eager", harness.with_backward(log_sum_exp, ["x"], total), baseline=True),
        Contender("ours", harness.with_backward(scaled, ["x"], total)),
    ]
    assert harness.run("tiny", [Case("c", {}, make_inputs(8), floor=1e6)], contenders, arguments(tmp_path)) == 1
    assert rows_of(tmp_path)["c/ours"]["status"].startswith("inaccurate: d_x")


def test_a_missing_result_and_a_wrong_mask_are_caught(tmp_path: Path) -> None:
    def both(x, shift, rows):
        return {"lse": stable(x, shift, rows), "mask": x[:, 0] > 0, "absent": None}

    def flipped(x, shift, rows):
        return both(x, shift, rows) | {"mask": x[:, 0] <= 0}

    def less(x, shift, rows):
        return {"lse": stable(x, shift, rows)}

    contenders = [Contender("eager", both, baseline=True), Contender("flipped", flipped), Contender("less", less)]
    assert harness.run("tiny", [Case("c", {}, make_inputs(8))], contenders, arguments(tmp_path)) == 1
    rows = rows_of(tmp_path)
    assert rows["c/flipped"]["status"] == "inaccurate: mask differs from the baseline's"
    assert rows["c/less"]["status"] == "inaccurate: mask is missing; results: lse"


def test_half_precision_is_judged_by_half_precision(tmp_path: Path) -> None:
    def rounded(x, shift, rows):
        return torch.logsumexp(x.float(), -1).to(x.dtype)

    contenders = [Contender("eager", stable, baseline=True), Contender("rounded", rounded)]
    case = Case("bf16", {"dtype": "bfloat16"}, make_inputs(64, torch.bfloat16))
    assert harness.run("tiny", [case], contenders, arguments(tmp_path)) == 0
    assert rows_of(tmp_path)["bf16/rounded"]["errors"]["out"] > 1e-5


def test_a_spent_budget_is_said_not_hidden(tmp_path: Path) -> None:
    def slow(x, shift, rows):
        time.sleep(0.05)
        return stable(x, shift, rows)

    cases = [Case("first", {}, make_inputs(8)), Case("second", {}, make_inputs(8))]
    args = arguments(tmp_path, "--budget", "0.1")
    assert harness.run("tiny", cases, [Contender("eager", slow, baseline=True)], args) == 0
    rows = rows_of(tmp_path)
    assert rows["first/eager"]["seconds"][0] >= 0.05
    assert rows["second/eager"]["status"].startswith("skipped: the budget of 0 s is spent")


@pytest.mark.parametrize(
    ("contenders", "message"),
    [
        ([Contender("a", stable)], "got 0 baselines"),
        ([Contender("a", stable, baseline=True), Contender("b", stable, baseline=True)], "got 2 baselines"),
        ([Contender("a", stable, baseline=True), Contender("a", stable)], "two contenders share a name"),
    ],
)
def test_a_benchmark_that_cannot_mean_anything_is_refused(tmp_path: Path, contenders: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.run("tiny", [Case("c", {}, make_inputs(8))], contenders, arguments(tmp_path))


def test_filters_keep_the_baseline_and_refuse_an_empty_run(tmp_path: Path) -> None:
    cases = [Case("keep", {}, make_inputs(8)), Case("long", {}, make_inputs(8), quick=False)]
    contenders = [Contender("eager", stable, baseline=True), Contender("a", stable), Contender("b", stable)]
    assert harness.run("tiny", cases, contenders, arguments(tmp_path, "--contenders", "^a$")) == 0
    assert set(rows_of(tmp_path)) == {"keep/eager", "keep/a"}
    with pytest.raises(ValueError, match="no case is left"):
        harness.run("tiny", cases, contenders, arguments(tmp_path, "--only", "nothing"))


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
    samples = measure.time_interleaved(
        [lambda: (order.append("a"), time.sleep(0.004)), lambda: (order.append("b"), time.sleep(0.004))],
        CPU,
        budget=0.0,
        low=4,
        warmup=0,
    )
    assert [len(times) for times in samples] == [4, 4]
    assert "".join(order[2:]) == "abbaabba"  # after one call each that fixes the number of rounds
    assert min(samples[0] + samples[1]) >= 0.004


def test_spread_is_median_and_quartiles() -> None:
    assert measure.spread([3.0]) == (3.0, 3.0, 3.0)
    assert measure.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


def test_tables_and_plots_come_from_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    contenders = [Contender("eager", stable, baseline=True), Contender("none", stable, skip="not here")]
    harness.run("tiny", [Case("c", {}, make_inputs(8))], contenders, arguments(tmp_path))
    printed = capsys.readouterr().out
    (tmp_path / "tiny-cpu.png").unlink()
    assert harness.main([str(tmp_path / "tiny-cpu.json")]) == 0
    table = capsys.readouterr().out.strip()
    assert table in printed and (tmp_path / "tiny-cpu.png").exists()
    lines = table.splitlines()
    assert "TFLOP/s" not in lines[2], "a column that nobody fills is left out"
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_a_record_without_times_has_no_plot(tmp_path: Path) -> None:
    record = {"op": "x", "provenance": {"device_name": "cpu"}, "cases": [{"name": "c", "contenders": [{"name": "a"}]}]}
    assert present.draw(record, tmp_path / "x.png") is None and not (tmp_path / "x.png").exists()


def test_all_benchmarks_names_what_it_does_not_know(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        all_benchmarks.main(["nonsense"])
    assert "unknown benchmark nonsense; expected some of" in capsys.readouterr().err


def test_one_benchmark_that_fails_or_hangs_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ran = []

    def run_one(op: str, options: list[str], limit: float) -> tuple[int, str]:
        ran.append((op, options, limit))
        return (124, "stopped") if op == "first" else (0, f"table of {op}")

    monkeypatch.setattr(all_benchmarks, "operators", lambda: ["first", "second"])
    monkeypatch.setattr(all_benchmarks, "run_one", run_one)
    assert all_benchmarks.main(["--budget", "60", "--quick", "--device", "cpu"]) == 1
    assert [op for op, _, _ in ran] == ["first", "second"]
    assert all(options[:3] == ["--quick", "--device", "cpu"] and limit <= 60 for _, options, limit in ran)
    assert capsys.readouterr().out.rstrip().endswith("1 of 2 benchmarks done; FAILED: ['first']")


def test_a_benchmark_that_hangs_is_stopped_and_its_output_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # run_one calls `<python> -m benchmarks.<op>`

    def hang(command, **options):
        return real(["/bin/sh", "-c", "echo begun; sleep 30"], **options)

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", hang)
    code, output = all_benchmarks.run_one("x", [], limit=0.5)
    assert code == 124 and "begun" in output and "stopped after" in output
