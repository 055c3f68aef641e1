"""Make the virtual environment that the Makefile's targets run in. Standard library only; safe to run again.

    python3 scripts/bootstrap.py --venv .venv --extras train,dev

PyTorch is chosen in this order:
  1. One that the calling Python already has and that satisfies pyproject.toml is used as it is.
  2. Else the pinned release, as pip finds it. Where no NVIDIA GPU is present and that would bring CUDA packages
     (gigabytes), the index named by MMRPT_TORCH_INDEX is asked for a CPU build instead; where that fails, the plain
     release is installed and the message says what it costs.
What is installed besides can neither replace nor upgrade that torch: its version is a constraint. So is triton's: the
one that came with torch, or else the release by which the kernels' launch tables were made.
"""

import sys

# Up to here, and in its syntax throughout, this file suits old interpreters: they must get far enough to be told.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"mmrpt needs Python 3.11 or newer, this is {sys.version.split()[0]} ({sys.executable}). "
        "Name one, for instance: make test PYTHON=python3.12"
    )

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_PIN = "2.13.0"
TRITON_PIN = "3.6.0"
CUDA_PACKAGE = re.compile(r"^(nvidia[-_].*|triton|cuda[-_].*)$", re.IGNORECASE)


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def release(version: str) -> tuple[int, ...]:
    """The numeric part of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def torch_floor() -> str:
    """The lowest torch that pyproject.toml admits, e.g. "2.11"."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for requirement in requirements:
        found = re.fullmatch(r"torch>=([\d.]+)", requirement)
        if found:
            return found.group(1)
    raise SystemExit(f"pyproject.toml: expected a dependency 'torch>=X.Y' among {requirements}")


def torch_of(python: str | Path) -> str | None:
    """The version of the torch that `python` imports, or None when it has none or a broken one."""
    return version_of(python, "torch")


