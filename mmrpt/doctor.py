"""Is this installation sound? `python -m mmrpt.doctor` says what is here, checks the operators, and names remedies.

Every backend that the table offers on each device is run on a tiny case and compared with the definition by the error
rule of the tests; log-probabilities must be <= 0, entropies and divergences >= 0, masses in [0, 1]. Exit code 0 when
nothing is wrong; notes (no GPU, no extension) do not count as wrong.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import mmrpt_kernels as kernels
from mmrpt_kernels.backends import BACKENDS, OPERATORS, BackendError, select
from mmrpt_kernels.common.extension import build_info
from mmrpt_kernels.testing import assert_close_to_truth

__all__ = ["Finding", "examine", "main"]

OPTIONAL = ("triton", "datasets", "accelerate", "peft", "bitsandbytes", "trl", "verl", "liger-kernel")
RUN_BYTES = 500 * 2**20  # what a default run leaves behind, checkpoints included, with room to spare


class Finding(NamedTuple):
    """One line of the report. `remedy` is empty unless something can be done."""

    state: Literal["ok", "note", "bad"]
    what: str
    text: str
    remedy: str = ""


def requirements(extra: str | None) -> dict[str, tuple[str, str | None]]:
    """Package -> (lowest version that works, first that does not, or None), as pyproject.toml has them: from the
    installed metadata, or from the checkout that this file lies in."""
    try:
        lines = importlib.metadata.requires("mmrpt") or []
        mark = f'extra == "{extra}"'
        wanted = [line.split(";")[0] for line in lines if (mark in line if extra else "extra ==" not in line)]
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
        wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
    found = {}
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)
        low, high = re.search(r">=([\d.]+)", requirement), re.search(r"<([\d.]+)", requirement)
        if name and low:
            found[name.group()] = (low.group(1), high.group(1) if high else None)
    return found


def _release(version: str, width: int = 4) -> tuple[int, ...]:
    """ "4.57.1" -> (4, 57, 1, 0); what follows the numbers (a local build, a pre-release) is left out."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in numbers.group().split(".")] if numbers else []
    return (*parts, *(0,) * width)[:width]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(ranges: dict[str, tuple[str, str | None]], remedy: str) -> Iterator[Finding]:
    """Each package of `ranges`: present and inside its range."""
    for name, (low, high) in ranges.items():
        have = _installed(name)
        wanted = f">={low}" + (f",<{high}" if high else "")
        if have is None:
            yield Finding("bad", name, f"not installed, expected {wanted}", remedy)
        elif _release(have) < _release(low) or (high and _release(have) >= _release(high)):
            yield Finding("bad", name, f"{have}, expected {wanted}", f"pip install '{name}{wanted}'")
        else:
            yield Finding("ok", name, have)


def check_machine() -> Iterator[Finding]:
    """Python, threads, GPUs, the compiled extension, disk."""
    yield Finding("ok", "python", f"{platform.python_version()} ({sys.executable})")
    have = [f"{name} {version}" for name in OPTIONAL if (version := _installed(name))]
    yield Finding("ok", "optional packages", ", ".join(have) or "none")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if threads < cores // 2:
        remedy = "unset OMP_NUM_THREADS, or set it to the number of cores that are yours"
        yield Finding("note", "threads", f"{threads} of {cores} cores", remedy)
    else:
        yield Finding("ok", "threads", f"{threads} of {cores} cores")
    yield from _check_gpus()
    info = build_info()
    if info["built"]:
        built_for = info["cuda_architectures"] or "none"
        yield Finding("ok", "extension", f"built ({info['compiler']}; CUDA architectures: {built_for})")
    else:
        remedy = "python setup.py build_ext --inplace, with a C++ compiler and pybind11; only speed depends on it"
        yield Finding("note", "extension", f"not built: {info['reason']}", remedy)
    free = shutil.disk_usage(Path.cwd()).free
    state = "ok" if free >= RUN_BYTES else "bad"
    remedy = (
        "" if state == "ok" else f"free some, or set output= to another disk: a run writes up to {RUN_BYTES >> 20} MiB"
    )
    yield Finding(state, "disk", f"{free / 2**30:.1f} GiB free in {Path.cwd()}", remedy)


