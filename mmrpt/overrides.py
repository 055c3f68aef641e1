"""What a settings file and `a.b.c=value` overrides say, as nested groups, and how that goes over other groups.

Nothing here knows which settings there are: `mmrpt.config` does, and checks what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


class SettingsError(ValueError):
    """A setting that cannot work: the message says which, what was expected and how to mend it."""


def given_settings(file: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What the YAML file and the overrides say, as nested groups without defaults, unchecked."""
    tree: Any = {}
    if file is not None:
        try:
            tree = yaml.safe_load(Path(file).read_text()) or {}
        except OSError as error:
            raise SettingsError(f"cannot read the settings file {file}: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise SettingsError(f"{file} is not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise SettingsError(f"{file} holds a {type(tree).__name__}, expected a mapping of settings.")
    for override in overrides:
        tree = _override(tree, override)
    return tree


def merged(base: Any, given: Any) -> Any:
    """`given` over `base`: groups name by name, everything else whole. Neither is changed."""
    if not (isinstance(base, dict) and isinstance(given, dict)):
        return given
    return {**base, **{name: merged(base.get(name), value) for name, value in given.items()}}


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    key, found, text = override.partition("=")
    path = key.strip().lstrip("-").split(".")
    if not found or not all(path):
        raise SettingsError(f"override {override!r}: expected key=value, for example rl.steps=50.")
    group: Any = tree
    for name in path[:-1]:
        group = group.get(name, {})
        if not isinstance(group, dict):
            raise SettingsError(f"override {override!r}: {name!r} holds a plain value, not a group of settings.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"override {override!r}: the value is not valid YAML ({error}).") from error
    for name in reversed(path):
        value = {name: value}
    return merged(tree, value)
