"""The integration tests against the oldest and the newest releases that pyproject.toml admits. `make test-versions`.

    .venv/bin/python -m scripts.versions [oldest] [newest] [--if-new] [--jobs N]

What differs from the environment's own versions is installed into a folder under it, in front of it on PYTHONPATH;
torch and triton are the environment's. Exit code 0 when every combination could be made and passed all its tests.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bootstrap import ROOT, plain, satisfies
from scripts.constraints import Unresolved, requirements, resolve
from scripts.gpu import run

TESTS = (
    "tests/kernels/integrations/test_attention_transformers*.py",
    "tests/kernels/integrations/test_trl*.py",
    "tests/trainer/test_trl*.py",
    "tests/trainer/test_policy*.py",
    "tests/trainer/test_famil*.py",
    "tests/trainer/test_tiny_vlm*.py",
    "tests/trainer/test_rollout*.py",
    "tests/trainer/test_lora*.py",
)
EXTRAS = ("train", "data", "trl", "lora")
SHOWN = ("transformers", "trl", "peft", "accelerate", "tokenizers", "huggingface-hub", "datasets", "numpy")
EVERYWHERE = "needs an NVIDIA GPU"  # the one reason to skip that says nothing about versions
BY_DESIGN = ("transformers 4 asks accelerate for FSDP",)  # why a whole file may be skipped


@dataclass
class Outcome:
    """What became of one combination. problem: why it failed, besides failed tests."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    problem: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.failed and not self.problem


def oldest(requirement: str, released: list[str]) -> str:
    """The requirement at the oldest of the released versions that it admits: "trl>=1.16,<2" -> "trl==1.16.0"."""
    name, floor = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", requirement).groups()
    admitted = [version for version in released if satisfies(version, floor)]
    if not admitted:
        raise Unresolved(f"pip can get no release for {requirement!r}; it has {', '.join(released) or 'none'}")
    return f"{name}=={min(admitted, key=lambda version: [int(part) for part in re.findall(r'[0-9]+', version)])}"


def released(package: str) -> list[str]:
    """The releases that pip can get for this Python, without the withdrawn and the early ones."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    shown = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Available versions: (.*)", shown.stdout)
    if found is None:
        raise Unresolved(f"pip index versions {package} named none: {shown.stderr.strip()[-300:]}")
    return found.group(1).split(", ")


def wanted(combination: str) -> list[str]:
    """The combination's requirements. oldest: all that `train`, `trl` and `lora` name is, and the rest follows; numpy
    does not count, since releases of pyarrow refuse old ones without telling pip."""
    lines = requirements(*EXTRAS)
    if combination == "newest":
        return lines
    named = [line for line in requirements("train", "trl", "lora") if line not in requirements()]
    return lines + [oldest(line, released(re.match(r"[\w-]+", line).group())) for line in named]


def installed() -> dict[str, str]:
    """Name and version of what this environment has."""
    return {plain(entry.name): entry.version for entry in importlib.metadata.distributions() if entry.name}


def fill(folder: Path, versions: dict[str, str]) -> None:
    """Install exactly `versions` into `folder`, without what they require; kept where it already holds them."""
    pins = "".join(f"{name}=={version}\n" for name, version in versions.items())
    stamp = folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == pins:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = pins.split()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *lines]
    if lines and subprocess.run(command).returncode != 0:
        raise Unresolved("pip could not install what it had resolved; its message stands above")
    stamp.write_text(pins)


def test_files(root: Path = ROOT) -> list[str]:
    """The files that TESTS name; each of its patterns must name one, so that a renamed file is missed."""
    files = []
    for pattern in TESTS:
        found = sorted(str(path.relative_to(root)) for path in root.glob(pattern))
        if not found:
            raise SystemExit(f"no file is named {pattern}: mend TESTS in scripts/versions.py")
        files += found
    return files


def read_results(outcome: Outcome, report: Path, files: list[str]) -> None:
    """Fill the outcome from pytest's JUnit report. A file of which no test ran is a problem: its library is missing."""
    ran = set()
    for case in xml.parse(report).iter("testcase"):
        place = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if skip is not None:
            whole_file = skip.get("message") == "collection skipped"
            reason = (skip.text if whole_file else skip.get("message")) or "no reason"
            outcome.skipped[reason] += 1
            if whole_file and any(known in reason for known in BY_DESIGN):
                ran.add(case.get("name"))
            continue
        ran.add(place)
        if case.find("failure") is None and case.find("error") is None:
            outcome.passed += 1
        else:
            outcome.failed.append(place)
    modules = {file: file.removesuffix(".py").replace("/", ".") for file in files}
    unrun = [file for file, module in modules.items() if not any(re.match(rf"{module}\b", place) for place in ran)]
    if unrun:
        outcome.problem = f"no test ran of {', '.join(unrun)}"


