"""What a newcomer's machine meets: the wheel, imports without optional parts, the extension, set-up, make targets."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from scripts import bootstrap, constraints, gpu, versions

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

needs_builder = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")


# ---- pyproject.toml and the wheel ----


def test_one_version_everywhere() -> None:
    import mmrpt
    import mmrpt_kernels

    assert mmrpt.__version__ == mmrpt_kernels.__version__ == PROJECT["version"]
    assert f"[{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_core_needs_torch_and_numpy_alone() -> None:
    assert sorted(requirement.split(">")[0] for requirement in PROJECT["dependencies"]) == ["numpy", "torch"]
    assert {"train", "dev", "bench", "trl", "verl"} <= set(PROJECT["optional-dependencies"])


def test_what_mmrpt_imports_is_in_its_extras() -> None:
    """Every third-party import at the top of a module of mmrpt is a dependency of the core or of `train`."""
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    allowed = set(sys.stdlib_module_names) | {"mmrpt", "mmrpt_kernels"}
    required = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"]
    packages = {requirement.split(">")[0] for requirement in required}
    for path in sorted((ROOT / "mmrpt").rglob("*.py")):
        if path.parent.name == "integrations" or path.name == "trl.py":
            continue  # adapters and engines are imported on demand, with the extra of their name
        for node in ast.parse(path.read_text()).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.append(node.module)
            for top in {module.split(".")[0] for module in modules}:
                known = top in allowed or names.get(top, top) in packages
                assert known, f"{path.relative_to(ROOT)} imports {top}, which the extra `train` does not install"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without the extension from a copy, so that the working tree stays clean."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("mmrpt", "mmrpt_kernels", "csrc", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(target), "."]
    built = subprocess.run(
        command, cwd=source, env=os.environ | {"MMRPT_BUILD_CSRC": "0"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return zipfile.ZipFile(next(target.glob("mmrpt-*.whl")))


def test_the_wheel_holds_both_packages_and_the_assets(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("mmrpt", "mmrpt_kernels"):
        modules = {str(p.relative_to(ROOT)) for p in (ROOT / package).rglob("*.py") if "__pycache__" not in p.parts}
        assert modules <= names, sorted(modules - names)
    assets = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mmrpt/world/assets").rglob("*") if p.is_file()}
    assert assets <= names and len([name for name in assets if name.endswith(".png")]) >= 2, sorted(assets - names)
    notices = "".join(wheel.read(name).decode() for name in assets if Path(name).suffix in ("", ".md", ".txt"))
    assert "Apache" in notices and "MIT" in notices, "the artworks' licences must stand beside them"
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "scripts/", "csrc/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_installs_the_commands(wheel: zipfile.ZipFile) -> None:
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "mmrpt-train = mmrpt.train:main" in wheel.read(entry).decode()
    for target in PROJECT["scripts"].values():
        module, function = target.split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def test_importing_the_operators_needs_none_of_the_optional_parts() -> None:
    blocked = ("triton", "transformers", "trl", "verl", "datasets", "PIL", "matplotlib", "pydantic", "mmrpt_kernels._C")
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {blocked}):
            raise ImportError(f"blocked: {{name}}")
sys.meta_path.insert(0, Block())
import torch
import mmrpt_kernels
from mmrpt_kernels.common.extension import build_info, extension
assert extension() is None and "blocked" in build_info()["reason"], build_info()
mask = torch.ones(1, 4, dtype=torch.bool)
kept = mmrpt_kernels.perception_weights(torch.arange(4.0)[None], mask, keep_ratio=0.5).perception_mask
assert kept.tolist() == [[False, False, True, True]], kept
assert "mmrpt" not in sys.modules, "operators must not know the method"
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


# ---- the extension (its row kernels: tests/kernels/lm_head/test_row_softmax_cuda.py) ----


def build_copy(folder: Path, mode: str, more: dict[str, str] | None = None, **variables: str):
    """setup.py build_ext --inplace in a copy of what it needs; `more` adds or replaces files of the copy."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    for name, text in {"mmrpt_kernels/__init__.py": "", **(more or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    environment = os.environ | {"MMRPT_BUILD_CSRC": mode} | variables
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("mode", "code"), [("auto", 0), ("1", 1)])
def test_a_failing_compiler_is_a_warning_unless_the_build_was_asked_for(mode: str, code: int, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    done = build_copy(tmp_path, mode, CC="/bin/false", CXX="/bin/false", MMRPT_CUDA_ARCHITECTURES="90")
    assert done.returncode == code, done.stderr
    assert "mmrpt_kernels._C" in done.stderr or code, done.stderr
    assert not list((tmp_path / "mmrpt_kernels").glob("*.so"))


def test_a_build_switched_off_or_misspelt(tmp_path: Path) -> None:
    assert build_copy(tmp_path / "off", "0").returncode == 0
    assert not list((tmp_path / "off/mmrpt_kernels").glob("*.so"))
    done = build_copy(tmp_path / "wrong", "yes")
    assert done.returncode != 0 and "expected auto, 0 or 1" in done.stderr


@needs_builder
def test_without_nvcc_the_host_versions_are_built_unless_all_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    done = build_copy(tmp_path / "auto", "auto", CUDA_HOME="/nonexistent")
    assert done.returncode == 0 and "no nvcc" in done.stderr, done.stderr
    code = "from mmrpt_kernels import _C; print([_C.build_info()['cuda_architectures'], hasattr(_C, 'row_softmax')])"
    loaded = python(code, PYTHONPATH=str(tmp_path / "auto"))
    assert loaded.stdout.strip() == "['', True]", loaded.stderr
    arguments = "'statistics', 'float32', [0] * 5, [1] * 4, False, 16.0, [1.0] * 3, False, (0, 0)"
    call = f"from mmrpt_kernels import _C; _C.row_softmax({arguments})"
    assert "no CUDA sources" in python(call, PYTHONPATH=str(tmp_path / "auto")).stderr
    done = build_copy(tmp_path / "all", "1", CUDA_HOME="/nonexistent")
    assert done.returncode != 0 and "no nvcc" in done.stderr, done.stderr


@needs_builder
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_a_cuda_source_is_compiled_and_linked(tmp_path: Path) -> None:
    """A .cu file beside the bindings ends up in the module, which loads on a machine without a GPU or driver."""
    pytest.importorskip("pybind11")
    bindings = (ROOT / "csrc/bindings.cpp").read_text()
    bindings = bindings.replace("namespace {", "int cuda_runtime_version();\nnamespace {", 1)
    bindings = bindings.replace("py::dict info;", 'py::dict info;\n  info["runtime"] = cuda_runtime_version();', 1)
    probe = """
#include <cuda_runtime.h>
__global__ void nothing() {}
int cuda_runtime_version() { int v = 0; cudaRuntimeGetVersion(&v); return v; }
"""
    more = {"csrc/bindings.cpp": bindings, "csrc/probe/probe.cu": probe}
    done = build_copy(tmp_path, "1", more, MMRPT_CUDA_ARCHITECTURES="90")
    assert done.returncode == 0, done.stderr
    code = "from mmrpt_kernels import _C; i = _C.build_info(); assert i['runtime'] > 0; print(i['cuda_architectures'])"
    loaded = python(code, PYTHONPATH=str(tmp_path))
    assert loaded.stdout.strip() == "90", loaded.stderr


# ---- set-up: scripts/bootstrap.py ----


class FakeEnvironment:
    """Stands for bootstrap.Environment: remembers what pip was asked; `failing` requirements end with an error."""

    def __init__(self, would_install: list[str], failing: tuple[str, ...] = ()) -> None:
        self.report = {"install": [{"metadata": {"name": name}} for name in would_install]}
        self.failing = failing
        self.asked: list[tuple[str, ...]] = []

    def would_install(self, requirement: str) -> dict:
        self.asked.append(("dry run", requirement))
        return self.report

    def pip(self, *arguments: str) -> int:
        self.asked.append(arguments)
        return int(any(word in arguments for word in self.failing))


PIN = f"torch=={bootstrap.TORCH_PIN}"
CUDA_BUILD = ["torch", "sympy", "nvidia-cublas", "nvidia-cudnn-cu13", "triton", "cuda-bindings"]


def test_a_machine_with_a_gpu_takes_the_plain_release() -> None:
    env = FakeEnvironment(CUDA_BUILD)
    bootstrap.install_torch(env, gpu=True, index="an-index", pins={})
    assert env.asked == [("install", PIN)]


def test_a_cpu_build_at_hand_is_taken() -> None:
    env = FakeEnvironment(["torch", "sympy", "filelock"])
    bootstrap.install_torch(env, gpu=False, index="an-index", pins={})
    assert env.asked == [("dry run", PIN), ("install", PIN)]


def test_without_a_gpu_the_named_index_keeps_cuda_packages_away() -> None:
    env = FakeEnvironment(CUDA_BUILD)
    bootstrap.install_torch(env, gpu=False, index="an-index", pins={})
    # What torch needs comes from where pip looks else: that index may lack the pinned releases.
    assert env.asked == [("dry run", PIN), ("install", "--no-deps", PIN, "--index-url", "an-index"), ("install", PIN)]


@pytest.mark.parametrize("index", [None, "an-index"])
def test_without_a_cpu_build_it_says_so_and_goes_on(index: str | None, capsys: pytest.CaptureFixture) -> None:
    env = FakeEnvironment(CUDA_BUILD, failing=("an-index",))
    bootstrap.install_torch(env, gpu=False, index=index, pins={})
    assert env.asked[-1] == ("install", PIN)
    said = capsys.readouterr().out
    assert "4 CUDA packages" in said and "set MMRPT_TORCH_INDEX" in said


def test_a_failing_pip_ends_the_set_up() -> None:
    with pytest.raises(SystemExit, match="pip could not install torch=="):
        bootstrap.install_torch(FakeEnvironment(["torch"], failing=(PIN,)), gpu=False, index=None, pins={})


# ---- pinned versions: constraints.txt ----


def test_every_requirement_is_pinned_inside_its_range() -> None:
    pins = bootstrap.pins_of(bootstrap.CONSTRAINTS)
    wanted = [Requirement(line) for line in constraints.requirements(*constraints.EXTRAS) + constraints.builders()]
    assert len(wanted) > 20
    for requirement in wanted:
        pin = pins[bootstrap.plain(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement}: pinned to {pin}"


def test_pins_are_exact_and_said_once(tmp_path: Path) -> None:
    lines = [line for line in bootstrap.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names)) == list(bootstrap.pins_of(bootstrap.CONSTRAINTS))
    (tmp_path / "loose.txt").write_text("numpy>=2\n")
    with pytest.raises(SystemExit, match="expected lines 'name==version' and comments, got 'numpy>=2'"):
        bootstrap.pins_of(tmp_path / "loose.txt")


def test_pip_is_kept_to_the_pins() -> None:
    seen = {}

    class Reading(FakeEnvironment):
        def pip(self, *arguments: str) -> int:
            file = Path(arguments[arguments.index("--constraint") + 1])
            seen[arguments[-1]] = file.read_text().split()
            return 0

    bootstrap.install_torch(
        Reading(["torch"]), gpu=False, index=None, pins={"torch": "9.9", "sympy": "1", "triton": "3"}
    )
    assert seen == {"torch==9.9": ["torch==9.9", "sympy==1"]}, "a CUDA build brings its own triton"


def test_another_torch_chooses_what_it_needs() -> None:
    pins = {"torch": "2.13.0", "triton": "3.6.0", "sympy": "1.14.0", "trl": "1.16.0"}
    same = bootstrap.pins_beside("2.13.0+cpu", None, {"sympy"}, pins)
    assert same == pins | {"torch": "2.13.0+cpu"}
    other = bootstrap.pins_beside("2.12.1", "3.5.0", {"sympy"}, pins)
    assert other == {"torch": "2.12.1", "triton": "3.5.0", "trl": "1.16.0"}


def test_constraints_are_written_from_pips_report() -> None:
    entries = [("huggingface_hub", "2.0"), ("accelerate", "1.15.0")]
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in entries]}
    text = constraints.text_of(constraints.versions_in(report), {"torch": "2.13.0"})
    assert text == constraints.HEAD + "accelerate==1.15.0\nhuggingface-hub==2.0\ntorch==2.13.0\n"


