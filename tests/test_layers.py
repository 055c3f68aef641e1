"""The import law of the two packages, checked on the source text of whatever modules exist.

mmrpt_kernels: never imports mmrpt. In an operator api -> {reference, portable, triton, cuda, helpers} -> lm_head ->
common; lm_head, which operators share, imports none of them. A module with a backend's word in its name belongs to that
backend: those of two backends never import each other, and of the others x.py alone may import x_<backend>.py. The one
sideways arrow between operators is policy_loss -> logprobs.
mmrpt: command line -> engines -> rooms -> types, settings; only a few modules import mmrpt_kernels. corpus imports
types alone, and no torch.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = ("attention", "logprobs", "policy_loss", "divergence", "perception")
IMPLEMENTATIONS = ("reference", "portable", "triton", "cuda", "sdpa", "flash_attn")
SIDEWAYS = {("policy_loss", "logprobs")}
SHARED = "lm_head"
BACKENDS_USERS = ("api", None, "options")  # who asks the table: an operator's api, and lm_head's options for three
ALLOWED_FOREIGN = {"torch", "triton"}  # mmrpt_kernels depends on these alone, integrations apart
# The modules of mmrpt that may know the kernels.
KERNEL_USERS = ("objective", "perception", "policy", "memory", "masking", "integrations", "doctor")
# Who may import whom in mmrpt: a lower rank never imports a higher one.
COMMAND_LINE = ("train", "mask", "evaluate", "export", "command_line", "experiments")
ENGINES = ("engines",)
HEAVY = ("torch", "transformers")  # slow to import; reading a corpus needs neither


def imports_of(path: Path, package: str) -> list[tuple[str, int]]:
    """(absolute module name, line) of every import in a file; `from a import b` counts as a and as a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join(parts + ([node.module] if node.module else []))
            found.append((base, node.lineno))
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module under a package."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def edges(root: Path, package: str) -> list[tuple[str, str, str]]:
    """(importing module, imported module or attribute, "file:line") for a whole package."""
    result = []
    for name, path in modules(root, package).items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        result += [(name, target, f"{path.relative_to(root)}:{line}") for target, line in imports_of(path, inside)]
    return result


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def operator_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "mmrpt_kernels" and len(parts) > 1 and parts[1] in (*OPERATORS, SHARED) else None


def backend_of(part: str | None) -> str | None:
    """The backend that a module belongs to by its name: "triton" for triton_forward, row_softmax_triton and triton/."""
    return next((word for word in (part or "").split("_") if word in IMPLEMENTATIONS), None)


def part_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[2] if len(parts) > 2 else None


def kernel_violations(root: Path) -> list[str]:
    wrong = []
    for source, target, where in edges(root, "mmrpt_kernels"):
        source_op, target_op = operator_of(source), operator_of(target)
        top = target.split(".")[0]
        if within(target, "mmrpt"):
            wrong.append(f"{where}: mmrpt_kernels imports mmrpt ({target})")
        elif top not in sys.stdlib_module_names | ALLOWED_FOREIGN | {"mmrpt_kernels"} and not within(
            source, "mmrpt_kernels.integrations"
        ):
            wrong.append(
                f"{where}: mmrpt_kernels imports {top}; it depends on torch alone, and on triton where it exists"
            )
        elif source_op is not None:
            wrong += [f"{where}: {why}" for why in operator_violations(source, source_op, target, target_op)]
        elif within(source, "mmrpt_kernels.common") and within(target, "mmrpt_kernels"):
            below = within(target, "mmrpt_kernels.common") or target == "mmrpt_kernels"
            wrong += [] if below else [f"{where}: common imports {target}; common is the bottom"]
    return sorted(set(wrong))


def operator_violations(source: str, source_op: str, target: str, target_op: str | None) -> list[str]:
    source_part, target_part = part_of(source), part_of(target)
    if target_op is None:
        upward = within(target, "mmrpt_kernels") and not within(target, "mmrpt_kernels.common")
        upward = upward and target != "mmrpt_kernels"  # `from mmrpt_kernels import x` also yields mmrpt_kernels.x
        if upward and not (source_part in BACKENDS_USERS and within(target, "mmrpt_kernels.backends")):
            return [f"{source} imports {target}; an operator imports lm_head and common, and its api also backends"]
        return []
    if target_op != source_op:
        if source_op == SHARED:
            return [f"lm_head imports operator {target_op}, which imports it"]
        allowed = target_op == SHARED or (source_op, target_op) in SIDEWAYS
        return [] if allowed else [f"operator {source_op} imports operator {target_op}"]
    if source_part in ("api", None):
        return []
    if target_part == "api":
        return [f"{source} imports its own api; arrows point down"]
    source_backend, target_backend = backend_of(source_part), backend_of(target_part)
    if source_backend is None and target_backend is not None:
        own = target_part == f"{source_part}_{target_backend}"
        return [] if own else [f"helper {source_part} imports implementation {target_part}; helpers lie below"]
    if target_backend not in (None, source_backend):
        return [f"implementation {source_part} imports implementation {target_part}"]
    return []


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "mmrpt" and len(parts) > 1 else None


def rank(room: str | None) -> int:
    """Height in mmrpt: 3 command line, 2 engines, 1 rooms, 0 types and settings."""
    if room in COMMAND_LINE:
        return 3
    if room in ENGINES:
        return 2
    return 0 if room in ("types", "settings") else 1


