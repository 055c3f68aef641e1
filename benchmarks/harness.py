"""One way to compare implementations: gate on correctness, then time them in turns within one process.

An operator's benchmark is a file `benchmarks/bench_<op>.py` that pytest collects:

    def cases(device) -> list[Case]: ...            # Case("n1024", {"N": 1024, "V": 32000}, make_inputs)
    def contenders(device) -> list[Contender]: ...  # Contender("eager", eager, kind="baseline"), ...
    def goals(cases, device) -> list[dict]: ...     # optional, see benchmarks/goals.py

    def test_logprobs(rows, contender, benchmark) -> None:  # one test for each case and contender
        report(rows[contender], benchmark)

`conftest.py` makes `rows`, what `compare` says of a case, once for all its contenders. pytest-benchmark keeps the
statistics, stores them and compares them with those of another commit; what it cannot do is here and in `measure.py`.

The gate: every contender's results (tensor, tuple, NamedTuple or dict of tensors, gradients included: `with_backward`)
against the baseline's on the same inputs widened to float64, by the error rule of `mmrpt_kernels.testing`, with the
baseline in the inputs' own dtype as the yardstick. A contender of ours that fails is not timed and fails its test; a
peer's inaccurate result is timed and marked, since its error belongs to what is compared.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from benchmarks.measure import peak_bytes, quartiles, time_in_turns
from mmrpt_kernels import BackendError
from mmrpt_kernels.testing import assert_close_to_truth

__all__ = ["Case", "Contender", "compare", "replay_clock", "report", "with_backward"]

Inputs = dict[str, Any]
Row = dict[str, Any]
REFERENCES = ("baseline", "floor")  # kinds that the others' ratios are taken to


@dataclass(frozen=True)
class Case:
    """One workload.

    name: short, without spaces: part of the test's name.
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

    kind: "baseline", the ratios' denominator and the gate's yardstick, exactly one; "peer", somebody else's: what fails
        is reported, not fatal; "floor", the bare products that the mathematics needs: not gated, and the others' times
        are also given as multiples of its time, at most one.
    skip: why it cannot run here (shown in the table), or None; or a function of the case that says so.
    compare: names of the results that the gate compares where the baseline has them; None: all the baseline has. A
        contender that returns fewer must name those it has; (): what it computes is something else.
    approximate: asked to be inexact beyond the error rule: its errors are reported, not judged.
    facts: called as facts(**inputs) after all rounds: name -> number worth knowing beside the times, shown in the note.
    variant: another setting of a contender that is there already: in the tables, not in the plots.
    """

    name: str
    fn: Callable[..., Any]
    kind: Literal["ours", "baseline", "peer", "floor"] = "ours"
    skip: str | Callable[[Case], str | None] | None = None
    compare: tuple[str, ...] | None = None
    approximate: bool = False
    facts: Callable[..., dict[str, float]] | None = None
    variant: bool = False


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


class _Gate:
    """The baseline's results on one case's inputs, in float64 (truth) and in their own dtype (yardstick)."""

    def __init__(self, case: Case, baseline: Contender, device: torch.device) -> None:
        self.inputs = (case.gate_inputs or case.make_inputs)(device)
        # The rounding of the coarsest floating dtype among the inputs is the yardstick's.
        dtypes = [v.dtype for v in self.inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        self.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
        self.floor = case.floor
        self.truth = dict(_named(baseline.fn(**_widened(self.inputs))))
        self.yardstick = dict(_named(baseline.fn(**self.inputs)))

    def check(self, contender: Contender, row: Row) -> None:
        """Fill the row's `errors`, the largest of each floating result relative to max |truth|, and `absolute_errors`.

        AssertionError: the error rule is broken; the errors of all results stand in the row nevertheless.
        """
        results = dict(_named(contender.fn(**self.inputs)))
        row["errors"], row["absolute_errors"] = {}, {}
        if contender.kind == "floor":
            return
        names = [name for name in self.truth if contender.compare is None or name in contender.compare]
        assert names or contender.compare == (), f"none of {contender.compare} is among {', '.join(self.truth)}"
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


def _status_of(error: BaseException, kind: str = "ours") -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, AssertionError):
        return f"inaccurate: {error}"
    # What a contender says itself that it does not do; of ours a backend that does not serve this device or dtype.
    if isinstance(error, NotImplementedError if kind == "peer" else BackendError):
        return f"skipped: {error}"
    return f"{type(error).__name__}: {error}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _pass_gate(case: Case, contenders: Sequence[Contender], rows: dict[str, Row], device: torch.device) -> None:
    """Fill `status` and `errors` of every row that has no status yet."""
    baseline = next(c for c in contenders if c.kind == "baseline")
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
            row["status"] = _status_of(error, contender.kind)
    del gate
    _release(device)


def _measure(
    case: Case, contenders: Sequence[Contender], rows: dict[str, Row], device: torch.device, budget: float, quick: bool
) -> None:
    """Peak memory and times in turns of the contenders that passed (or are peers that merely lack accuracy)."""
    inputs = case.make_inputs(device)
    calls = {}
    for contender in contenders:
        row = rows[contender.name]
        if row["status"] == "ok" and contender.variant and quick:
            row["status"] = "skipped: passed the gate; variants are not timed with --quick"
        if row["status"] != "ok" and not (contender.kind == "peer" and row["status"].startswith("inaccurate")):
            continue
        call = lambda fn=contender.fn: fn(**inputs)  # noqa: E731
        try:
            call()  # compilation and caches are neither the operator's memory nor its time
            row["peak_bytes"] = peak_bytes(call, device)
            calls[contender.name] = call
        except Exception as error:
            row["status"] = _status_of(error, contender.kind)
            _release(device)
    if not calls:
        return
    low, high = (3, 10) if quick else (5, 60)
    samples = time_in_turns(list(calls.values()), device, budget=budget, low=low, high=high)
    times = dict(zip(calls, samples, strict=True))
    reference = {row["kind"]: name for name, row in rows.items() if name in times and row["kind"] in REFERENCES}
    for name, seconds in times.items():
        row = rows[name]
        row["samples"] = seconds
        if facts := next(c.facts for c in contenders if c.name == name):
            row["facts"] = facts(**inputs)
        if case.flops:
            row["tflops"] = case.flops / quartiles(seconds)[0] * 1e-12
        if floor := reference.get("floor"):
            row["of_floor"] = quartiles([s / f for f, s in zip(times[floor], seconds, strict=True)])
        if base := reference.get("baseline"):
            row["speedup"] = quartiles([b / s for b, s in zip(times[base], seconds, strict=True)])
            row["memory_ratio"] = row["peak_bytes"] / max(rows[base]["peak_bytes"], 1)


def compare(
    case: Case,
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    budget: float,
    quick: bool = False,
    time: bool = True,
) -> dict[str, Row]:
    """What the gate and the clock say of each contender in one case: a row by its name.

    A row has "kind", "variant", "status" ("ok", "skipped: why", "inaccurate: where" or what was raised) and, as far as
    they were measured, "errors", "absolute_errors", "peak_bytes", "memory_ratio", "facts", "tflops", "samples" (seconds
    of each round), and "speedup" and "of_floor": median and quartiles of the ratios within a round.

    Args:
        budget: seconds for the rounds; gate, compilation and warm-up come on top.
        quick: few rounds, and none of the variants.
        time: False: the gate alone.
    """
    rows: dict[str, Row] = {}
    for c in contenders:
        why = c.skip(case) if callable(c.skip) else c.skip
        status = "ok" if why is None else f"skipped: {why}"
        rows[c.name] = {"kind": c.kind, "variant": c.variant, "status": status}
    _pass_gate(case, contenders, rows, device)
    try:
        if time:
            _measure(case, contenders, rows, device, budget, quick)
    except Exception as error:  # device lost, out of memory in make_inputs: the other cases are still worth having
        for row in rows.values():
            row["status"] = _status_of(error) if row["status"] == "ok" else row["status"]
    _release(device)
    return rows


class _ReplayClock:
    """A timer for pytest-benchmark that goes on by durations measured before, in turns with other contenders."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, seconds: Sequence[float]) -> None:
        left = iter(seconds)

        def rewind() -> None:  # a clock at zero adds without rounding
            self.now = 0.0

        def advance() -> None:
            self.now += next(left)

        benchmark.pedantic(advance, setup=rewind, rounds=len(seconds))


replay_clock = _ReplayClock()


def report(row: Row, benchmark: Any) -> None:
    """The outcome of one test: hands a timed row to pytest-benchmark, whose statistics come back as "seconds" (median
    and quartiles) and "rounds"; skips what was skipped; fails for ours that raised or is inaccurate."""
    samples, status = row.pop("samples", None), row["status"]
    if samples:
        benchmark.group = f"{row['op']}: {row['case']}"
        replay_clock.replay(benchmark, samples)
        row |= {"seconds": [benchmark.stats[key] for key in ("median", "q1", "q3")], "rounds": len(samples)}
        benchmark.extra_info |= {key: value for key, value in row.items() if key not in ("seconds", "rounds")}
    elif status.startswith("skipped"):
        pytest.skip(status.removeprefix("skipped: "))
    elif status != "ok":
        if row["kind"] == "peer" or (row["kind"] == "baseline" and status == "out of memory"):
            pytest.xfail(status)  # a result, not a failure: the others are compared nevertheless
        pytest.fail(status, pytrace=False)
