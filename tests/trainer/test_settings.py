"""Settings: what changes them, what is refused and in what words, and what they print.

The names are taken from the defaults, so that a new setting is tested without a line here, unless the rule for its type
gives a value that its checks refuse.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmrpt.engines.run import resolve_device
from mmrpt.settings import Settings, SettingsError, WorldConfig, load_settings, save_settings, settings_help
from mmrpt.settings.load import FORMER_NAMES, flatten
from mmrpt.settings.model import WITH_MODEL_PATH
from mmrpt.settings.scale import ANY_REWARD, LEFT_NULL, TINY_CAPS
from mmrpt.world.concepts import all_concepts
from tests.trainer.conftest import SMALL_RUN


def leaves(settings: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{"a.b.c": (value, type)} of settings and of the groups in them."""
    kinds, found = typing.get_type_hints(type(settings)), {}
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        group = dataclasses.is_dataclass(value)
        found.update(leaves(value, f"{name}.") if group else {name: (value, kinds[field.name])})
    return found


def values(settings: Settings) -> dict[str, Any]:
    return {name: value for name, (value, _) in leaves(settings).items()}


def groups(settings: Any, prefix: str = "") -> list[str]:
    names = [f.name for f in dataclasses.fields(settings) if dataclasses.is_dataclass(getattr(settings, f.name))]
    return [g for n in names for g in (f"{prefix}{n}", *groups(getattr(settings, n), f"{prefix}{n}."))]


def refusal(*overrides: str) -> str:
    with pytest.raises(SettingsError) as error:
        load_settings(None, overrides)
    return str(error.value)


DEFAULTS = leaves(Settings())
# Where the rule below gives what a check refuses.
FITTING = {
    "model.freeze": ("vision",),
    "model.lora.targets": ("q_proj",),
    "masking.layers": (2, 3),
    "masking.threshold": "quantile:0.25",
    "rl.max_importance": 2.0,
    "reward.custom": {"my_rewards.py:length": 0.5, "package.module:judge": -1.0},
    "track": ("wandb", "tensorboard"),
    "perception.max_weight": 1.5,
    "control.kinds": ("grpo", "captions"),
    "demo.world.concepts": 100,
    "demo.world.image_size": 140,
    "demo.world.max_cards": 3,
    "demo.tiny.hidden_size": 256,
    "demo.tiny.heads": 8,
    "demo.tiny.kv_heads": 4,
}
# What else a setting changes: a given model has other defaults; the demo's own training is not for it and given pairs.
ALSO = {
    "model.path": {
        "demo.vision_steps": 0,
        "demo.vision_frozen_steps": 0,
        "demo.grounding": 0.0,
        **flatten(WITH_MODEL_PATH),
    },
    "data.pairs": {"demo.fact_steps": 0, "demo.grounding": 0.0},
    "scale": {
        **{name: cap if (v := DEFAULTS[name][0]) is None else min(v, cap) for name, cap in TINY_CAPS.items()},
        **{name: DEFAULTS[name][0] for name in LEFT_NULL},
        "rl.min_accuracy": 0.0,
        "rl.max_accuracy": 1.0,
        "reward.custom": {ANY_REWARD: 1.0},
    },
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


def check_change(tmp_path: Path, name: str, value: Any) -> None:
    """By an override, by a file, and read back from what is saved: `name` is `value`, all else the default."""
    tree = json.loads(json.dumps(value))  # tuples are lists in a file
    for part in reversed(name.split(".")):
        tree = {part: tree}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(tree))
    save_settings(load_settings(None, [f"{name}={json.dumps(value)}"]), tmp_path / "saved.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.yaml", "saved.yaml"]
    also = ALSO.get(name, {}) if value is not None else {}
    wanted = {key: default for key, (default, _) in DEFAULTS.items()} | {name: value} | also
    for how, settings in (
        ("override", load_settings(None, [f"{name}={json.dumps(value)}"])),
        ("file", load_settings(tmp_path / "given.yaml")),
        ("saved", load_settings(tmp_path / "saved.yaml")),
    ):
        found = values(settings)
        assert found == wanted, (how, {key: found[key] for key in wanted if found[key] != wanted[key]})
        assert type(found[name]) is type(value)


# ------------------------------------------------------------------------------------------------ what changes them