def trainer_violations(root: Path) -> list[str]:
    wrong = []
    known = {room_of(name) for name in modules(root, "mmrpt")}
    for source, target, where in edges(root, "mmrpt"):
        room = room_of(source)
        if within(target, "mmrpt_kernels") and room not in KERNEL_USERS:
            wrong.append(f"{where}: {source} imports mmrpt_kernels; only {', '.join(KERNEL_USERS)} do")
        target_room = room_of(target)
        if room == "corpus" and (target.split(".")[0] in HEAVY or target_room not in (None, "corpus", "types")):
            wrong.append(f"{where}: {source} imports {target}; corpus reads files, with types alone below it")
        if room is None or target_room is None or target_room not in known or room == target_room:
            continue
        if rank(target_room) > rank(room) and room != "integrations":
            wrong.append(f"{where}: {source} imports {target}; arrows point down: train -> engines -> rooms -> types")
    return sorted(set(wrong))


def test_mmrpt_kernels_obeys_the_import_law():
    assert modules(ROOT, "mmrpt_kernels"), "no modules found: the check would pass for nothing"
    assert not (wrong := kernel_violations(ROOT)), "\n".join(wrong)


def test_mmrpt_obeys_the_import_law():
    assert not (wrong := trainer_violations(ROOT)), "\n".join(wrong)


BREACHES = {
    "mmrpt_kernels/logprobs/api.py": "from mmrpt.types import Batch",
    "mmrpt_kernels/logprobs/portable.py": "from mmrpt_kernels.logprobs.reference import logprobs",
    "mmrpt_kernels/divergence/portable.py": "import mmrpt_kernels.logprobs.portable",
    "mmrpt_kernels/divergence/reference.py": "from . import api",
    "mmrpt_kernels/perception/portable.py": "from mmrpt_kernels.backends import select",
    "mmrpt_kernels/common/dtypes.py": "from mmrpt_kernels.lm_head.gemm import logits",
    "mmrpt_kernels/lm_head/chunk_loop.py": "from mmrpt_kernels.logprobs.fused import forward",
    "mmrpt_kernels/lm_head/gemm.py": "from mmrpt_kernels.backends import select",
    "mmrpt_kernels/lm_head/row_softmax_triton.py": "from .row_softmax_portable import statistics",
    "mmrpt_kernels/lm_head/head_gradients.py": "from . import row_softmax_cuda",
    "mmrpt_kernels/logprobs/fused.py": "from mmrpt_kernels.policy_loss.surrogate import token_losses",
    "mmrpt_kernels/divergence/triton_forward.py": "from .pair_softmax_portable import statistics",
    "mmrpt_kernels/common/checks.py": "def f():\n    from mmrpt_kernels.attention import visual_mass",
    "mmrpt_kernels/attention/stream.py": "from .portable import forward",
    "mmrpt_kernels/backends.py": "import numpy",
    "mmrpt/rollout/sample.py": "from mmrpt_kernels import linear_logprobs",
    "mmrpt/types.py": "from .rollout import sample",
    "mmrpt/settings/demo.py": "from mmrpt.rollout import sample",
    "mmrpt/rewards/exact.py": "from mmrpt import engines",
    "mmrpt/engines/native.py": "from mmrpt.train import main",
    "mmrpt/corpus/images.py": "def f():\n    import torch.nn",
    "mmrpt/corpus/open.py": "from mmrpt.masking import sentences",
}
LAWFUL = {
    "mmrpt_kernels/policy_loss/fused.py": "from mmrpt_kernels.logprobs import fused\nfrom . import surrogate",
    "mmrpt_kernels/policy_loss/scale_gradients.py": "def f():\n    from .scale_gradients_triton import scale",
    "mmrpt_kernels/divergence/pair_softmax_triton.py": "from . import pair_softmax, triton_forward",
    "mmrpt_kernels/divergence/fused.py": "from mmrpt_kernels.lm_head.chunk_loop import chunk_loop",
    "mmrpt_kernels/lm_head/options.py": "from mmrpt_kernels import backends\nfrom .vocab_parallel import Shard",
    "mmrpt_kernels/attention/api.py": "from . import portable, reference\nfrom mmrpt_kernels.backends import select",
    "mmrpt_kernels/attention/portable.py": "import math\nfrom ..common.checks import check",
    "mmrpt_kernels/integrations/trl.py": "import trl\nfrom mmrpt_kernels import linear_logprobs",
    "mmrpt/objective.py": "from mmrpt_kernels import linear_policy_loss\nfrom .types import Batch",
    "mmrpt/train.py": "from mmrpt.engines import native\nimport numpy",
    "mmrpt/engines/native.py": "",
    "mmrpt/types.py": "",
    "mmrpt/settings/demo.py": "import pydantic",
    "mmrpt/rollout/__init__.py": "",
    "mmrpt/masking/__init__.py": "",
    "mmrpt/corpus/rows.py": "from mmrpt.corpus.files import parse_object\nfrom mmrpt.types import Example",
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_seen(tmp_path, breach):
    for name, text in {**LAWFUL, breach: BREACHES[breach]}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = kernel_violations(tmp_path) + trainer_violations(tmp_path)
    assert found and all(breach in line for line in found), found


def test_lawful_imports_pass(tmp_path):
    for name, text in LAWFUL.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert kernel_violations(tmp_path) + trainer_violations(tmp_path) == []
