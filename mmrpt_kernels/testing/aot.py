"""Compile Triton kernels for an NVIDIA architecture without a GPU, and read what the machine code needs.

    spec = KernelSpec("mmrpt_kernels.attention.triton.mass_forward", "_kernel", arch=90,
                      signature={"q": "*bf16", "num_rows": "i32", "stride": "i64:16"}, constants={"BLOCK": 64})
    compiled, = compile_kernels([spec])     # raises ResourceError when it spills or needs too much shared memory
    assert "wgmma" in compiled.ptx

Or let a launcher write the specs: inside `recorded_launches(module, arch=90)` a module's kernels do not run but are
written down, as Triton would specialise them; launches that differ in their specs compile a kernel each. Tensors on
torch's "meta" device will do, at any size.

The work is done in a child process: a process whose Triton interprets (TRITON_INTERPRET=1) cannot compile. Triton's own
cache makes a second run quick.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

# Shared memory that one block may use, bytes, by compute capability (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


# Triton's words for what a tensor holds.
ELEMENTS = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


class CompileError(RuntimeError):
    """Triton or ptxas refused a kernel; the message holds theirs."""


class ResourceError(AssertionError):
    """A kernel compiles, but spills registers or needs more shared memory than a block may have."""


class KernelSpec(NamedTuple):
    """One kernel under one configuration.

    signature: run-time arguments in Triton's words: "*bf16", "*fp32", "*i1", "i32", "i64", "fp32". Pointers count as
        aligned to 16 bytes, as torch's allocations are, "*fp32:1" not; "i32:16" promises a multiple of 16, as Triton
        finds out by itself at a launch.
    constants: the values of tl.constexpr arguments, and of run-time arguments that a launch passes as None or 1.
    options: further compiler options, such as {"maxnreg": 168}.
    """

    module: str
    kernel: str
    arch: int  # 80, 90, 100: compute capability times ten
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    options: dict[str, Any] = {}

    @property
    def title(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel} sm_{self.arch} warps={self.num_warps} stages={self.num_stages} {constants}"


class Compiled(NamedTuple):
    """What a compiled kernel needs."""

    spec: KernelSpec
    registers: int  # per thread
    spill_bytes: int  # local memory per thread: what does not fit the registers
    shared_bytes: int  # per block
    ptx: str


def compile_kernels(specs: Sequence[KernelSpec], *, check: bool = True, timeout: float = 600.0) -> list[Compiled]:
    """Compile each spec; no GPU needed.

    Args:
        specs: what to compile.
        check: refuse kernels that spill or exceed the architecture's shared memory.
        timeout: seconds for all of them.

    Raises:
        CompileError: Triton or ptxas refuses one. ResourceError: see `check`; the message lists every offender.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "asked.json"), Path(folder, "answered.json")
        asked.write_text(json.dumps([spec._asdict() for spec in specs]))
        command = [sys.executable, "-m", "mmrpt_kernels.testing.aot", str(asked), str(answered)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if run.returncode != 0:
            raise CompileError(
                f"the compiling process ended with {run.returncode}: {(run.stdout + run.stderr)[-4000:]}"
            )
        answers = json.loads(answered.read_text())
    failed = [f"{spec.title}: {a['error']}" for spec, a in zip(specs, answers, strict=True) if "error" in a]
    if failed:
        raise CompileError("\n".join(failed))
    compiled = [Compiled(spec, **answer) for spec, answer in zip(specs, answers, strict=True)]
    if check:
        check_resources(compiled)
    return compiled


class _Recorder:
    """Stands for a kernel: `recorder[grid](*arguments)` appends a KernelSpec instead of launching."""

    def __init__(self, kernel: Any, module: str, name: str, arch: int, into: list[KernelSpec]):
        self.kernel, self.module, self.name, self.arch, self.into = kernel, module, name, arch, into
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *positional, num_warps: int = 4, num_stages: int = 3, **named) -> None:
        options = {name: named.pop(name) for name in ("maxnreg", "num_ctas") if name in named}
        given = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
        signature, constants = {}, {}
        constexprs = {p.name for p in getattr(self.kernel, "params", ()) if p.is_constexpr} or {
            name for name in self.kernel.arg_names if "constexpr" in str(self.kernel.fn.__annotations__.get(name, ""))
        }
        general = _listed(self.kernel, "do_not_specialize")
        anywhere = general | _listed(self.kernel, "do_not_specialize_on_alignment")
        for name, value in given.items():
            if name in constexprs or value is None or (type(value) is int and value == 1 and name not in general):
                constants[name] = getattr(value, "value", value)
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + ELEMENTS[value.dtype] + ":1" * (name in anywhere or not _aligned(value))
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                kind = "i32" if -(2**31) <= value < 2**31 else "i64"
                signature[name] = kind + ":16" * (name not in anywhere and value % 16 == 0)
        self.into.append(
            KernelSpec(self.module, self.name, self.arch, signature, constants, num_warps, num_stages, options)
        )


