"""pytest's side of the benchmarks: options, one test for each case and contender, what is stored beside the times.

pytest benchmarks --quick                                   every operator: a check that all runs
pytest benchmarks -k "policy_loss and bf16"                 some cases; the baseline is always measured with them
pytest benchmarks --benchmark-disable                       the gate alone, nothing timed
pytest benchmarks --benchmark-autosave                      keeps the times in .benchmarks/
pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%      against those of another commit
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import harness, measure, present
from benchmarks.goals import CaseRows

DEFAULT_BUDGET, QUICK_BUDGET = 120.0, 30.0  # seconds for one operator
SUITES = pytest.StashKey[dict[str, "Suite"]]()


class Suite:
    """One file of benchmarks: what is left to run of it, and what came of the rest."""

    def __init__(self, module: ModuleType, config: pytest.Config) -> None:
        self.op, self.device = module.__name__.rpartition("bench_")[2], config.getoption("device")
        self.quick, self.budget = config.getoption("quick"), config.getoption("budget")
        only, wanted = config.getoption("only"), config.getoption("contenders")
        cases, contenders = module.cases(self.device), module.contenders(self.device)
        self._check(cases, contenders)
        chosen = [c for c in cases if (c.quick or not self.quick) and (only is None or only.search(c.name))]
        self.cases = {c.name: c for c in chosen}
        self.contenders = {
            c.name: c for c in contenders if c.kind == "baseline" or wanted is None or wanted.search(c.name)
        }
        self.judge = getattr(module, "goals", lambda cases, device: [])
        self.done: list[CaseRows] = []
        self.end: float | None = None

    def _check(self, cases: list, contenders: list) -> None:
        if (count := sum(c.kind == "baseline" for c in contenders)) != 1:
            raise pytest.UsageError(f"{self.op}: got {count} baselines, expected exactly one contender")
        for what, names in (("case", [c.name for c in cases]), ("contender", [c.name for c in contenders])):
            if len(set(names)) != len(names):
                raise pytest.UsageError(f"{self.op}: two {what}s share a name: {', '.join(names)}")

    @property
    def goals(self) -> list[dict[str, Any]]:
        return self.judge(self.done, self.device.type)

    def run(self, name: str, wanted: set[str], cases_left: int, timed: bool) -> CaseRows:
        """Compare the contenders `wanted` in one case; the baseline and the bare products always take part."""
        case = self.cases[name]
        contenders = [c for c in self.contenders.values() if c.name in wanted or c.kind in harness.REFERENCES]
        budget = self.budget or (QUICK_BUDGET if self.quick else DEFAULT_BUDGET)
        now = time.monotonic()
        self.end = self.end or now + budget
        if (left := self.end - now) > 0 or not timed:
            # Gate, compilation and warm-up take their share too: half of the case's part is left for timing.
            share = 0.5 * left / cases_left
            rows = harness.compare(case, contenders, self.device, budget=share, quick=self.quick, time=timed)
        else:
            status = f"skipped: the budget of {budget:.0f} s is spent (--budget)"
            rows = {c.name: {"kind": c.kind, "variant": c.variant, "status": status} for c in contenders}
        self.done.append(CaseRows(self.op, name, case.params, rows))
        return self.done[-1]


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group = parser.getgroup("operators' benchmarks")
    group.addoption("--quick", action="store_true", help="fewer cases and rounds: a check that all runs")
    group.addoption("--device", type=torch.device, default=torch.device(default), help="cpu, cuda, cuda:1")
    group.addoption("--budget", type=float, help=f"seconds for one operator (default {DEFAULT_BUDGET:.0f}, quick 30)")
    group.addoption("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    group.addoption("--only", type=re.compile, help="regular expression: cases to run")
    group.addoption("--contenders", type=re.compile, help="regular expression; the baseline stays")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device").type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    if threads := config.getoption("threads"):
        torch.set_num_threads(threads)
    config.stash[SUITES] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rows" in metafunc.fixturenames:
        suite = metafunc.config.stash[SUITES][metafunc.module.__name__] = Suite(metafunc.module, metafunc.config)
        metafunc.parametrize("case", suite.cases, scope="module")
        metafunc.parametrize("contender", suite.contenders)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "rows" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=harness.replay_clock))
            if config.pluginmanager.hasplugin("timeout"):
                item.add_marker(pytest.mark.timeout(0))  # --budget is the limit


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, case: str) -> Iterator[dict[str, dict[str, Any]]]:
    """What `harness.compare` says of a case, by contender; its table is printed as soon as its tests are done."""
    config, suite = request.config, request.config.stash[SUITES][request.module.__name__]
    here = [item.callspec.params for item in request.session.items if item.module is request.module]
    left = {one["case"] for one in here} - {one.name for one in suite.done}
    off = config.getoption("benchmark_disable") and not config.getoption("benchmark_enable")
    timed = not off and "PYTEST_XDIST_WORKER" not in os.environ  # where pytest-benchmark itself is off
    found = suite.run(case, {one["contender"] for one in here if one["case"] == case}, len(left), timed)
    for name, row in found.rows.items():
        row |= {"op": suite.op, "case": case, "contender": name}
    yield found.rows
    for row in found.rows.values():  # measured for the ratios' sake, its own test deselected
        if samples := row.pop("samples", None):
            row["seconds"] = measure.quartiles(samples)
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{present.table(found)}\n", flush=True)


def _suites(config: pytest.Config) -> list[Suite]:
    return [suite for suite in config.stash[SUITES].values() if suite.done]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for suite in _suites(config):
        if suite.goals:
            terminalreporter.write_line(f"\n{suite.op}\n\n{present.goals_table(suite.goals)}")


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    found = measure.provenance(config.getoption("device"))
    return {name: value for name, value in found.items() if name not in ("date", "commit", "command")}


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    commit = measure.provenance(config.getoption("device"))["commit"]
    return {"id": commit.rstrip("+"), "dirty": commit.endswith("+")}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What pytest-benchmark does not know: the cases' sizes, who was not timed and why, the goals. Times of single
    rounds are left out, since the ratios within a round are made, and so are options that timed nothing."""
    for one in output_json["benchmarks"]:
        one["stats"].pop("data", None)
        one["options"] = {}
    done = [case for suite in _suites(config) for case in suite.done]
    output_json["quick"] = config.getoption("quick")
    output_json["cases"] = [{"op": case.op, "name": case.name, "params": case.params} for case in done]
    output_json["not_timed"] = [row for case in done for row in case.rows.values() if "seconds" not in row]
    output_json["goals"] = [goal for suite in _suites(config) for goal in suite.goals]
