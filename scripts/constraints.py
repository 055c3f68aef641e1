"""Write constraints.txt anew: the newest releases that pyproject.toml admits and pip can get. `make constraints`.

    .venv/bin/python -m scripts.constraints

Runs on the oldest Python that the project supports, so that every supported one can install what is pinned. The
releases of torch and triton are decisions, not refreshed: edit their two lines by hand. Nothing is installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

from scripts.bootstrap import CONSTRAINTS, CUDA_PACKAGE, ROOT, pins_of, plain

EXTRAS = ("train", "data", "trl", "lora", "dev")  # of `make test`, which are those of `make demo` and more
GIVEN = ("torch", "triton")

HEAD = """\
# What `make demo` and `make test` install: the exact versions with which the tests were run, on every supported Python.
# pyproject.toml's own ranges stay open. `make constraints` writes this file; the newest instead: make test CONSTRAINTS=
# scripts/bootstrap.py reads it. torch and triton are edited by hand, and hold where the calling Python brings neither.
"""


class Unresolved(Exception):
    """pip found no set of releases; its own message."""


def requirements(*extras: str) -> list[str]:
    """What pyproject.toml requires for the core and the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]


def builders() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]


def describe(package: str, site: Path) -> None:
    """Copy the description of the installed package into `site`, without what it requires of CUDA: there it counts as
    installed, and pip neither downloads it nor takes another release."""
    for source in Path(sysconfig.get_path("purelib")).glob(f"{package}-*.dist-info/METADATA"):
        target = site / source.parent.name
        target.mkdir()
        required = re.compile(r"^Requires-Dist:\s*([\w.-]+)")
        lines = source.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not ((found := required.match(line)) and CUDA_PACKAGE.match(found[1]))]
        (target / "METADATA").write_text("".join(kept))
        (target / "INSTALLER").write_text("pip\n")


def versions_in(report: dict) -> dict[str, str]:
    """Name and version of what pip's report would install, by name."""
    found = {plain(entry["metadata"]["name"]): entry["metadata"]["version"] for entry in report["install"]}
    return dict(sorted(found.items()))


def resolve(wanted: list[str], bounds: tuple[str, ...] = ()) -> dict[str, str]:
    """Everything that pip would install for `wanted` beside this Python's torch, what torch itself requires included.

    wanted: requirements. bounds: further constraints. Raises Unresolved.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False, symlinks=True)
        for package in GIVEN:
            describe(package, next(Path(folder).glob("lib/python*/site-packages")))
        limits = Path(folder, "bounds.txt")
        limits.write_text("\n".join(bounds))
        command = [sys.executable, "-m", "pip", "--python", f"{folder}/bin/python", "install", "--quiet", "--dry-run"]
        command += ["--report", "-", "--constraint", str(limits), *wanted]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            errors = [line for line in run.stderr.splitlines() if not line.startswith("WARNING")]
            raise Unresolved("\n".join(errors).strip() or f"pip ended with {run.returncode}")
        return versions_in(json.loads(run.stdout))


def text_of(versions: dict[str, str], given: dict[str, str]) -> str:
    """The file: `given` (torch and triton) as they are, the rest as resolved."""
    pins = sorted((versions | given).items())
    return HEAD + "".join(f"{name}=={version}\n" for name, version in pins)


def main() -> None:
    floor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    here = "{}.{}".format(*sys.version_info)
    if here != floor:
        raise SystemExit(
            f"the pins must suit Python {floor}, the oldest supported, and this is {here}: "
            f"make constraints PYTHON=python{floor} VENV=.venv-{floor}"
        )
    pins = pins_of(CONSTRAINTS)
    given = {name: pins[name] for name in GIVEN}
    try:
        versions = resolve(requirements(*EXTRAS) + builders())
    except Unresolved as error:
        raise SystemExit(f"pip could not resolve pyproject.toml's requirements:\n{error}") from error
    CONSTRAINTS.write_text(text_of(versions, given))
    for name in sorted(pins.keys() | versions.keys()):
        if name not in GIVEN and pins.get(name) != versions.get(name):
            print(f"{name}: {pins.get(name, 'new')} -> {versions.get(name, 'gone')}")
    print(f"{CONSTRAINTS.name}: {len(versions) + len(given)} pins")


if __name__ == "__main__":
    main()
