"""Make the virtual environment that the Makefile's targets run in. Standard library only; safe to run again.

    python3 scripts/bootstrap.py --venv .venv --extras train,dev [--constraints FILE]

Everything is installed in the versions of the constraints file; with `--constraints ""`, in the newest that
pyproject.toml admits. Torch and triton are chosen here, whatever that file is for:

PyTorch is chosen in this order:
  1. One that the calling Python already has and that satisfies pyproject.toml is used as it is.
  2. Else the pinned release, as pip finds it. Where no NVIDIA GPU is present and that would bring CUDA packages
     (gigabytes), the index named by MMRPT_TORCH_INDEX is asked for a CPU build instead; where that fails, the plain
     release is installed and the message says what it costs.
What is installed besides can neither replace nor upgrade that torch: its version is a constraint. So is triton's: the
one that came with torch, or else the pinned one, by which the kernels' launch tables were made. Where the torch is
another release than the pinned one, the pins of what torch itself requires step aside: torch knows which it works with.
"""

import sys

# Up to here, and in its syntax throughout, this file suits old interpreters: they must get far enough to be told.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"mmrpt needs Python 3.11 or newer, this is {sys.version.split()[0]} ({sys.executable}). "
        "Name one, for instance: make test PYTHON=python3.12"
    )

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CUDA_PACKAGE = re.compile(r"^(nvidia[-_].*|triton|cuda[-_].*)$", re.IGNORECASE)


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def release(version: str) -> tuple[int, ...]:
    """The numeric part of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def plain(name: str) -> str:
    """A package's name as pip compares names: "huggingface_hub" -> "huggingface-hub"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_of(path: Path) -> dict[str, str]:
    """Package and version of each line `name==version` of a constraints file."""
    pins = {}
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        pin = re.fullmatch(r"([\w.-]+)==([\w.!+]+)", line)
        if pin:
            pins[plain(pin.group(1))] = pin.group(2)
        elif line:
            raise SystemExit(f"{path}: expected lines 'name==version' and comments, got {line!r}")
    return pins


TORCH_PIN, TRITON_PIN = (pins_of(CONSTRAINTS)[name] for name in ("torch", "triton"))


@contextlib.contextmanager
def keeping_to(pins: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """The arguments that make pip keep to `pins`; none without pins."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "constraints.txt")
        file.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        yield ("--constraint", str(file)) if pins else ()


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

    def needs_of(self, package: str) -> set[str]:
        """The names of what the installed package requires."""
        code = f"import importlib.metadata as m; print(*m.requires({package!r}) or [], sep='\\n')"
        run = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True)
        return {plain(line) for line in re.findall(r"^[\w.-]+", run.stdout, re.MULTILINE)}

    def would_install(self, requirement: str) -> dict | None:
        """pip's report on a dry run, or None when pip cannot tell."""
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", requirement]
        run = subprocess.run(command, capture_output=True, text=True)
        try:
            return json.loads(run.stdout)
        except json.JSONDecodeError:
            say(f"pip's dry run of {requirement} gave no report: {run.stderr.strip()[-300:]}")
            return None


def install_torch(env: Environment, gpu: bool, index: str | None, pins: dict[str, str]) -> None:
    """Put the pinned torch into `env`, as the module's docstring says."""
    wanted = f"torch=={pins.get('torch', TORCH_PIN)}"
    report = None if gpu else env.would_install(wanted)
    heavy = cuda_packages(report) if report else []
    if heavy:
        say(f"no NVIDIA GPU here, and plain {wanted} would bring {len(heavy)} CUDA packages ({heavy[0]}, ...)")
        # That index has few releases of what torch needs: the command below installs those, from where pip looks else.
        if index and env.pip("install", "--no-deps", wanted, "--index-url", index) == 0:
            heavy = []
        elif index:
            say("MMRPT_TORCH_INDEX has no such build (see above)")
    if heavy:
        say(
            "going on with the plain release: several gigabytes. To avoid them, stop this, set MMRPT_TORCH_INDEX to "
            "PyTorch's index of CPU builds (its installation page shows the address under 'CPU') and run it again."
        )
    # A CUDA build brings the triton that it was made for.
    with keeping_to({name: pins[name] for name in pins if name != "triton"}) as constrained:
        if env.pip("install", *constrained, wanted) != 0:
            raise SystemExit(f"pip could not install {wanted}; its message stands above")


def pins_beside(torch: str, triton: str | None, needs: set[str], pins: dict[str, str]) -> dict[str, str]:
    """The pins for what is installed beside that torch and triton. needs: the names of what this torch requires."""
    if release(torch) != release(pins.get("torch", TORCH_PIN)):
        pins = {name: pins[name] for name in pins if name not in needs}
    return pins | {"torch": torch, "triton": triton or pins.get("triton", TRITON_PIN)}


def install(env: Environment, extras: str, pins: dict[str, str]) -> None:
    """The project, editable, with its extras; torch stays what it is."""
    torch = torch_of(env.python)
    if not satisfies(torch, torch_floor()):
        raise SystemExit(
            f"{env.path}: torch is {torch}, expected {torch_floor()} or newer; remove {env.path} and retry"
        )
    builders = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    with keeping_to(pins_beside(torch, version_of(env.python, "triton"), env.needs_of("torch"), pins)) as constrained:
        # Constraints do not reach pip's own build environments: what builds the project is installed here, pinned too.
        for what in (builders, ["--no-build-isolation", "--editable", f".[{extras}]"]):
            if env.pip("install", "--quiet", *constrained, *what) != 0:
                raise SystemExit("pip could not install the project; its message stands above")
    if torch_of(env.python) != torch:
        raise SystemExit(f"{env.path}: the installation replaced torch {torch}; remove {env.path} and retry")
    say(f"ready: {env.python}, torch {torch}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the virtual environment of the Makefile's targets.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="train,dev")
    parser.add_argument("--constraints", default=str(CONSTRAINTS), help="empty: the newest that pyproject.toml admits")
    args = parser.parse_args(argv)
    pins = pins_of(Path(args.constraints)) if args.constraints else {}
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
            install_torch(env, has_nvidia_gpu(), os.environ.get("MMRPT_TORCH_INDEX"), pins)
    install(env, args.extras, pins)


if __name__ == "__main__":
    main()