# ---- the oldest and the newest versions: scripts/versions.py ----


def test_the_oldest_release_of_a_range() -> None:
    have = ["5.2.0", "4.57.10", "4.57.9", "4.56.0"]
    assert versions.oldest("transformers>=4.57,<6", have) == "transformers==4.57.9"
    with pytest.raises(constraints.Unresolved, match="no release for 'trl>=9'; it has 5.2.0"):
        versions.oldest("trl>=9", have)


REPORT = """<testsuites><testsuite>
<testcase classname="tests.a.test_one" name="test_x"/>
<testcase classname="tests.a.test_one" name="test_y"><failure message="m"/></testcase>
<testcase classname="tests.a.test_two" name="test_z"><skipped message="could not import 'requests'"/></testcase>
<testcase classname="" name="tests.a.test_three"><skipped message="collection skipped">('three.py', 9, 'Skipped:
transformers 4 asks accelerate for FSDP in a way')</skipped></testcase>
<testcase classname="" name="tests.a.test_four"><skipped message="collection skipped">no trl</skipped></testcase>
</testsuite></testsuites>"""


def test_a_file_of_which_nothing_ran_fails_its_combination(tmp_path: Path) -> None:
    (tmp_path / "results.xml").write_text(REPORT)
    outcome = versions.Outcome("oldest")
    files = [f"tests/a/test_{name}.py" for name in ("one", "two", "three", "four")]
    versions.read_results(outcome, tmp_path / "results.xml", files)
    assert (outcome.passed, outcome.failed, outcome.ok) == (1, ["tests.a.test_one::test_y"], False)
    assert outcome.problem == "no test ran of tests/a/test_two.py, tests/a/test_four.py"
    shown = versions.table([outcome])
    assert "oldest: FAILED tests.a.test_one::test_y" in shown and "skipped 1: could not import 'requests'" in shown