def version_of(python: str | Path, package: str) -> str | None:
    """The version of the package that `python` imports, or None when it has none or a broken one."""
    code = f"import {package}; print({package}.__version__)"
    run = subprocess.run([str(python), "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
    return run.stdout.strip() or None if run.returncode == 0 else None


def satisfies(version: str | None, floor: str) -> bool:
    """version >= floor by Python's rules: a pre-release of the floor itself ("2.11.0a0+x") lies below it."""
    if version is None:
        return False
    width = max(len(release(version)), len(release(floor)))
    have, need = ((*release(v), 0, 0, 0)[:width] for v in (version, floor))
    early = re.match(r"[\d.]+(a|b|rc|\.?dev)", version) is not None
    return have > need or (have == need and not early)


def has_nvidia_gpu() -> bool:
    """Whether this machine shows an NVIDIA GPU: asked of the driver's own tool, then of its device files."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
        return listed.returncode == 0 and "GPU" in listed.stdout
    return Path("/dev/nvidia0").exists()


def cuda_packages(report: dict) -> list[str]:
    """The CUDA packages among what pip's installation report would install."""
    names = [entry["metadata"]["name"] for entry in report.get("install", [])]
    return sorted(name for name in names if CUDA_PACKAGE.match(name))


class Environment:
    """The virtual environment at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin/python"

    def runs(self, *arguments: str) -> bool:
        """Whether its Python exists and ends `arguments` with success."""
        if not self.python.exists():
            return False
        return subprocess.run([str(self.python), *arguments], capture_output=True).returncode == 0

    def make(self, sees_caller: bool) -> None:
        """Create it, mend it, or keep the one that works. sees_caller: it can import the calling Python's packages."""
        if self.runs("-m", "pip", "--version"):
            say(f"{self.path}: kept")
        else:
            if self.path.exists() and any(self.path.iterdir()) and not (self.path / "pyvenv.cfg").exists():
                raise SystemExit(f"{self.path} exists and is no virtual environment; name another one with VENV=")
            say(f"{self.path}: made with {sys.executable}")
            try:
                # A dead interpreter (its base was upgraded or removed) is replaced; one without pip only gets pip.
                dead = self.path.exists() and not self.runs("-c", "")
                venv.create(self.path, with_pip=True, clear=dead, symlinks=True, system_site_packages=sees_caller)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"{self.path}: Python's venv module could not put pip into it ({error}). On Debian and Ubuntu: "
                    "apt-get install python3-venv; then run the same command again."
                ) from error
        if sees_caller and sys.prefix != sys.base_prefix and Path(sys.prefix) != self.path:
            self.add_path_of_caller()

    def add_path_of_caller(self) -> None:
        """A virtual environment made from a virtual environment sees the base's packages only: a .pth file adds the
        caller's own."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        here = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        theirs = [entry for entry in sys.path if entry.startswith(sys.prefix) and entry.endswith("-packages")]
        Path(here, "mmrpt-caller.pth").write_text("\n".join(theirs) + "\n")

    def pip(self, *arguments: str) -> int:
        say("pip " + " ".join(arguments))
        return subprocess.run([str(self.python), "-m", "pip", *arguments], cwd=ROOT).returncode

    def would_install(self, requirement: str) -> dict | None:
        """pip's report on a dry run, or None when pip cannot tell."""
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", requirement]
        run = subprocess.run(command, capture_output=True, text=True)
        try:
            return json.loads(run.stdout)
        except json.JSONDecodeError:
            say(f"pip's dry run of {requirement} gave no report: {run.stderr.strip()[-300:]}")
            return None


def install_torch(env: Environment, gpu: bool, index: str | None) -> None:
    """Put the pinned torch into `env`, as the module's docstring says."""
    wanted = f"torch=={TORCH_PIN}"
    report = None if gpu else env.would_install(wanted)
    heavy = cuda_packages(report) if report else []
    if heavy:
        say(f"no NVIDIA GPU here, and plain {wanted} would bring {len(heavy)} CUDA packages ({heavy[0]}, ...)")
        if index:
            if env.pip("install", wanted, "--index-url", index) == 0:
                return
            say("MMRPT_TORCH_INDEX has no such build (see above)")
        say(
            "going on with the plain release: several gigabytes. To avoid them, stop this, set MMRPT_TORCH_INDEX to "
            "PyTorch's index of CPU builds (its installation page shows the address under 'CPU') and run it again."
        )
    if env.pip("install", wanted) != 0:
        raise SystemExit(f"pip could not install {wanted}; its message stands above")


def install(env: Environment, extras: str) -> None:
    """The project, editable, with its extras; torch stays what it is."""
    torch = torch_of(env.python)
    if not satisfies(torch, torch_floor()):
        raise SystemExit(
            f"{env.path}: torch is {torch}, expected {torch_floor()} or newer; remove {env.path} and retry"
        )
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder, "constraints.txt")
        triton = version_of(env.python, "triton") or TRITON_PIN
        constraint.write_text(f"torch=={torch}\ntriton=={triton}\n")
        if env.pip("install", "--quiet", "--constraint", str(constraint), "--editable", f".[{extras}]") != 0:
            raise SystemExit("pip could not install the project; its message stands above")
    if torch_of(env.python) != torch:
        raise SystemExit(f"{env.path}: the installation replaced torch {torch}; remove {env.path} and retry")
    say(f"ready: {env.python}, torch {torch}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the virtual environment of the Makefile's targets.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="train,dev")
    args = parser.parse_args(argv)
    env = Environment(args.venv.absolute())
    floor = torch_floor()
    if env.runs("-m", "pip", "--version") and satisfies(torch_of(env.python), floor):
        say(f"{env.path}: kept, torch {torch_of(env.python)}")
    else:
        present = torch_of(sys.executable)
        usable = satisfies(present, floor)
        if usable:
            say(f"torch {present} of {sys.executable} is used as it is")
        elif present:
            say(f"torch {present} of {sys.executable} is older than {floor}: the environment gets its own")
        env.make(sees_caller=usable)
        if not satisfies(torch_of(env.python), floor):
            install_torch(env, has_nvidia_gpu(), os.environ.get("MMRPT_TORCH_INDEX"))
    install(env, args.extras)


if __name__ == "__main__":
    main()
