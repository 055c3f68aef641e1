"""Settings from a YAML file and dotted overrides, what is wrong with them in words, and back to a file."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mmrpt.settings.base import SettingsError
from mmrpt.settings.model import WITH_LORA, WITH_MODEL_PATH
from mmrpt.settings.tree import Settings

# Names that earlier versions had, with what became of them. A name stands for all below it, unless they are here too.
FORMER_NAMES = {
    "data.size": "is now demo.size",
    "world": "is now demo.world",
    "model.tiny": "is now demo.tiny",
    "sight": "is now demo.vision_steps, demo.vision_batch_size and demo.vision_lr",
    "sight.steps": "is now demo.vision_steps",
    "sight.batch_size": "is now demo.vision_batch_size",
    "sight.optimiser": "is now demo.vision_lr; the rest of that optimiser is fixed",
    "warmup.sentence_steps": "is now demo.fact_steps",
    "warmup.sentence_batch_size": "is now demo.lesson_batch_size",
    "demo.sentence_steps": "is now demo.fact_steps",
    "demo.sentence_batch_size": "is now demo.lesson_batch_size",
    "warmup.optimiser.vision_start": "is now demo.vision_frozen_steps",
    "rl.optimiser.vision_start": "is gone; rl.optimiser.vision_scale=0 freezes the vision tower",
    **{f"{phase}.optimiser.muon_scale": "is fixed: Muon's learning rate is 6 times lr" for phase in ("warmup", "rl")},
    **{f"{phase}.optimiser.beta1": "is fixed at 0.9" for phase in ("warmup", "rl")},
    "rl.micro_batch": "is now model.batch_tokens, which counts tokens, prompts and padding included",
    "rl.entropy_scope": "is gone: the entropy term covers the tokens that keep their gradient",
    "masking.pairs": "is now masking.captions",
    "masking.first_layer": "is now masking.layers=[first, last]",
    "masking.last_layer": "is now masking.layers=[first, last]",
    "masking.align": "is now masking.attention_row: 'predicting' is before, 'token' is own",
    "masking.quantile": "is now masking.threshold=quantile:0.5",
    "masking.std_factor": "is now masking.threshold=mean_std:0.5",
    "masking.balance": "is now masking.balance_word_classes",
    "masking.kl_signal": "is now masking.signal=kl, which also chooses the spans",
    "masking.batch_size": "is now masking.batch_tokens, about 256 for each caption",
    "control.enabled": "is now control.kinds: [captions] for true, [] for false",
    "control.batch_size": "is now warmup.batch_size, which the control shares",
    "control.restore_fraction": "is now warmup.restore_fraction, which the control shares",
}


def load_settings(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Defaults, then the YAML file, then `a.b.c=value` overrides (values are read as YAML). Raises SettingsError.

    Each changes what it names and nothing beside it; a list such as `demo.world.card_weights` is given whole. Where
    model.path is given, the defaults are those for a pretrained model (`WITH_MODEL_PATH`, and `WITH_LORA` over it where
    model.lora.rank is).
    """
    given, defaults = given_settings(file, overrides), dataclasses.asdict(Settings())
    model = given.get("model")
    if isinstance(model, dict) and model.get("path") is not None:
        lora = model.get("lora")
        defaults = _merged(defaults, WITH_MODEL_PATH)
        defaults = _merged(defaults, WITH_LORA if isinstance(lora, dict) and lora.get("rank") else {})
    if unknown := _unknown(given, defaults):
        raise SettingsError(_as_list(_about_unknown(name, flatten(defaults)) for name in unknown))
    try:
        return TypeAdapter(Settings).validate_python(_merged(defaults, given))
    except ValidationError as error:
        raise SettingsError(_as_list(_explain(item, defaults) for item in error.errors())) from error


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


def save_settings(settings: Settings, file: str | Path) -> None:
    """Writes the resolved settings as YAML, under a temporary name first."""
    file = Path(file)
    part = file.with_name(file.name + ".tmp")
    part.write_text(to_yaml(settings))
    os.replace(part, file)


def to_yaml(settings: Settings) -> str:
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b.c": value}. A mapping that is empty, or whose keys are no names, is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        group = isinstance(value, dict) and value and all(str(part).isidentifier() for part in value)
        flat.update(flatten(value, f"{name}.") if group else {name: value})
    return flat


def _merged(base: Any, given: Any) -> Any:
    """`given` over `base`: groups name by name, everything else whole. Neither is changed."""
    if not (isinstance(base, dict) and isinstance(given, dict)):
        return given
    return {**base, **{name: _merged(base.get(name), value) for name, value in given.items()}}


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
    return _merged(tree, value)


def _unknown(given: dict[str, Any], known: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names that are given and that no setting has; of an unknown group, those of its settings."""
    names: list[str] = []
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in known:
            names += flatten({name: value})
        elif isinstance(value, dict) and isinstance(known[key], dict) and known[key]:  # {}: it takes any key
            names += _unknown(value, known[key], f"{name}.")
    return names


def _about_unknown(name: str, known: Iterable[str]) -> str:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (former := ".".join(parts[:length])) in FORMER_NAMES:
            return f"{former} {FORMER_NAMES[former]}."
    near = [other for other in known if other.rpartition(".")[2] == parts[-1]]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown setting {name!r}: {meant}`python -m mmrpt.train --help` lists them all."


def _explain(item: Any, defaults: dict[str, Any]) -> str:
    """What one finding of pydantic says: which setting, what was got, what is expected."""
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # of our own checks, which name their settings
        return message
    names, group = [], defaults
    for part in item["loc"]:  # which goes on into lists and unions
        if not isinstance(group, dict):
            break
        names.append(str(part))
        group = group.get(part)
    where = ".".join(names)
    if isinstance(group, dict) and group:
        return f"{where} is {item['input']!r}: it is a group; set what is in it, as {where}.{next(iter(group))}=..."
    return f"{where} is {item['input']!r}: {message.replace('Input should be', 'expected', 1)}."


def _as_list(lines: Iterable[str]) -> str:
    return "bad settings:\n  " + "\n  ".join(dict.fromkeys(lines))
