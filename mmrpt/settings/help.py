"""Every setting with its default and one line of help, in the order of the groups."""

from __future__ import annotations

import dataclasses
from textwrap import wrap
from typing import Any

import yaml

from mmrpt.settings.load import flatten
from mmrpt.settings.model import WITH_LORA, WITH_MODEL_PATH
from mmrpt.settings.tree import Settings


def settings_help() -> str:
    """What `--help` prints below the options: `name=default  help`, a paragraph for each group."""
    title = "settings, which a file (YAML) and key=value arguments change:"
    other = [("with model.path", WITH_MODEL_PATH), ("then with model.lora.rank", WITH_LORA)]
    changed = [f"defaults that differ {when}: {_shown(defaults)}" for when, defaults in other]
    return "\n".join([title, *_group(Settings(), ""), "", *(line for text in changed for line in wrap(text, 116))])


def _shown(defaults: dict[str, Any]) -> str:
    return " ".join(f"{name}={value!r}" for name, value in flatten(defaults).items())


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
