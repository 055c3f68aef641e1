"""Every setting with its default and one line of help, in the order of the groups."""

from __future__ import annotations

import dataclasses
from textwrap import wrap
from typing import Any

import yaml

from mmrpt.settings.load import flatten
from mmrpt.settings.model import WITH_MODEL_PATH
from mmrpt.settings.tree import Settings


def settings_help() -> str:
    """What `--help` prints below the options: `name=default  help`, a paragraph for each group."""
    title = "settings, which a file (YAML) and key=value arguments change:"
    changed = " ".join(f"{name}={value!r}" for name, value in flatten(WITH_MODEL_PATH).items())
    real = wrap(f"defaults that differ with model.path: {changed}", 116)
    return "\n".join([title, *_group(Settings(), ""), "", *real])


def _group(group: Any, prefix: str) -> list[str]:
    lines, inner = ["", f"{prefix.rstrip('.') or 'run'}: {group.__doc__.partition(chr(10))[0]}"], []
    for field in dataclasses.fields(group):
        value, name = getattr(group, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            inner += _group(value, f"{name}.")
        else:
            shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
            lines.append(f"  {f'{name}={shown}':<38}  {type(group).__pydantic_fields__[field.name].description}")
    return lines + inner