def _check_gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if torch.version.cuda and Path("/dev/nvidia0").exists():
            remedy = "the driver may be older than torch's CUDA: compare nvidia-smi with torch.version.cuda"
            yield Finding("bad", "GPU", f"there is one, but torch (CUDA {torch.version.cuda}) cannot use it", remedy)
        else:
            yield Finding("note", "GPU", "none that torch sees: everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = f"{device.name}, compute capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        yield Finding("ok", f"GPU {index}", text)


def check_trainers() -> Iterator[Finding]:
    """Whether the adapters of mmrpt_kernels.integrations know the installed TRL and verl; either may be absent."""
    for name in ("trl", "verl"):
        have, what = _installed(name), f"adapter of {name}"
        if have is None:
            yield Finding("note", what, f"{name} is not installed; nothing but the adapter needs it")
            continue
        try:
            with importlib.import_module(f"mmrpt_kernels.integrations.{name}").fused_head():
                yield Finding("ok", what, f"knows {name} {have}: its fused head can be replaced")
        except Exception as error:  # an optional package that is broken, or an unknown release
            remedy = f"pip install 'mmrpt[{name}]', or train with {name}'s own head: only the adapter needs it"
            yield Finding("note", what, f"{type(error).__name__}: {error}", remedy)


def check_assets() -> Iterator[Finding]:
    """The artwork of the drawn world and the rendered scenes are where the package expects them."""
    folder = Path(__file__).parent / "world" / "assets"
    wanted = ("fluent.png", "noto.png", "rendered/images.bin")
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        remedy = "install the package again; from a checkout: git checkout -- mmrpt/world/assets"
        yield Finding("bad", "artwork", f"no {', '.join(missing)} in {folder}", remedy)
    else:
        yield Finding("ok", "artwork", ", ".join(wanted))


# ---- operators on tiny cases: name -> function(backend, device, dtype) -> named results ----


def _head(device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """hidden, hidden_q (2, 12, 16), weight (97, 16), targets (2, 12); the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 12, 16, generator=generator)
    made = {
        "hidden": hidden,
        "hidden_q": hidden + 0.3 * torch.randn(2, 12, 16, generator=generator),
        "weight": torch.randn(97, 16, generator=generator),
    }
    targets = torch.randint(97, (2, 12), generator=generator)
    tensors = {name: value.to(device, dtype).requires_grad_(True) for name, value in made.items()}
    return tensors | {"targets": targets.to(device)}


def _gradients(loss: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wanted = [tensors["hidden"], tensors["weight"]]
    return dict(zip(("d_hidden", "d_weight"), torch.autograd.grad(loss, wanted), strict=True))


def _logprobs(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = _head(device, dtype)
    out = kernels.linear_logprobs(x["hidden"], x["weight"], x["targets"], return_entropy=True, backend=backend)
    loss = (out.logps + 0.1 * out.entropy).sum()
    return {"logps <= 0": out.logps, "entropy >= 0": out.entropy, **_gradients(loss, x)}


def _policy_loss(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = _head(device, dtype)
    mask = torch.ones(2, 12, dtype=torch.bool, device=device)
    advantages = torch.tensor([1.0, -0.5], device=device, dtype=dtype)
    out = kernels.linear_policy_loss(
        x["hidden"], x["weight"], x["targets"], advantages, response_mask=mask, backend=backend
    )
    return {"loss": out.loss, "logps <= 0": out.logps, **_gradients(out.loss, x)}


def _token_loss(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = _head(device, dtype)
    loss = kernels.linear_token_loss(
        x["hidden"], x["weight"], x["targets"], lambda logps, entropy, rows: 0.1 * entropy - logps, backend=backend
    )
    return {"loss": loss, **_gradients(loss, x)}


def _divergence(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = _head(device, dtype)
    out = kernels.linear_token_divergence(x["hidden"], x["hidden_q"], x["weight"], kind="kl", backend=backend)
    return {"divergence >= 0": out.divergence, **_gradients(out.divergence.sum(), x)}


def _attention_inputs(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q (1, 12, 4, 16), k and v (1, 12, 2, 16), key_weights (1, 12) bool with the first half visual."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, heads, 16, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    return q, k, v, torch.arange(12, device=device)[None] < 6


def _attention(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    out = kernels.attention_with_visual_mass(*_attention_inputs(device, dtype), backend=backend)
    return {"out": out.out, "mass in [0, 1]": out.mass, "lse": out.lse}


def _visual_mass(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    q, k, v, weights = _attention_inputs(device, dtype)
    lse = kernels.attention_with_visual_mass(q, k, v, weights, backend="reference").lse
    return {"mass in [0, 1]": kernels.visual_mass(q, k, lse, weights, backend=backend)}


def _perception(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    scores = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    mask = torch.arange(10, device=device) < torch.tensor([[10], [7], [3]], device=device)
    out = kernels.perception_weights(scores, mask, keep_ratio=0.4, scope="local", backend=backend)
    return {"kept": out.perception_mask.to(dtype), "trajectory weights": out.trajectory_weights}


CASES: dict[str, Callable[[str, torch.device, torch.dtype], dict[str, torch.Tensor]]] = {
    "attention": _attention,
    "visual_mass": _visual_mass,
    "logprobs": _logprobs,
    "policy_loss": _policy_loss,
    "token_loss": _token_loss,
    "divergence": _divergence,
    "perception": _perception,
}


def _broken_laws(results: dict[str, torch.Tensor]) -> list[str]:
    """The laws that the results' names state and their values break."""
    laws = {"<= 0": lambda x: x <= 0, ">= 0": lambda x: x >= 0, "in [0, 1]": lambda x: (x >= 0) & (x <= 1)}
    return [
        name
        for name, value in results.items()
        for law, holds in laws.items()
        if name.endswith(law) and not bool(holds(value).all())
    ]


def check_operator(op: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Finding:
    """One backend of one operator against the definition, by the error rule and the laws."""
    what = f"{op}, {backend}, {device.type}" + ("" if dtype == torch.float32 else ", bfloat16")
    remedy = f"report it, with this output; until then MMRPT_KERNELS_BACKEND=portable avoids {backend}"
    try:
        actual = CASES[op](backend, device, dtype)
        yardstick = CASES[op]("reference", device, dtype)
        truth = CASES[op]("reference", device, torch.float64)
        for name, value in actual.items():
            # Log-probabilities and gradients are sums of terms of size one: `floor` keeps rounding of those allowed.
            assert_close_to_truth(value, yardstick[name], truth[name].double(), name=name, dtype=dtype, floor=1.0)
    except Exception as error:  # whatever a broken backend raises belongs in the report
        return Finding("bad", what, f"{type(error).__name__}: {error}", remedy)
    broken = _broken_laws(actual)
    if broken:
        return Finding("bad", what, f"broken: {'; '.join(broken)}", remedy)
    return Finding("ok", what, "matches the definition")


def check_operators(devices: Sequence[torch.device]) -> Iterator[Finding]:
    """Every backend on each device but the definition itself, in float32 or, where it serves none, in bfloat16; the
    default is marked."""
    for device in devices:
        for op in OPERATORS:
            for backend in (name for name in BACKENDS if name != "reference"):
                for dtype in (torch.float32, torch.bfloat16):
                    try:
                        select(op, device=device, dtype=dtype, requested=backend)
                    except BackendError:
                        continue
                    finding = check_operator(op, backend, device, dtype)
                    default = select(op, device=device, dtype=dtype) == backend
                    mark = " [serves by default]" if default else ""
                    yield finding._replace(text=finding.text + mark)
                    break


def examine() -> Iterator[Finding]:
    """All findings, in the order of the report."""
    yield from check_machine()
    yield from check_packages(requirements(None), "pip install mmrpt")
    yield from check_packages(requirements("train"), "pip install 'mmrpt[train]'")
    yield from check_trainers()
    yield from check_assets()
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    yield from check_operators(devices)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmrpt.doctor", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    findings = []
    for finding in examine():
        findings.append(finding)
        mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[finding.state]
        print(f"{mark}  {finding.what:32s} {finding.text}" + (f"\n      -> {finding.remedy}" if finding.remedy else ""))
    print(f"\n{kernels.table()}\n")
    bad = sum(finding.state == "bad" for finding in findings)
    print("nothing is wrong" if bad == 0 else f"{bad} of {len(findings)} checks found something wrong: see BAD above")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
