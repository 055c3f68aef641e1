"""The table of README.md, written anew from result files.

python -m benchmarks.readme benchmarks/results/*-cpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import CaseRows, cases_of
from benchmarks.plot import times

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->\n"
# What a reader sees, operator, case, our contender.
ROWS = (
    (
        "attention and mass of all rows, T 2048, 8 heads of 64, half the keys visual",
        "attention",
        "forward-2k",
        "portable",
    ),
    ("the same, T 1024, forward + backward", "attention", "train-1k", "portable"),
    ("policy loss, N 1024, H 512, V 32,000, 40 % kept, forward + backward", "policy_loss", "32k-keep40", "portable"),
    ("the same with a bias", "policy_loss", "32k-keep40-bias", "portable"),
    ("the same, 100 % kept", "policy_loss", "32k-keep100", "portable"),
    ("the same in bfloat16, 40 % kept", "policy_loss", "32k-keep40-bf16", "portable"),
    ("a briefly trained head, V 8192, 40 % kept", "policy_loss", "8k-trained-keep40", "portable"),
    ("the same, words left out (2^-8)", "policy_loss", "8k-trained-keep40", "portable, skip_below=2^-8"),
    ("the trainer's path: perception weights, filter, clips; V 8192", "objective", "8k", "trainer"),
    ("a whole step of a 0.5B model cut to 4 layers, V 151,936, groups of 8", "step", "layers4", "trainer"),
    ("the same with states that sampling left", "step", "layers4", "trainer, states of the rollout"),
    ("the same under bfloat16 autocast", "step", "layers4-bf16", "trainer"),
    ("all 24 layers, groups of 4, the optimiser left out", "step", "layers24", "trainer"),
    ("the same under bfloat16 autocast", "step", "layers24-bf16", "trainer"),
    ("log-probs and entropy, N 1024, H 512, V 32,000", "logprobs", "score-32k", "portable"),
    ("log-probs through autograd, 40 % of the rows with a gradient", "logprobs", "train-32k-keep40", "portable"),
    ("the same, all rows", "logprobs", "train-32k", "portable"),
    ("the same, `linear_token_loss`", "logprobs", "train-32k", "linear_token_loss"),
    ("KL of two views, N 1024, H 512, V 32,000", "divergence", "score-32k", "portable"),
    ("the same, forward + backward", "divergence", "train-32k", "portable"),
    ("the same, gradient in one view", "divergence", "distil-32k", "portable"),
)


def line(words: str, case: CaseRows, ours: str) -> str:
    """A row of the table: speed over eager and memory of `ours`, then everybody else's speed, the fastest first."""
    shown = [name for name, row in case.rows.items() if row["kind"] in ("peer", "floor") and not row.get("variant")]
    timed = sorted((n for n in shown if case.of(n, "speedup")), key=lambda n: -case.of(n, "speedup"))
    others = "; ".join(f"{name} {times(case.of(name, 'speedup'))}" for name in timed)
    memory = f"{100 * case.rows[ours]['memory_ratio']:.0f} %"
    return f"| {words} | {times(case.of(ours, 'speedup'))} | {memory} | {others} |"


def table(records: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """The table with a line on where each operator was measured, and the rows of which the files know nothing."""
    records = [record for record in records if cases_of(record)]
    cases = {(case.op, case.name): case for record in records for case in cases_of(record)}
    lines, absent, ops = (
        ["| operator and case | ours | memory | others in the same run |", "|---|---:|---:|---|"],
        [],
        set(),
    )
    for words, op, name, ours in ROWS:
        case = cases.get((op, name))
        if case is None or case.of(ours, "speedup") is None:
            absent.append(f"{op} {name}, {ours}")
            continue
        lines.append(line(words, case, ours))
        ops.add(op)
    where: dict[str, list[str]] = {}
    for record in records:
        machine = record["machine_info"]
        for op in sorted({case.op for case in cases_of(record)} & ops):
            commit = f"{record['datetime'][:10]}, commit {record['commit_info']['id']}"
            where.setdefault(f"{machine['device_name']}, {machine['threads']} threads, {commit}", []).append(op)
    measured = "; ".join(f"{', '.join(names)}: {place}" for place, names in where.items())
    return "\n".join([*lines, "", f"Measured on: {measured}."]), absent


def main(files: Sequence[str]) -> int:
    text, absent = table([json.loads(Path(file).read_text()) for file in files])
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}{text}\n{END}{rest.split(END)[1]}")
    print(f"README.md: not measured: {'; '.join(absent) or 'nothing'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