def test_a_combination_that_cannot_be_made_fails_by_name(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(*_, **__):
        raise constraints.Unresolved("no release of trl suits transformers 4.57")

    monkeypatch.setattr(versions, "resolve", refuse)
    assert versions.main(["newest"]) == 1
    assert "newest: could not be made: no release of trl suits transformers 4.57" in capsys.readouterr().out


def test_the_versions_tests_exist() -> None:
    assert len(versions.test_files()) >= len(versions.TESTS)


@pytest.mark.parametrize(
    ("version", "enough"),
    [
        ("2.13.0+cpu", True),
        ("2.11", True),
        ("2.11.0+cu130", True),
        ("3.0.0", True),
        ("2.10.1", False),
        ("2.9.0", False),
        ("2.11.0a0+git1", False),
        ("2.11.0rc1", False),
        ("2.12.0a0+nv26", True),
        (None, False),
    ],
)
def test_which_torch_is_used_as_it_is(version: str | None, enough: bool) -> None:
    assert bootstrap.satisfies(version, "2.11") is enough


def test_the_pin_satisfies_the_range() -> None:
    assert bootstrap.satisfies(bootstrap.TORCH_PIN, bootstrap.torch_floor())


def test_an_old_python_is_told_so() -> None:
    """Its syntax lets interpreters of years ago read as far as the message."""
    source = (ROOT / "scripts/bootstrap.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    head = source[: source.index("import argparse")].replace("(3, 11)", "(99, 0)")
    done = python(head)
    assert done.returncode == 1 and "needs Python 3.11 or newer" in done.stderr and "PYTHON=" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="is no virtual environment"):
        bootstrap.Environment(tmp_path).make(sees_caller=False)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


# ---- make ----


def make(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def test_make_gpu_installs_nothing_and_uses_the_plain_python() -> None:
    shown = make("-n", "gpu", "RESULTS=elsewhere").stdout
    assert "PYTHONPATH=. python3 scripts/gpu.py --results elsewhere --budget" in shown
    assert "pip" not in shown and ".venv" not in shown


def test_a_second_set_up_is_instant(tmp_path: Path) -> None:
    """With the stamps in place, demo and test go straight to their commands."""
    for stamp in (".stamp-train", ".stamp-dev"):
        (tmp_path / stamp).touch()
    for target, command in (("demo", "-m mmrpt.train"), ("test", "-m pytest")):
        shown = make("-n", target, f"VENV={tmp_path}").stdout
        assert command in shown and "bootstrap.py" not in shown
    os.utime(tmp_path / ".stamp-train", (0, 0))
    assert "bootstrap.py" in make("-n", "demo", f"VENV={tmp_path}").stdout


def test_ci_runs_what_a_newcomer_runs() -> None:
    script = ROOT / ".ci/run"
    commands = [line for line in script.read_text().splitlines() if line.startswith("make")]
    assert os.access(script, os.X_OK) and commands[0] == "make test"
    assert commands[1].startswith('make test-versions ARGS="newest --if-new')


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_make_gpu_says_what_it_needs() -> None:
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU, torch and triton.*make test"):
        gpu.find_gpu()


def test_gpu_parts_that_hang_are_stopped_with_their_children(tmp_path: Path) -> None:
    code, output, seconds = gpu.run(["sh", "-c", "echo begun; sleep 60 & wait"], limit=1.0, log=tmp_path / "log")
    assert code == 124 and seconds < 10 and "begun" in output and (tmp_path / "log").read_text() == output


@pytest.mark.parametrize(
    ("code", "output", "ok", "summary"),
    [
        (0, "....\n==== 4 passed, 2 skipped in 3.2s ====\n", True, "4 passed, 2 skipped in 3.2s"),
        (5, "no tests ran in 0.1s\n", True, "no GPU test was selected"),
        (1, "E boom\n==== 1 failed, 3 passed in 3.2s ====\n", False, "exit 1: ==== 1 failed, 3 passed in 3.2s"),
        (124, "....\n", False, "stopped at its limit: ...."),
    ],
)
def test_gpu_tests_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, output: str, ok: bool, summary: str
) -> None:
    monkeypatch.setattr(gpu, "gpu_test_files", lambda: ["tests/test_x.py"])
    monkeypatch.setattr(gpu, "run", lambda command, limit, log: (code, output, 1.0))
    part = gpu.run_tests(tmp_path, 10.0)
    assert part.ok is ok and part.summary.startswith(summary)


def test_the_sanitizer_is_a_part_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It takes minutes: the other tests do not wait for it, nor does it take their time."""
    assert any(path.endswith(gpu.SANITIZER_TEST) for path in gpu.gpu_test_files())
    ran = []
    monkeypatch.setattr(
        gpu, "run", lambda command, limit, log: (ran.append((command, log.name)), (0, "1 passed", 1.0))[1]
    )
    monkeypatch.setattr(gpu, "gpu_test_files", lambda: ["tests/test_x.py", f"tests/{gpu.SANITIZER_TEST}"])
    parts = [gpu.run_tests(tmp_path, 10.0, sanitizer=sanitizer) for sanitizer in (False, True)]
    assert [part.name for part in parts] == ["tests", "sanitizer"]
    files = [[word for word in command if word.startswith("tests/")] for command, _ in ran]
    assert files == [["tests/test_x.py"], [f"tests/{gpu.SANITIZER_TEST}"]]
    assert [log for _, log in ran] == ["gpu-tests.log", "gpu-sanitizer.log"]


def test_only_files_that_name_the_mark_are_collected(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/test_a.py").write_text("@pytest.mark.gpu\ndef test(): ...")
    (tmp_path / "kernels/test_b.py").write_text("import what_is_not_there")
    (tmp_path / "kernels/test_c.py").write_text("from tests.kernels.devices import on_devices")
    assert gpu.gpu_test_files(tmp_path) == [str(tmp_path / f"kernels/test_{letter}.py") for letter in "ac"]


def test_one_failing_gpu_part_fails_the_run_but_not_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "find_gpu", lambda: "a GPU")
    monkeypatch.setattr(gpu, "build_extension", lambda: None)
    monkeypatch.setattr(gpu, "run_tests", lambda results, limit, **_: gpu.Part("tests", False, 1.0, "1 failed"))
    done = gpu.Part("benchmarks", True, 2.0, "all done")
    monkeypatch.setattr(gpu, "run_benchmarks", lambda results, limit: (done, "| a table |"))
    assert gpu.main(["--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.index("| a table |") < printed.index("| tests | FAILED |") < printed.index("| benchmarks | ok |")
    assert (tmp_path / "gpu-summary.json").exists()
