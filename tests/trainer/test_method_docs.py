"""docs/method.md names code and settings that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from mmrpt.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
CODE = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", TEXT)))
GROUPS = "control|masking|prompts|warmup|rollout|reward|perception|rl"
SPANS = re.findall(r"`([^`\n]+)`", TEXT)
OVERRIDES = sorted({span for span in SPANS if re.match(rf"({GROUPS})\.\w+(=|$)", span)})


def definitions(path: Path) -> set[str]:
    """Names of the functions and classes at the top of a module."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)}


@pytest.mark.parametrize(("file", "name"), CODE)
def test_named_code_exists(file, name):
    path = ROOT / file if file.startswith("mmrpt_kernels/") else ROOT / "mmrpt" / file
    assert path.is_file() and name in definitions(path), f"docs/method.md names {file}:{name}"


@pytest.mark.parametrize("span", OVERRIDES)
def test_named_settings_exist(span):
    """A setting by name, or overrides as they would be typed."""
    settings = load_settings(None, [item for item in span.split() if "=" in item])
    for item in span.split():
        group, _, name = item.partition("=")[0].partition(".")
        assert hasattr(getattr(settings, group), name), f"docs/method.md names {item}"


def test_the_document_names_the_whole_method():
    """The patterns above find what the document holds: an empty list would pass."""
    assert len(CODE) > 25 and len(OVERRIDES) > 40
    assert ".py:" not in re.sub(r"`[\w/]+\.py:\w+`", "", TEXT)