def test_without_anything_given_settings_are_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_settings() == load_settings(tmp_path / "empty.yaml") == Settings()
    save_settings(Settings(), tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == Settings()


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name != "trl"])  # set with engine: test_trl_engine.py
def test_a_setting_changes_itself_alone(tmp_path, name):
    value, kind = DEFAULTS[name]
    changed = another(name)
    assert changed != value
    check_change(tmp_path, name, changed)
    if isinstance(kind, types.UnionType):
        check_change(tmp_path, name, None)


@pytest.mark.parametrize("name", groups(Settings()))
def test_a_group_is_no_plain_value_and_an_empty_one_changes_nothing(name):
    for value in ("5", "null", "[1]", ""):
        assert f"{name} is " in (said := refusal(f"{name}={value}")) and "it is a group; set what is in it" in said
    assert f"unknown setting '{name}.nonsense'" in refusal(f"{name}.nonsense=1")
    assert load_settings(None, [f"{name}={{}}"]) == Settings()


def test_file_and_overrides_add_up_within_a_group(tmp_path):
    (tmp_path / "a.yaml").write_text("rl: {optimiser: {lr: 0.5, beta2: 0.25}, steps: 3}\n")
    settings = load_settings(tmp_path / "a.yaml", ["rl.optimiser.beta2=0.75", "rl={optimiser: {warmup_steps: 7}}"])
    wanted = dataclasses.replace(Settings().rl.optimiser, lr=0.5, beta2=0.75, warmup_steps=7)
    assert settings.rl == dataclasses.replace(Settings().rl, steps=3, optimiser=wanted)


def test_an_override_of_one_group_leaves_another_that_the_file_shares_with_it(tmp_path):
    (tmp_path / "a.yaml").write_text("warmup: {optimiser: &same {lr: 0.5}}\nrl: {optimiser: *same}\n")
    settings = load_settings(tmp_path / "a.yaml", ["rl.optimiser.lr=0.25"])
    assert (settings.warmup.optimiser.lr, settings.rl.optimiser.lr) == (0.5, 0.25)


def test_the_small_run_of_the_tests_changes_what_it_names():
    found, named = values(load_settings(None, SMALL_RUN)), {override.partition("=")[0] for override in SMALL_RUN}
    assert {name for name, (value, _) in DEFAULTS.items() if found[name] != value} <= named


def test_own_rewards_add_up_and_may_stand_alone(tmp_path):
    (tmp_path / "a.yaml").write_text("reward: {custom: {my.py:a: 1, b.c:d: 2}}\n")
    settings = load_settings(tmp_path / "a.yaml", ["reward.custom={my.py:a: 0.5, ./x/my.py:e: 3}"])
    assert settings.reward.custom == {"my.py:a": 0.5, "b.c:d": 2, "./x/my.py:e": 3}
    built_in = {"format": 0.1, "exact": 1.0, "prefix": 0.1, "semantic": 0.2}
    assert settings.reward.weights() == {**built_in, "a": 0.5, "d": 2, "e": 3}
    alone = ("reward.exact=0", "reward.prefix=0", "reward.semantic=0", "reward.custom={a.py:f: 1}")
    assert load_settings(None, alone).reward.weights()["f"] == 1


