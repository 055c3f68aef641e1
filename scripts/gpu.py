"""Every GPU test, then every benchmark, within a time budget; installs nothing. `make gpu` runs this.

    PYTHONPATH=. python3 scripts/gpu.py --results benchmarks/results --budget 510

Parts run as processes of their own, so that one that hangs, crashes or poisons the GPU does not take the others along;
each gets a share of the time left. Tables are printed last. Exit code 0 when every part succeeded. Writes into the
results folder: gpu-tests.log, gpu-sanitizer.log, gpu-benchmarks.log, gpu-summary.json and what the benchmarks write.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 5  # pytest's exit code when nothing was selected: no operator has a GPU test yet, or all skip
TEST_SHARE = 0.45  # of the budget at most; what the tests leave goes to the benchmarks
SANITIZER_SHARE = 0.15  # likewise
SANITIZER_TEST = "test_attention_sanitizer.py"  # slow, so it must not hold up the other tests
BUILD_SECONDS = 90.0


@dataclass
class Part:
    """What became of one part."""

    name: str
    ok: bool
    seconds: float
    summary: str


def run(command: list[str], limit: float, log: Path | None = None) -> tuple[int, str, float]:
    """Exit code (124 at the limit), combined output and seconds. Output is echoed, and kept in `log`."""
    print(f"\n$ {' '.join(command)}   (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(limit, 1.0))
        code = process.returncode
    except subprocess.TimeoutExpired:
        # The whole group: pytest's workers and compilers must not go on using the GPU under the next part.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        code = 124
    if log is not None:
        log.write_text(output)
    return code, output, time.monotonic() - start


def find_gpu() -> str:
    """torch, triton and the GPU in words; SystemExit when this is no machine for `make gpu`."""
    code = (
        "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'; import triton; "
        "print('torch', torch.__version__, 'triton', triton.__version__, torch.cuda.get_device_name())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if found.returncode != 0:
        reason = (found.stderr.strip().splitlines() or ["no output"])[-1]
        raise SystemExit(
            f"make gpu needs an NVIDIA GPU, torch and triton in {sys.executable}: {reason}. "
            "Name another Python with PYTHON=, or use `make test` and `make bench` here."
        )
    return found.stdout.strip()


def build_extension() -> Part | None:
    """The compiled kernels in place; None where the machine has no nvcc, which is no failure."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if shutil.which("nvcc") is None and not Path(home, "bin/nvcc").exists():
        print("no nvcc: the compiled extension is left out")
        return None
    if importlib.util.find_spec("pybind11") is None or importlib.util.find_spec("setuptools") is None:
        print("no pybind11 or setuptools: the compiled extension is left out")
        return None
    os.environ["MMRPT_BUILD_CSRC"] = "1"
    code, output, seconds = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BUILD_SECONDS)
    if code != 0:
        print(output[-3000:])
    return Part("extension", code == 0, seconds, "built" if code == 0 else f"not built (exit {code})")


def gpu_test_files(folder: Path = ROOT / "tests") -> list[str]:
    """Test files that name the mark, or take it from tests/kernels/devices.py. Only these are collected: others may
    import what a GPU machine lacks, slowly."""
    texts = {str(path): path.read_text() for path in folder.rglob("test_*.py")}
    return sorted(path for path, text in texts.items() if "mark.gpu" in text or "tests.kernels.devices" in text)


def run_tests(results: Path, limit: float, *, sanitizer: bool = False) -> Part:
    """Every test marked `gpu`; `gpu_test_files` says where. `sanitizer`: compute-sanitizer's alone, or all
    the others."""
    name = "sanitizer" if sanitizer else "tests"
    files = [path for path in gpu_test_files() if (Path(path).name == SANITIZER_TEST) == sanitizer]
    if not files:
        return Part(name, True, 0.0, "no GPU test yet")
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-q", "--color=no"]
    # A file that cannot be imported here fails the part, but not the tests of the others.
    command.append("--continue-on-collection-errors")
    if importlib.util.find_spec("xdist") is not None:
        # Triton compiles on the CPU: several workers share the waiting, the long files too. More would crowd the GPU's
        # memory.
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "worksteal"]
    log = results / f"gpu-{name}.log"
    code, output, seconds = run(command, limit, log)
    lines = output.strip().splitlines() or ["no output"]
    closing = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|skipped|error|des)", line)), "")
    if code == NO_TESTS:
        closing = "no GPU test was selected"
    elif code != 0:
        print("\n".join(lines[-60:]))
        closing = f"{'stopped at its limit' if code == 124 else f'exit {code}'}: {closing or lines[-1]}; see {log.name}"
    return Part(name, code in (0, NO_TESTS), seconds, closing.strip("= "))


def run_benchmarks(results: Path, limit: float) -> tuple[Part, str]:
    """Every operator's benchmark; also their tables."""
    budget = max(limit - 15.0, 10.0)
    arguments = ["--device", "cuda", "--results", str(results), "--budget", f"{budget:.0f}"]
    code, output, seconds = run([sys.executable, "-m", "benchmarks", *arguments], limit, results / "gpu-benchmarks.log")
    summary = "all done" if code == 0 else ("stopped at its limit" if code == 124 else f"exit {code}")
    return Part("benchmarks", code == 0, seconds, summary), output


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--budget", type=float, default=510.0, help="seconds for everything")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.budget
    print(find_gpu())
    results = args.results.absolute()
    results.mkdir(parents=True, exist_ok=True)
    parts = [part for part in [build_extension()] if part is not None]
    parts.append(run_tests(results, min(TEST_SHARE * args.budget, end - time.monotonic())))
    parts.append(run_tests(results, min(SANITIZER_SHARE * args.budget, end - time.monotonic()), sanitizer=True))
    benchmarks, tables = run_benchmarks(results, end - time.monotonic())
    parts.append(benchmarks)
    (results / "gpu-summary.json").write_text(json.dumps([asdict(part) for part in parts], indent=1) + "\n")
    print(tables[-9000:])
    print("\n| part | result | seconds | |\n|---|---|---|---|")
    for part in parts:
        print(f"| {part.name} | {'ok' if part.ok else 'FAILED'} | {part.seconds:.0f} | {part.summary} |")
    return 0 if all(part.ok for part in parts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
