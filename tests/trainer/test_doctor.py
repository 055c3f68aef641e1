"""The doctor: what it passes, and that it finds each thing it looks for."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmrpt import doctor
from mmrpt_kernels.backends import OPERATORS

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")


def test_a_sound_installation_passes() -> None:
    done = subprocess.run([sys.executable, "-m", "mmrpt.doctor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("nothing is wrong") and "BAD" not in done.stdout
    for op in OPERATORS:
        assert f"{op}, portable, cpu" in done.stdout
    assert "[serves by default]" in done.stdout


def test_every_operator_has_a_case() -> None:
    assert set(doctor.CASES) == set(OPERATORS)


def test_requirements_are_those_of_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.requirements(None)["torch"] == ("2.11", None)
    installed = doctor.requirements("train")

    def not_installed(name: str):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", not_installed)
    from_checkout = doctor.requirements("train")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(from_checkout) == len(project["optional-dependencies"]["train"])
    assert from_checkout["transformers"] == ("4.57", "6")
    assert set(installed) <= set(from_checkout) | {"mmrpt"}


@pytest.mark.parametrize(
    ("have", "state"),
    [("4.57.1", "ok"), ("5.17.0", "ok"), ("4.56.9", "bad"), ("6.0.0", "bad"), ("4.57", "ok"), (None, "bad")],
)
def test_versions_outside_a_range_are_found(monkeypatch: pytest.MonkeyPatch, have: str | None, state: str) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: have)
    (finding,) = doctor.check_packages({"transformers": ("4.57", "6")}, "pip install 'mmrpt[train]'")
    assert finding.state == state
    if state == "bad":
        assert ">=4.57,<6" in finding.text and finding.remedy.startswith("pip install")


def test_a_full_disk_and_idle_cores_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 8)
    findings = {finding.what: finding for finding in doctor.check_machine()}
    assert findings["disk"].state == "bad" and "output=" in findings["disk"].remedy
    assert findings["threads"].state == "note" and "OMP_NUM_THREADS" in findings["threads"].remedy


def test_a_missing_extension_is_only_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "build_info", lambda: {"built": False, "reason": "no such file"})
    findings = {finding.what: finding for finding in doctor.check_machine()}
    assert findings["extension"].state == "note" and "setup.py build_ext" in findings["extension"].remedy


def test_a_backend_that_changes_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = doctor.CASES["logprobs"]

    def off(backend: str, device: torch.device, dtype: torch.dtype):
        results = honest(backend, device, dtype)
        if backend == "portable":
            results["d_weight"] = results["d_weight"] * 1.001
        return results

    monkeypatch.setitem(doctor.CASES, "logprobs", off)
    finding = doctor.check_operator("logprobs", "portable", CPU)
    assert (
        finding.state == "bad" and "d_weight: max error" in finding.text and "MMRPT_KERNELS_BACKEND" in finding.remedy
    )


def test_a_positive_log_probability_is_found_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def positive(backend: str, device: torch.device, dtype: torch.dtype):
        return {"logps <= 0": torch.tensor([-1.0, 1e-9 if backend == "portable" else 0.0], dtype=dtype)}

    monkeypatch.setitem(doctor.CASES, "logprobs", positive)
    finding = doctor.check_operator("logprobs", "portable", CPU)
    assert finding.state == "bad" and finding.text == "broken: logps <= 0"


def test_a_backend_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(backend: str, device: torch.device, dtype: torch.dtype):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(doctor.CASES, "perception", raises)
    finding = doctor.check_operator("perception", "portable", CPU)
    assert finding.state == "bad" and finding.text == "RuntimeError: no kernel image"


def test_something_wrong_means_exit_code_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    found = [doctor.Finding("ok", "torch", "2.13.0"), doctor.Finding("bad", "disk", "0.0 GiB free", "free some")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "-> free some" in printed and "1 of 2 checks found something wrong" in printed


def test_the_adapters_are_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    assert {f.what: f.state for f in doctor.check_trainers()} == {"adapter of trl": "note", "adapter of verl": "note"}

    def adapter(name: str) -> SimpleNamespace:
        def refuse():
            raise RuntimeError("verl: got 0.4, expected >=0.9,<0.10")

        return SimpleNamespace(fused_head=nullcontext if name.endswith(".trl") else refuse)

    monkeypatch.setattr(doctor, "_installed", lambda name: "1.16.0" if name == "trl" else "0.4")
    monkeypatch.setattr(doctor.importlib, "import_module", adapter)
    known, unknown = doctor.check_trainers()
    assert known.state == "ok" and "knows trl 1.16.0" in known.text
    assert unknown.state == "note" and "got 0.4" in unknown.text and "mmrpt[verl]" in unknown.remedy
