"""One way to compare implementations: gate on correctness, then time them side by side, then write down where and when.

An operator's benchmark is a file `benchmarks/<op>.py`:

    def main(argv=None) -> int:
        args = harness.parse_args("logprobs", argv)
        cases = [Case("n1024", {"N": 1024, "V": 32000}, make_inputs)]        # make_inputs(device) -> dict of arguments
        contenders = [
            Contender("eager", eager, baseline=True),                        # called as eager(**inputs)
            Contender("portable", partial(linear_logprobs, backend="portable")),
            Contender("liger", liger_logprobs, peer=True, skip=None if HAVE_LIGER else "liger-kernel is not installed"),
        ]
        return harness.run("logprobs", cases, contenders, args)

The gate: every contender's results (tensor, tuple, NamedTuple or dict of tensors, gradients included: `with_backward`)
against the baseline's on the same inputs widened to float64, by the error rule of `mmrpt_kernels.testing`, with the
baseline in the inputs' own dtype as the yardstick. A contender of ours that fails is not timed and the run exits
non-zero; a `peer` that fails is timed and marked, since its error belongs to what is compared.

`python -m benchmarks.harness results/*.json` prints the tables and draws the plots again from the files.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import device_name, peak_bytes, provenance, spread, time_interleaved
from benchmarks.present import draw, table
from mmrpt_kernels.testing import assert_close_to_truth

__all__ = ["DEFAULT_RESULTS", "Case", "Contender", "parse_args", "run", "with_backward"]

Inputs = dict[str, Any]
DEFAULT_RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT_BUDGET = 120.0  # seconds for one operator


@dataclass(frozen=True)
class Case:
    """One workload.

    name: short, without spaces: rows of tables and ticks of plots.
    params: what a reader must know to repeat it (sizes, dtype); goes into the JSON.
    make_inputs: device -> keyword arguments of every contender; deterministic.
    gate_inputs: smaller arguments for the gate where float64 would not fit; default: make_inputs.
    floor: `floor` of the error rule: the size of quantities whose rounding enters by subtraction. For gradients
        ("d_...") it only widens what the yardstick's own error may be: what enters there is in it.
    flops: of the mathematics (not of what an implementation recomputes), for TFLOP/s in the tables.
    quick: also run with --quick.
    """

    name: str
    params: dict[str, Any]
    make_inputs: Callable[[torch.device], Inputs]
    gate_inputs: Callable[[torch.device], Inputs] | None = None
    floor: float = 0.0
    flops: float | None = None
    quick: bool = True


@dataclass(frozen=True)
class Contender:
    """One implementation: fn(**inputs) -> tensor, or tuple, NamedTuple or dict of tensors; None entries are left out.

    baseline: the ratios' denominator and the gate's yardstick; exactly one.
    peer: somebody else's: what fails is reported, not fatal.
    skip: why it cannot run here (shown in the table), or None; or a function of the case that says so.
    compare: names of the results that the gate compares; None: all the baseline has. A contender that returns fewer
        results than the baseline must name those it has; (): what it computes is something else.
    floor: the bare products that the mathematics needs, nobody's implementation: not gated, and the others' times are
        also given as multiples of its time. At most one.
    approximate: asked to be inexact beyond the error rule: its errors are reported, not judged.
    facts: called as facts(**inputs), untimed: name -> number worth knowing beside the times, shown in the note.
    """

    name: str
    fn: Callable[..., Any]
    baseline: bool = False
    peer: bool = False
    skip: str | Callable[[Case], str | None] | None = None
    compare: tuple[str, ...] | None = None
    floor: bool = False
    approximate: bool = False
    facts: Callable[..., dict[str, float]] | None = None


def parse_args(op: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options every benchmark takes; `op` names it in the help text."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{op}", description=f"Benchmark of {op}.")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a check that all runs")
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device), help="cpu, cuda, cuda:1")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, help="folder for JSON and plots")
    parser.add_argument("--budget", type=float, default=None, help=f"seconds (default {DEFAULT_BUDGET:.0f}, quick 30)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of PyTorch (default: its own choice)")
    parser.add_argument("--only", type=re.compile, default=None, help="regular expression: cases to run")
    parser.add_argument("--contenders", type=re.compile, default=None, help="regular expression; the baseline stays")
    args = parser.parse_args(argv)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    args.budget = args.budget or (30.0 if args.quick else DEFAULT_BUDGET)
    return args


def with_backward(
    fn: Callable[..., Any], wrt: Sequence[str], scalar: Callable[..., torch.Tensor]
) -> Callable[..., Any]:
    """fn followed by its backward pass, as a contender: results are {"value", "d_<name>" for name in wrt}.

    scalar(result, inputs) -> the 0-d tensor to differentiate, e.g. `lambda out, inputs: out.loss`.
    The inputs named in `wrt` must require gradients.
    """

    def call(**inputs: Any) -> dict[str, torch.Tensor]:
        value = scalar(fn(**inputs), inputs)
        gradients = torch.autograd.grad(value, [inputs[name] for name in wrt])
        return {"value": value.detach()} | {f"d_{name}": g for name, g in zip(wrt, gradients, strict=True)}

    return call


def _named(results: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a contender's results, each with a name that does not depend on the contender."""
    if isinstance(results, torch.Tensor):
        yield prefix or "out", results.detach()
    elif results is not None:
        if hasattr(results, "_asdict"):
            results = results._asdict()
        elif isinstance(results, (tuple, list)):
            results = {str(i): value for i, value in enumerate(results)}
        for key, value in results.items():
            yield from _named(value, f"{prefix}.{key}" if prefix else str(key))