@pytest.mark.parametrize(
    ("overrides", "available", "count"),
    [
        ([], 20_000, 1500),
        ([], 90, 90),
        (["data.pairs=a.jsonl"], 20_000, 20_000),
        (["data.pairs=a.jsonl", "masking.captions=7"], 20_000, 7),
        (["masking.captions=2000"], 20_000, 2000),
    ],
)
def test_all_given_captions_are_scored_and_a_part_of_the_endless_world(overrides, available, count):
    assert load_settings(None, overrides).captions_to_score(available) == count


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("rollout.group_size=1", "group of one has no relative advantage"),
        ("perception.keep_ratio=0", "perception.keep_ratio is 0: expected greater than 0"),
        ("perception.keep_ratio=1.2", "perception.keep_ratio is 1.2: expected less than or equal to 1"),
        ("perception.max_weight=0.5", "expected at least min_weight, 0.9"),
        ("warmup.restore_fraction=1", "warmup.restore_fraction is 1: expected less than 1"),
        ("masking.layers=[0.9,0.5]", "0 <= first < last <= 1"),
        ("masking.layers=[0.5]", "0 <= first < last <= 1"),
        ("masking.layers=[3,3]", "or indices"),
        ("masking.layers=[-1,3]", "or indices"),
        ("masking.layers=[]", "or indices"),
        ("masking.layers=[a]", "masking.layers is 'a': expected a valid"),
        ("masking.threshold=quantile", "'quantile': expected otsu, quantile:Q"),
        ("masking.threshold=quantile:1", "0 < Q < 1"),
        ("masking.threshold=mean_std:nan", "'mean_std:nan': expected otsu"),
        ("masking.threshold=otsu:1", "'otsu:1': expected otsu"),
        ("masking.signal=truth data.pairs=a.jsonl", "known of drawn pairs alone, but data.pairs is a.jsonl"),
        ("rl.min_accuracy=0.99", "expected below rl.max_accuracy"),
        ("rl.loss=cispo", "set rl.dual_clip=null"),
        ("rl.advantage=dr_grpo rl.aggregation=sum", "leave rl.aggregation at token_mean"),
        ("rollout.prompts=1", "rl.groups_per_step is 12: expected at most rollout.prompts * rl.max_rounds = 1 * 4"),
        ("rl.stepz=5", "unknown setting 'rl.stepz': did you mean rl.steps?"),
        ("group_size=5", "unknown setting 'group_size': did you mean rollout.group_size?"),
        ("optimiser.lr=5", "did you mean warmup.optimiser.lr or rl.optimiser.lr?"),
        ("nonsense=5", "unknown setting 'nonsense': `python -m mmrpt.train --help` lists them all"),
        ("rl.steps=many", "rl.steps is 'many': expected a valid integer"),
        ("rl.steps={a: 1}", "rl.steps is {'a': 1}: expected a valid integer"),
        ("rl.steps", "expected key=value"),
        ("name=y name.first=x", "holds a plain value"),
        ("prompts.restore=fill", "it must contain {masked_caption}"),
        ("prompts.restore='{masked_caption}{x}'", "it may hold {masked_caption} and {masked_sentence} alone"),
        ("prompts.mask=<|image_pad|>", "prompts.mask is '<|image_pad|>'"),
        ("prompts.mask=''", "prompts.mask is empty"),
        ("name=a/b", "names a folder"),
        ("model.freeze=[vision,merger,decoder]", "nothing is left to train"),
        ("model.freeze=[tower]", "model.freeze is 'tower': expected 'vision', 'merger' or 'decoder'"),
        ("model.min_pixels=900 model.max_pixels=800", "model.min_pixels is 900: expected at most model.max_pixels"),
        ("rl.advantage=best", "rl.advantage is 'best': expected 'grpo' or 'dr_grpo'"),
        ("reward.exact=0 reward.prefix=0 reward.semantic=0", "no term rewards the answer"),
        ("reward.custom={fn: 1}", "reward.custom names 'fn': expected file.py:function or package.module:function."),
        ("reward.custom={a.py:1: 1}", "reward.custom names 'a.py:1': expected file.py:function"),
        ("reward.custom={a.py:exact: 1}", "there is a term 'exact' already: rename the function"),
        ("reward.custom={a.py:f: 1, b.c:f: 1}", "names 'b.c:f', but there is a term 'f' already"),
        ("reward.custom={a.py:f: .nan}", "reward.custom.a.py:f is nan: expected a finite number"),
        ("reward.custom={a.py:f: much}", "reward.custom.a.py:f is 'much': expected a valid number"),
        ("reward.custom=a.py:f", "reward.custom is 'a.py:f': expected"),
        ("reward.exact=0 reward.prefix=0 reward.semantic=0 reward.custom={a.py:f: 0}", "no term rewards the answer"),
        ("track=[mlflow]", "track is 'mlflow': expected 'tensorboard', 'wandb' or 'trackio'"),
        ("demo.world.max_cards=9", "demo.world.max_cards is 9: expected less than or equal to 4"),
        ("demo.world.max_cards=2 demo.world.min_cards=3", "expected at least demo.world.min_cards, 3"),
        ("demo.tiny.heads=3", "multiple of 8"),
        ("demo.tiny.kv_heads=3", "demo.tiny.kv_heads is 4 / 3: expected a whole number"),
        ("demo.tiny.vision_heads=0", "demo.tiny.vision_heads is 0: expected greater than 0"),
        ("masking.threshold=median rl.steps=-1", "rl.steps is -1: expected greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(overrides, message):
    parts = re.split(r" (?=[\w.]+=)", overrides)
    assert message in refusal(*parts)


@pytest.mark.parametrize("name", [name for name, (value, _) in DEFAULTS.items() if isinstance(value, float)])
def test_numbers_that_are_not_finite_are_refused(name):
    for number in (".inf", "-.inf", ".nan"):
        assert f"{name} is {number.replace('.', '')}: expected" in refusal(f"{name}={number}")


def test_a_refusal_names_every_setting_and_shows_what_was_given():
    assert refusal("warmup.optimiser.lr=-1", "rl.steps=x", "rollout.top_p=0.5") == (
        "bad settings:\n  warmup.optimiser.lr is -1: expected greater than 0.\n"
        "  rl.steps is 'x': expected a valid integer, unable to parse string as an integer."
    )


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_former_names_are_refused_with_the_new_one(name):
    known = {*DEFAULTS, *groups(Settings())}
    told = FORMER_NAMES[name]
    assert name not in known and f"{name} {told}." in refusal(f"{name}=1")
    new = re.split("[,;:=]", told.removeprefix("is now "))[0].split()[0]
    assert new in known if told.startswith("is now ") else told.startswith(("is gone", "is fixed"))


def test_a_former_group_is_told_once():
    assert refusal("world.seed=1", "world.jitter=0.5", "sight={steps: 2, optimiser: {lr: 1}}") == (
        "bad settings:\n  world is now demo.world.\n  sight.steps is now demo.vision_steps.\n"
        "  sight.optimiser is now demo.vision_lr; the rest of that optimiser is fixed."
    )


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot read"):
        load_settings(tmp_path / "none.yaml")
    for text, message in (("a: [1", "not valid YAML"), ("- 1\n", "expected a mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SettingsError, match=message):
            load_settings(tmp_path / "bad.yaml")


@pytest.mark.parametrize("device", ["xpu:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused_with_the_remedy(device):
    with pytest.raises(SettingsError, match="device=cpu"):
        resolve_device(device)


def test_the_world_offers_as_many_concepts_as_there_is_artwork_for():
    assert WorldConfig().concepts == len(all_concepts())
    with pytest.raises(ValueError, match="concepts"):
        WorldConfig(concepts=len(all_concepts()) + 1)


# ------------------------------------------------------------------------------------------------ what they print


def test_every_setting_is_explained_and_printed_with_its_default():
    lines = {line.strip().partition("=")[0]: line for line in settings_help().splitlines() if line.startswith("  ")}
    assert list(lines) == list(DEFAULTS)
    for name, (value, _) in DEFAULTS.items():
        group = Settings()
        for part in name.split(".")[:-1]:
            group = getattr(group, part)
        told = type(group).__pydantic_fields__[name.rpartition(".")[2]].description
        assert told and len(told.split()) >= 3 and lines[name].endswith(f"  {told}"), name
        shown = lines[name].strip().removeprefix(f"{name}=").removesuffix(told)
        assert json.loads(json.dumps(value)) == yaml.safe_load(shown), name


COMMANDS = {
    "import": (None, 0, ""),
    "--show": (["--show", "rl.steps=7"], 0, "rl:\n  steps: 7\n"),
    "--help": (["--help"], 0, "rollout.group_size=8"),
    "misspelt": (["rl.stepz=7"], 2, "did you mean rl.steps?"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_concerns_settings_alone_does_not_wait_for_torch(command):
    arguments, status, output = COMMANDS[command]
    run = "import mmrpt.settings" if arguments is None else f"from mmrpt.train import main; sys.exit(main({arguments}))"
    code = f"import atexit, sys\natexit.register(lambda: print('loaded', *sys.modules))\n{run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == status and output in done.stdout + done.stderr, done.stderr
    loaded = done.stdout.rpartition("loaded ")[2].split()
    assert "mmrpt.settings" in loaded and not {"torch", "transformers", "numpy", "PIL"} & {*loaded}