def try_combination(name: str, jobs: int, limit: float, if_new: bool) -> Outcome:
    """Resolve, install and test one combination."""
    outcome = Outcome(name)
    print(f"\n[versions] {name}: asking pip", flush=True)
    try:
        outcome.versions = resolve(wanted(name), bounds=tuple(requirements("dev")))
        present = installed()
        differing = {key: value for key, value in outcome.versions.items() if present.get(key) != value}
        print(f"[versions] {name}: {' '.join(f'{k}=={v}' for k, v in differing.items()) or 'as installed'}", flush=True)
        if if_new and not differing:
            outcome.note = "what the environment has: `make test` ran it"
            return outcome
        folder = Path(sys.prefix, "versions", name)
        fill(folder, differing)
    except Unresolved as error:
        outcome.problem = f"could not be made: {error}"
        return outcome
    report, files = folder / "results.xml", test_files()
    report.unlink(missing_ok=True)
    command = ["env", f"PYTHONPATH={folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS=1", sys.executable, "-m", "pytest"]
    command += ["-q", "-m", "not slow", "-n", str(jobs), "--dist", "loadfile", f"--junitxml={report}", *files]
    code, output, outcome.seconds = run(command, limit)
    print(output, flush=True)
    if report.exists():
        read_results(outcome, report, files)
    if code != 0 and outcome.ok:
        outcome.problem = "stopped at its limit" if code == 124 else f"pytest ended with {code}"
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """What was run with which versions, then every failure and every reason to skip that versions may explain."""
    head = ["combination", *SHOWN, "passed", "failed", "skipped", "seconds", "result"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    details = []
    for outcome in outcomes:
        counts = [outcome.passed, len(outcome.failed), sum(outcome.skipped.values()), round(outcome.seconds)]
        result = outcome.note or ("ok" if outcome.ok else "FAILED")
        cells = [outcome.name, *(outcome.versions.get(name, "-") for name in SHOWN), *counts, result]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        details += [f"{outcome.name}: FAILED {place}" for place in outcome.failed]
        details += [f"{outcome.name}: {outcome.problem}"] if outcome.problem else []
        reasons = {reason: n for reason, n in outcome.skipped.items() if EVERYWHERE not in reason}
        details += [f"{outcome.name}: skipped {n}: {reason}" for reason, n in reasons.items()]
    return "\n".join(lines + details)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The integration tests against the oldest and the newest releases.")
    parser.add_argument("combinations", nargs="*", metavar="oldest|newest", help="default: both")
    parser.add_argument("--if-new", action="store_true", help="leave out what equals the environment's own versions")
    parser.add_argument("--jobs", type=int, default=1, help="pytest's workers")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for the tests of one combination")
    args = parser.parse_args(argv)
    names = args.combinations or ["oldest", "newest"]
    if unknown := set(names) - {"oldest", "newest"}:
        parser.error(f"expected oldest or newest, got {', '.join(sorted(unknown))}")
    outcomes = [try_combination(name, args.jobs, args.limit, args.if_new) for name in names]
    print(f"\n{table(outcomes)}", flush=True)
    return int(not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
