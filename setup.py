"""Builds the optional extension mmrpt_kernels._C from csrc/. All other settings are in pyproject.toml.

MMRPT_BUILD_CSRC = auto (default): build what the machine can build; where that fails, warn and go on: without the
                      extension everything works, on the portable and Triton backends. Without nvcc the host's
                      versions of the kernels alone are built, which is what tests without a GPU run.
                   1: build it or fail
                   0: do not try
MMRPT_CUDA_ARCHITECTURES = compute capabilities for csrc/<op>/*.cu, e.g. "80;90a"; needs nvcc. Default: 80, 90 and 100,
                      as far as nvcc knows them. Newer GPUs compile the last one's PTX when the module is loaded.

Neither torch nor its headers are used, so one build serves every torch release.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("MMRPT_BUILD_CSRC", "auto")
DEFAULT_ARCHITECTURES = ("80", "90", "100")


def find_nvcc() -> str | None:
    """CUDA's compiler: in $CUDA_HOME where that is set, else on the PATH or in CUDA's usual place."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architectures(nvcc: str) -> list[str]:
    """Compute capabilities to compile for: the caller's list, or those of the default that this nvcc knows."""
    asked = os.environ.get("MMRPT_CUDA_ARCHITECTURES")
    if asked:
        return asked.split(";")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [name for name in DEFAULT_ARCHITECTURES if f"compute_{name}" in known]


def cuda_library_folders(nvcc: str) -> list[str]:
    """Where the static CUDA runtime lies. nvcc is asked for its toolkit: `nvcc` on the PATH may be a wrapper."""
    shown = subprocess.run([nvcc, "--dryrun", "any.cu"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.+)", shown)
    toolkit = Path(top.group(1)) if top else Path(nvcc).resolve().parent.parent
    candidates = [toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")]
    return [str(path) for path in candidates if (path / "libcudart_static.a").exists()]


class BuildExtension(build_ext):
    """build_ext that compiles .cu sources with nvcc first. With ext.optional set, a failure is only a warning."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.add_cuda(ext)
        except CompileError as error:
            if not ext.optional:
                raise
            print(f"warning: {error}: mmrpt_kernels._C gets the host's versions of its kernels alone", file=sys.stderr)
        super().build_extension(ext)

    def add_cuda(self, ext: Extension) -> None:
        """Compile ext.cuda_sources into objects and link them with the static CUDA runtime."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("CUDA sources but no nvcc (set CUDA_HOME or extend PATH)")
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        names = architectures(nvcc)
        codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
        codes.append(f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}")
        objects = []
        for source in ext.cuda_sources:
            target = folder / (source.replace("/", "_") + ".o")
            flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Icsrc", *codes]
            if subprocess.run([nvcc, *flags, "-c", source, "-o", str(target)], cwd=ROOT).returncode != 0:
                raise CompileError(f"nvcc could not compile {source}")
            objects.append(str(target))
        ext.extra_objects += objects
        ext.library_dirs += cuda_library_folders(nvcc)
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        ext.define_macros.append(("MMRPT_CUDA_ARCHITECTURES", f'"{";".join(names)}"'))


def extensions() -> list[Extension]:
    """The extension, or nothing when it is switched off or pybind11 is missing (in `auto` mode)."""
    if MODE not in ("auto", "0", "1"):
        raise SystemExit(f"MMRPT_BUILD_CSRC={MODE!r}: expected auto, 0 or 1")
    if MODE == "0":
        return []
    try:
        import pybind11
    except ImportError:
        if MODE == "1":
            raise
        print("warning: no pybind11: mmrpt_kernels._C is not built, the package works without it", file=sys.stderr)
        return []
    ext = Extension(
        "mmrpt_kernels._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        include_dirs=["csrc", pybind11.get_include()],
        # No -ffast-math: rows with -inf logits and NaN must come out as in float64.
        extra_compile_args=["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"],
        language="c++",
        optional=MODE == "auto",
    )
    ext.cuda_sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu"))
    return [ext]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