def _listed(kernel: Any, option: str) -> set[str]:
    """Names of the arguments that a kernel's decorator lists under `option`."""
    given = getattr(kernel, option, None) or getattr(kernel, "kwargs", {}).get(option) or ()
    return {kernel.arg_names[one] if isinstance(one, int) else one for one in given}


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether it starts at a multiple of 16 bytes; one without memory of its own as an allocation of torch's would."""
    start = tensor.storage_offset() * tensor.itemsize if tensor.is_meta else tensor.data_ptr()
    return start % 16 == 0


@contextmanager
def recorded_launches(*modules: ModuleType, arch: int) -> Iterator[list[KernelSpec]]:
    """Inside the block, kernels that these modules hold are written down instead of launched; yields the list.

    A module's kernel is any attribute that Triton's jit made; each launcher must look it up in its own module.
    """
    specs: list[KernelSpec] = []
    real = []
    for module in modules:
        for name, value in list(vars(module).items()):
            if hasattr(value, "arg_names") and hasattr(value, "fn") and value.fn.__module__ == module.__name__:
                real.append((module, name, value))
                setattr(module, name, _Recorder(value, module.__name__, name, arch, specs))
    try:
        yield specs
    finally:
        for module, name, value in real:
            setattr(module, name, value)


def check_resources(compiled: Sequence[Compiled]) -> None:
    """Raise ResourceError unless every kernel keeps to its registers and to the architecture's shared memory."""
    wrong = []
    for one in compiled:
        limit = SHARED_LIMIT[one.spec.arch]
        if one.spill_bytes:
            wrong.append(
                f"{one.spec.title}: spills {one.spill_bytes} bytes per thread at {one.registers} registers; "
                "choose smaller blocks or more warps"
            )
        if one.shared_bytes > limit:
            wrong.append(
                f"{one.spec.title}: needs {one.shared_bytes} bytes of shared memory, a block has {limit}; "
                "choose smaller blocks or fewer stages"
            )
    if wrong:
        raise ResourceError("\n".join(wrong))


def _resources(cubin: bytes, arch: int) -> tuple[int, int]:
    """Registers per thread and local memory per thread in bytes, as the bundled cuobjdump reads them.

    Triton's kernels declare no local arrays: their stack frame is what was spilled.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise CompileError(f"cuobjdump's report on sm_{arch} has no registers: {text[-500:]}")
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


def _compile(spec: KernelSpec) -> dict[str, Any]:
    """In the child: one kernel; the fields of Compiled but `spec`, or {"error": text}."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        kernel = getattr(importlib.import_module(spec.module), spec.kernel)
        signature, attributes = {}, {}
        for position, name in enumerate(kernel.arg_names):
            if name in spec.constants:
                signature[name] = "constexpr"
                continue
            kind, _, multiple = spec.signature[name].partition(":")
            signature[name] = kind
            if multiple == "16" or (kind.startswith("*") and not multiple):
                attributes[(position,)] = [["tt.divisibility", 16]]
        unknown = (spec.signature.keys() | spec.constants.keys()) - set(kernel.arg_names)
        if unknown:
            return {"error": f"no such arguments: {sorted(unknown)}"}
        source = ASTSource(kernel, signature, constexprs=dict(spec.constants), attrs=attributes)
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
        made = triton.compile(source, target=GPUTarget("cuda", spec.arch, 32), options=options)
        registers, spilled = _resources(made.asm["cubin"], spec.arch)
    except Exception:  # whatever the compiler throws is the answer
        return {"error": traceback.format_exc()[-1500:]}
    return {
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": made.metadata.shared,
        "ptx": made.asm["ptx"],
    }


def main(asked: str, answered: str) -> None:
    """The child process: read specs, write answers."""
    specs = [KernelSpec(**fields) for fields in json.loads(Path(asked).read_text())]
    Path(answered).write_text(json.dumps([_compile(spec) for spec in specs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