def _widened(inputs: Inputs) -> Inputs:
    """The same inputs with every floating tensor in float64; requires_grad is kept."""

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return {name: widen(value) for name, value in inputs.items()}


def _coarsest_dtype(inputs: Inputs) -> torch.dtype:
    """The floating dtype of largest eps among the inputs: the one whose rounding is the yardstick's."""
    dtypes = [v.dtype for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


class _Gate:
    """The baseline's results on one case's inputs, in float64 (truth) and in their own dtype (yardstick)."""

    def __init__(self, case: Case, baseline: Contender, device: torch.device) -> None:
        self.inputs = (case.gate_inputs or case.make_inputs)(device)
        self.dtype = _coarsest_dtype(self.inputs)
        self.floor = case.floor
        self.truth = dict(_named(baseline.fn(**_widened(self.inputs))))
        self.yardstick = dict(_named(baseline.fn(**self.inputs)))

    def check(self, contender: Contender, row: dict[str, Any]) -> None:
        """Fill the row's `errors`, the largest of each floating result relative to max |truth|, and `absolute_errors`.

        AssertionError: the error rule is broken; the errors of all results stand in the row nevertheless.
        """
        results = dict(_named(contender.fn(**self.inputs)))
        row["errors"], row["absolute_errors"] = {}, {}
        if contender.floor:
            return
        names = tuple(self.truth) if contender.compare is None else contender.compare
        for name in names:
            assert name in results, f"{name} is missing; results: {', '.join(results) or 'none'}"
            truth = self.truth[name]
            assert results[name].shape == truth.shape, f"{name}: shape {tuple(results[name].shape)}"
            finite = torch.isfinite(truth)
            if truth.is_floating_point() and finite.any():
                largest = (results[name].double() - truth.double())[finite].abs().max().item()
                row["absolute_errors"][name] = largest
                row["errors"][name] = largest / (truth[finite].abs().max().item() or 1.0)
                assert math.isfinite(largest), f"{name}: {largest} where the truth is finite"
        if not contender.approximate:
            for name in names:
                self._judge(name, results[name])

    def _judge(self, name: str, actual: torch.Tensor) -> None:
        truth, yardstick = self.truth[name], self.yardstick[name]
        if truth.is_floating_point():
            rule = {"name": name, "dtype": self.dtype, "floor": self.floor}
            if name.startswith("d_"):
                rule |= {"floor": 0.0, "eager_cap": 64.0 * max(self.floor, 1.0)}
            assert_close_to_truth(actual, yardstick, truth.double(), **rule)
        else:
            assert torch.equal(actual, yardstick), f"{name} differs from the baseline's"


def _status_of(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, AssertionError):
        return f"inaccurate: {error}"
    return f"{type(error).__name__}: {error}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _gate_all(case: Case, contenders: Sequence[Contender], rows: dict[str, dict], device: torch.device) -> None:
    """Fill `status` and `errors` of every row that has no status yet."""
    baseline = next(c for c in contenders if c.baseline)
    try:
        gate = _Gate(case, baseline, device)
    except Exception as error:  # the run goes on with the other cases; the row says what happened
        for row in rows.values():
            row["status"] = f"no baseline for the gate: {_status_of(error)}" if row["status"] == "ok" else row["status"]
        return
    for contender in contenders:
        row = rows[contender.name]
        if row["status"] != "ok":
            continue
        try:
            gate.check(contender, row)
        except Exception as error:
            row["status"] = _status_of(error)
    del gate
    _release(device)


def _measure(
    case: Case, contenders: Sequence[Contender], rows: dict[str, dict], args: argparse.Namespace, budget: float
) -> None:
    """Peak memory and interleaved times of the contenders that passed (or are peers that merely lack accuracy)."""
    inputs = case.make_inputs(args.device)
    calls = {}
    for contender in contenders:
        row = rows[contender.name]
        if row["status"] != "ok" and not (contender.peer and row["status"].startswith("inaccurate")):
            continue
        call = lambda fn=contender.fn: fn(**inputs)  # noqa: E731
        try:
            call()  # compilation and caches are not the operator's memory
            row["peak_bytes"] = peak_bytes(call, args.device)
            if contender.facts is not None:
                row["facts"] = contender.facts(**inputs)
            calls[contender.name] = call
        except Exception as error:
            row["status"] = _status_of(error)
            _release(args.device)
    if not calls:
        return
    low, high = (3, 10) if args.quick else (5, 60)
    samples = time_interleaved(list(calls.values()), args.device, budget=budget, low=low, high=high, warmup=1)
    times = dict(zip(calls, samples, strict=True))
    base = next((c.name for c in contenders if c.baseline and c.name in times), None)
    floor = next((c.name for c in contenders if c.floor and c.name in times), None)
    for name, seconds in times.items():
        row = rows[name]
        row["rounds"] = len(seconds)
        row["seconds"] = list(spread(seconds))
        if case.flops:
            row["tflops"] = case.flops / row["seconds"][0] * 1e-12
        if floor is not None:
            row["of_floor"] = list(spread([s / f for f, s in zip(times[floor], seconds, strict=True)]))
        if base is not None:
            row["speedup"] = list(spread([b / s for b, s in zip(times[base], seconds, strict=True)]))
            row["memory_ratio"] = row["peak_bytes"] / max(rows[base]["peak_bytes"], 1)


def _run_case(case: Case, contenders: Sequence[Contender], args: argparse.Namespace, budget: float) -> dict[str, Any]:
    rows = {}
    for c in contenders:
        why = c.skip(case) if callable(c.skip) else c.skip
        status = "ok" if why is None else f"skipped: {why}"
        rows[c.name] = {"name": c.name, "baseline": c.baseline, "peer": c.peer, "status": status}
    _gate_all(case, contenders, rows, args.device)
    try:
        _measure(case, contenders, rows, args, budget)
    except Exception as error:  # device lost, out of memory in make_inputs: the other cases are still worth having
        for row in rows.values():
            row["status"] = _status_of(error) if row["status"] == "ok" else row["status"]
    _release(args.device)
    return {"name": case.name, "params": case.params, "contenders": list(rows.values())}


def _left_out(case: Case, contenders: Sequence[Contender], args: argparse.Namespace) -> dict[str, Any]:
    status = f"skipped: the budget of {args.budget:.0f} s is spent (--budget)"
    rows = [{"name": c.name, "baseline": c.baseline, "peer": c.peer, "status": status} for c in contenders]
    return {"name": case.name, "params": case.params, "contenders": rows}


def _failures(record: dict[str, Any]) -> list[str]:
    """What makes the run fail: a row that is neither ok nor skipped nor a peer's, or a case without any time."""
    failures = []
    for case in record["cases"]:
        for row in case["contenders"]:
            fine = row["status"] == "ok" or row["status"].startswith("skipped")
            # A baseline that does not fit is a result, not a failure: the others are compared without ratios.
            if not fine and not row["peer"] and not (row["baseline"] and row["status"] == "out of memory"):
                failures.append(f"{case['name']}, {row['name']}: {row['status']}")
    return failures


def result_path(folder: Path, op: str, device: torch.device) -> Path:
    """results/<op>-<device>.json: "cpu" for any CPU, a GPU by its name, so that two GPUs keep their own files."""
    name = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return folder / f"{op}-{name}.json"


def run(
    op: str,
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    args: argparse.Namespace,
    *,
    goals: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None,
) -> int:
    """Gate, time and write `<results>/<op>-<device>.json` and `.png`; print the table. Returns the exit code.

    goals: the record -> rows of `goals.Goals`, kept in the record and printed below it.

    Raises ValueError when there is not exactly one baseline or names repeat.
    """
    if sum(c.baseline for c in contenders) != 1:
        raise ValueError(f"{op}: got {sum(c.baseline for c in contenders)} baselines, expected exactly one contender")
    for what, names in (("case", [c.name for c in cases]), ("contender", [c.name for c in contenders])):
        if len(set(names)) != len(names):
            raise ValueError(f"{op}: two {what}s share a name: {', '.join(names)}; names are keys of the results")
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [c for c in cases if (c.quick or not args.quick) and (args.only is None or args.only.search(c.name))]
    contenders = [c for c in contenders if c.baseline or args.contenders is None or args.contenders.search(c.name)]
    if not cases:
        raise ValueError(f"{op}: no case is left to run; check --only and the cases' `quick` flags")
    record: dict[str, Any] = {"op": op, "provenance": provenance(args.device), "quick": args.quick, "cases": []}
    path = result_path(args.results, op, args.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget
    for done, case in enumerate(cases):
        left = end - time.monotonic()
        # Gate, compilation and warm-up take their share too: half of the case's part is left for timing.
        budget = 0.5 * left / (len(cases) - done)
        record["cases"].append(
            _run_case(case, contenders, args, budget) if left > 0 else _left_out(case, contenders, args)
        )
        if goals is not None:
            record["goals"] = goals(record)
        path.write_text(json.dumps(record, indent=1) + "\n")  # after every case: one that is stopped loses only itself
    drawn = draw(record, path.with_suffix(".png"))
    print(table(record))
    print(f"\nwritten: {path}" + (f" and {drawn.name}" if drawn else " (no plot: matplotlib is not installed)"))
    failures = _failures(record)
    for failure in failures:
        print(f"FAILED {op}: {failure}")
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Tables and plots again, from result files."""
    parser = argparse.ArgumentParser(description="Print the tables and draw the plots of result files.")
    parser.add_argument("files", type=Path, nargs="+")
    for file in parser.parse_args(argv).files:
        record = json.loads(file.read_text())
        if "cases" in record and "op" in record:
            draw(record, file.with_suffix(".png"))
            print(table(record) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
