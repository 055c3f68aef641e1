"""Every setting, changed by an override and by a file: that one changes and no other.

The settings are taken from the defaults, so that a new one is tested without a line here, unless the rule for its type
gives a value that its checks refuse.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmrpt.config import Settings, SettingsError, load_settings, save_settings
from tests.trainer.conftest import SMALL_RUN


def leaves(settings: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{"a.b.c": (value, type)} of settings and of the groups in them."""
    kinds, found = typing.get_type_hints(type(settings)), {}
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        group = dataclasses.is_dataclass(value)
        found.update(leaves(value, f"{name}.") if group else {name: (value, kinds[field.name])})
    return found


DEFAULTS = leaves(Settings())
# Where the rule below gives what a check refuses: sizes that must fit others.
FITTING = {
    "world.concepts": 100,
    "world.image_size": 140,
    "world.max_cards": 3,
    "model.tiny.hidden_size": 256,
    "model.tiny.heads": 8,
    "model.tiny.kv_heads": 4,
}


def another(name: str) -> Any:
    """A legal value of the setting's type that is not its default."""
    value, kind = DEFAULTS[name]
    options = typing.get_args(kind)
    if name in FITTING:
        return FITTING[name]
    if typing.get_origin(kind) is typing.Literal:
        return next(option for option in options if option != value)
    if value is None:
        return {int: 3, str: "elsewhere", float: 0.5}[options[0]]
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(0.5 * part for part in value)
    if isinstance(value, str):
        return f"{value}2"
    return value + 1 if isinstance(value, int) else 0.75 * value or 0.25


def values(settings: Settings) -> dict[str, Any]:
    return {name: value for name, (value, _) in leaves(settings).items()}


def check_change(tmp_path: Path, name: str, value: Any) -> None:
    """By an override, by a file, and read back from what is saved: `name` is `value`, all else the default."""
    tree = json.loads(json.dumps(value))  # tuples are lists in a file
    for part in reversed(name.split(".")):
        tree = {part: tree}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(tree))
    save_settings(load_settings(None, [f"{name}={json.dumps(value)}"]), tmp_path / "saved.yaml")
    wanted = {key: default for key, (default, _) in DEFAULTS.items()} | {name: value}
    for how, settings in (
        ("override", load_settings(None, [f"{name}={json.dumps(value)}"])),
        ("file", load_settings(tmp_path / "given.yaml")),
        ("saved", load_settings(tmp_path / "saved.yaml")),
    ):
        found = values(settings)
        assert found == wanted, (how, {key: found[key] for key in wanted if found[key] != wanted[key]})
        assert type(found[name]) is type(value)


def test_without_anything_given_settings_are_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_settings() == load_settings(tmp_path / "empty.yaml") == Settings()
    save_settings(Settings(), tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == Settings()


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_setting_changes_itself_alone(tmp_path, name):
    value, kind = DEFAULTS[name]
    changed = another(name)
    assert changed != value
    check_change(tmp_path, name, changed)
    if isinstance(kind, types.UnionType):
        check_change(tmp_path, name, None)


def groups(settings: Any, prefix: str = "") -> list[str]:
    names = [f.name for f in dataclasses.fields(settings) if dataclasses.is_dataclass(getattr(settings, f.name))]
    return [g for n in names for g in (f"{prefix}{n}", *groups(getattr(settings, n), f"{prefix}{n}."))]


@pytest.mark.parametrize("name", groups(Settings()))
def test_a_group_is_no_plain_value_and_an_empty_one_changes_nothing(tmp_path, name):
    for value in ("5", "null", "[1]", ""):
        with pytest.raises(SettingsError) as error:
            load_settings(None, [f"{name}={value}"])
        assert f"{name}: Input should be a dictionary" in str(error.value)
    with pytest.raises(SettingsError, match=f"unknown setting '{name}.nonsense'"):
        load_settings(None, [f"{name}.nonsense=1"])
    assert load_settings(None, [f"{name}={{}}"]) == Settings()


def test_file_and_overrides_add_up_within_a_group(tmp_path):
    (tmp_path / "a.yaml").write_text("rl: {optimiser: {lr: 0.5, beta1: 0.25}, steps: 3}\n")
    settings = load_settings(tmp_path / "a.yaml", ["rl.optimiser.beta1=0.75", "rl={optimiser: {warmup_steps: 7}}"])
    wanted = dataclasses.replace(Settings().rl.optimiser, lr=0.5, beta1=0.75, warmup_steps=7)
    assert settings.rl == dataclasses.replace(Settings().rl, steps=3, optimiser=wanted)


def test_an_override_of_one_group_leaves_another_that_the_file_shares_with_it(tmp_path):
    (tmp_path / "a.yaml").write_text("sight: {optimiser: &same {lr: 0.5}}\nrl: {optimiser: *same}\n")
    settings = load_settings(tmp_path / "a.yaml", ["rl.optimiser.lr=0.25"])
    assert (settings.sight.optimiser.lr, settings.rl.optimiser.lr) == (0.5, 0.25)


def test_a_refusal_shows_what_was_given_and_no_default():
    with pytest.raises(SettingsError) as error:
        load_settings(None, ["warmup.optimiser.lr=-1"])
    assert str(error.value) == (
        "bad settings:\n  warmup.optimiser: lr is -1.0: expected a positive number. (got {'lr': -1})"
    )


def test_the_small_run_of_the_tests_changes_what_it_names_and_warms_up_with_muon():
    settings = load_settings(None, SMALL_RUN)
    found, named = values(settings), {override.partition("=")[0] for override in SMALL_RUN}
    assert {name for name, (value, _) in DEFAULTS.items() if found[name] != value} <= named
    assert (settings.warmup.optimiser.kind, settings.warmup.optimiser.vision_start) == ("muon", 1)
