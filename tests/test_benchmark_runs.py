"""Benchmarks as pytest runs them, and `python -m benchmarks`: files, comparison, budget, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as all_benchmarks
from benchmarks import conftest, goals, present, readme
from benchmarks.harness import Case, Contender
from tests.test_harness import log_sum_exp, make_inputs, stable

ROOT = Path(__file__).resolve().parent.parent

TINY = """
import time
import torch
from benchmarks.goals import Goals
from benchmarks.harness import Case, Contender, report
from tests.test_harness import log_sum_exp, make_inputs, stable, wrong

def cases(device):
    return [Case("small", {"N": 8}, make_inputs(8)), Case("long", {"N": 64}, make_inputs(64), quick=False)]

def breaks(**inputs):
    raise RuntimeError("no such kernel")

def slow(**inputs):
    time.sleep(0.002)
    return log_sum_exp(**inputs)

def contenders(device):
    return [
        Contender("eager", slow, "baseline"), Contender("stable, ours", stable), Contender("wrong", wrong),
        Contender("theirs", wrong, "peer"), Contender("broken peer", breaks, "peer"),
        Contender("absent", stable, "peer", skip="not installed"), *MORE
    ]

def goals(cases, device):
    found = Goals()
    for case in cases:
        found.at_least("fast", case.name, case.of("stable, ours", "speedup"), 0.001)
    return found.rows

MORE = []

def test_tiny(rows, contender, benchmark):
    report(rows[contender], benchmark)
"""
PEER = TINY.replace("MORE = []", 'MORE = [Contender("stable peer", stable, "peer")]')


def run_pytest(folder: Path, *options: str, text: str = TINY) -> subprocess.CompletedProcess:
    file = folder / "bench_tiny.py"
    file.write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "benchmarks.conftest",
        str(file),
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    command += ["--device", "cpu", "-p", "no:cacheprovider", f"--benchmark-storage={folder / 'stored'}", "--budget=60"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_run_writes_what_was_measured_where_and_when(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    json_file = tmp_path / "tiny-cpu.json"
    done = run_pytest(tmp_path, f"--benchmark-json={json_file}", "--benchmark-autosave")
    assert done.returncode == 1, done.stdout
    assert "2 failed, 6 passed, 2 skipped, 2 xfailed" in done.stdout, done.stdout
    assert done.stdout.count("inaccurate: out: max error") >= 2 and "tiny, small: N 8" in done.stdout
    record = json.loads(json_file.read_text())
    assert {"device", "device_name", "versions", "threads"} <= set(record["machine_info"])
    assert record["commit_info"]["id"] and record["datetime"]
    small, long = goals.cases_of(record)
    assert (small.op, small.name, small.params, long.name) == ("tiny", "small", {"N": 8}, "long")
    status = {name: row["status"].partition(":")[0] for name, row in small.rows.items()}
    timed = {"eager": "ok", "stable, ours": "ok", "theirs": "inaccurate"}
    assert status == timed | {"wrong": "inaccurate", "broken peer": "RuntimeError", "absent": "skipped"}
    assert {name for name, row in small.rows.items() if "seconds" in row} == set(timed)
    assert small.of("eager", "seconds") >= 0.002 and small.of("stable, ours", "speedup") > 1
    assert small.rows["eager"]["rounds"] >= 5
    groups = {(one["group"], one["name"]) for one in record["benchmarks"]}
    assert ("tiny: small", "test_tiny[small-stable, ours]") in groups
    assert [goal["case"] for goal in record["goals"]] == ["small", "long"]
    present.show(json_file)
    printed = capsys.readouterr().out
    assert json_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and "| fast | small" in printed
    assert present.table(small) in printed and present.table(small) in done.stdout
    again = run_pytest(tmp_path, "--quick", "-k", "stable", "--benchmark-compare", "--benchmark-columns=median")
    assert again.returncode == 0 and "long" not in again.stdout, again.stdout
    assert "test_tiny[small-stable, ours] (0001" in again.stdout and "(NOW)" in again.stdout


def test_nothing_is_timed_where_benchmarks_are_disabled(tmp_path: Path) -> None:
    done = run_pytest(
        tmp_path, "--benchmark-disable", "--only", "^small$", "--contenders", "ours|stable peer", text=PEER
    )
    assert done.returncode == 0 and "3 passed" in done.stdout and "speed-up" not in done.stdout, done.stdout
    assert "Not timed: eager, stable, ours, stable peer (passed the gate)" in done.stdout


class Options:
    """A pytest configuration as far as conftest.py reads it."""

    def __init__(self, **options) -> None:
        known = dict.fromkeys(("quick", "budget", "only", "contenders", "threads"))
        self.options, self.stash = known | {"device": torch.device("cpu")} | options, {}

    def getoption(self, name: str):
        return self.options[name]


def suite(*contenders: Contender, **options) -> conftest.Suite:
    cases = [Case("small", {}, make_inputs(8)), Case("long", {}, make_inputs(64), quick=False)]
    functions = {"cases": lambda device: cases, "contenders": lambda device: contenders}
    return conftest.Suite(SimpleNamespace(__name__="benchmarks.bench_tiny", **functions), Options(**options))


EAGER = Contender("eager", log_sum_exp, "baseline")


@pytest.mark.parametrize(
    ("contenders", "message"),
    [
        ([Contender("a", stable)], "tiny: got 0 baselines, expected exactly one contender"),
        ([EAGER, Contender("b", stable, "baseline")], "tiny: got 2 baselines"),
        ([EAGER, Contender("a", stable), Contender("a", stable)], "tiny: two contenders share a name"),
    ],
)
def test_a_benchmark_that_cannot_mean_anything_is_refused(contenders: list[Contender], message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        suite(*contenders)


def test_filters_keep_the_baseline() -> None:
    chosen = suite(EAGER, Contender("a", stable), Contender("b", stable), quick=True, contenders=re.compile("^a$"))
    assert list(chosen.contenders) == ["eager", "a"] and list(chosen.cases) == ["small"]
    assert list(suite(EAGER, only=re.compile("lon")).cases) == ["long"]


def test_a_spent_budget_is_said_not_hidden() -> None:
    def slow(**inputs):
        time.sleep(0.05)
        return log_sum_exp(**inputs)

    tiny = suite(Contender("eager", slow, "baseline"), Contender("stable", stable), budget=0.1)
    first = tiny.run("small", {"stable"}, 2, timed=True)
    assert first.rows["eager"]["status"] == "ok" and "speedup" in first.rows["stable"], "the baseline takes part"
    second = tiny.run("long", {"stable"}, 1, timed=True)
    assert second.rows["stable"]["status"] == "skipped: the budget of 0 s is spent (--budget)"
    assert tiny.run("long", {"stable"}, 1, timed=False).rows["stable"]["status"] == "ok", "the gate has no budget"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_said() -> None:
    with pytest.raises(pytest.UsageError, match="--device cuda: torch sees no GPU here; use --device cpu"):
        conftest.pytest_configure(Options(device=torch.device("cuda")))


def test_all_benchmarks_names_what_it_does_not_know(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        all_benchmarks.main(["nonsense"])
    assert "unknown benchmark nonsense; expected some of" in capsys.readouterr().err


def test_one_benchmark_that_fails_or_hangs_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    ran = []

    def run_one(command: list[str], limit: float) -> tuple[int, str]:
        ran.append((command, limit))
        return (124, "stopped") if "bench_first.py" in " ".join(command) else (0, "a table")

    monkeypatch.setattr(all_benchmarks, "operators", lambda: ["first", "second"])
    monkeypatch.setattr(all_benchmarks, "run_one", run_one)
    options = ["--budget", "60", "--results", str(tmp_path), "--quick", "--device", "cpu"]
    assert all_benchmarks.main(options) == 1
    assert [command[3].rpartition("/")[2] for command, _ in ran] == ["bench_first.py", "bench_second.py"]
    for command, limit in ran:
        assert {"--quick", "--device", "cpu", "--benchmark-json"} <= set(command) and limit <= 60
        assert float(command[command.index("--budget") + 1]) < 60
    printed = capsys.readouterr().out
    assert "a table" in printed and printed.rstrip().endswith("1 of 2 benchmarks done; FAILED: ['first']")


def test_what_was_written_is_named_by_its_device_and_drawn(tmp_path: Path) -> None:
    row = {"op": "tiny", "kind": "baseline", "status": "ok", "speedup": [1.0] * 3, "memory_ratio": 1.0}
    stats = {"median": 0.1, "q1": 0.1, "q3": 0.1, "rounds": 5}
    record = {
        "machine_info": {"device": "cuda", "device_name": "NVIDIA H200", "threads": 16},
        "cases": [{"op": "tiny", "name": "c", "params": {}}],
        "not_timed": [],
        "benchmarks": [{"params": {"case": "c", "contender": "eager"}, "extra_info": row, "stats": stats}],
    }
    (tmp_path / "tiny.json.tmp").write_text(json.dumps(record))
    all_benchmarks.keep("tiny", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-nvidia-h200.json", "tiny-nvidia-h200.png"]


def test_a_benchmark_that_hangs_may_write_what_it_has_before_it_is_stopped() -> None:
    begun = time.monotonic()
    script = "trap 'echo written; exit 3' INT; echo begun; while :; do sleep 0.1; done"
    code, output = all_benchmarks.run_one(["sh", "-c", script], limit=0.5)
    assert code == 124 and output.split()[:2] == ["begun", "written"] and "stopped after" in output
    assert time.monotonic() - begun < all_benchmarks.WRITING


def test_readmes_table_is_what_the_result_files_say() -> None:
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("*-cpu.json"))]
    text, _ = readme.table(records)
    shown = readme.README.read_text()
    assert text.count("\n| ") >= 10 and f"{readme.BEGIN}{text}\n{readme.END}" in shown, (
        "run python -m benchmarks.readme benchmarks/results/*-cpu.json"
    )


def test_a_row_of_readmes_table_and_one_that_was_not_measured() -> None:
    rows = {
        "eager": {"kind": "baseline", "speedup": [1.0] * 3},
        "portable": {"kind": "ours", "speedup": [2.55, 2.0, 3.0], "memory_ratio": 0.244},
        "TRL": {"kind": "peer", "speedup": [0.45] * 3},
        "bare products": {"kind": "floor", "speedup": [2.9] * 3},
        "absent": {"kind": "peer", "status": "skipped: not here"},
    }
    case = goals.CaseRows("policy_loss", "32k", {}, rows)
    assert readme.line("a loss", case, "portable") == "| a loss | 2.5x | 24 % | bare products 2.9x; TRL 0.45x |"
    text, absent = readme.table([])
    assert len(absent) == len(readme.ROWS) and text.count("\n| ") == 0
