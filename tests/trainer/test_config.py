"""Settings: what is refused, with what words, and that a saved file gives the same settings back."""

from __future__ import annotations

import pytest

from mmrpt.config import Settings, SettingsError, check_device, load_settings, save_settings


def test_defaults_survive_a_round_trip(tmp_path):
    settings = load_settings(None, ["rl.steps=7", "world.card_weights=[1, 0, 0, 0]", "rl.dual_clip=null"])
    save_settings(settings, tmp_path / "config.yaml")
    assert load_settings(tmp_path / "config.yaml") == settings
    assert settings.rl.steps == 7 and settings.rl.dual_clip is None
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


def test_file_then_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("rl:\n  steps: 3\n  clip_high: 0.3\nname: x\n")
    settings = load_settings(tmp_path / "a.yaml", ["rl.steps=5"])
    assert (settings.rl.steps, settings.rl.clip_high, settings.name) == (5, 0.3, "x")
    assert settings.rl.clip_low == Settings().rl.clip_low


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_size=1", "group of one has no relative advantage"),
        ("perception.keep_ratio=0", "above 0 and at most 1"),
        ("perception.keep_ratio=1.2", "above 0 and at most 1"),
        ("rollout.temperature=0", "above 0"),
        ("warmup.restore_fraction=1", "below 1"),
        ("masking.first_layer=0.9 masking.last_layer=0.5", "first < last"),
        ("rl.stepz=5", "unknown setting 'rl.stepz'"),
        ("nonsense=5", "unknown setting 'nonsense'"),
        ("rl.steps=many", "rl.steps"),
        ("rl.steps", "expected key=value"),
        ("rl=5", "rl"),
        ("name=y name.first=x", "holds a plain value"),
        ("prompts.restore=fill it in", "masked_caption"),
        ("name=a/b", "names a folder"),
        ("world.max_cards=9", "world.max_cards"),
        ("model.tiny.heads=3", "multiple of 8"),
        ("reward.exact=0 reward.prefix=0 reward.semantic=0", "no term rewards the answer"),
        ("rl.advantage=best", "rl.advantage"),
        ("prompts.mask=<|image_pad|>", "prompts.mask"),
        ("prompts.describe=<|vision_start|>", "prompts.describe"),
        ("rl.optimiser.weight_decay=-1", "weight_decay is -1"),
        ("warmup.optimiser.warmup_steps=-3", "warmup_steps is -3"),
        ("sight.optimiser.beta2=1", "beta2 is 1"),
        ("model.tiny.layers=0", "model.tiny.layers is 0"),
        ("model.tiny.kv_heads=3", "model.tiny.kv_heads"),
        ("model.tiny.vision_heads=0", "model.tiny.vision_heads is 0"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(override, message):
    parts = override.split(" ") if "=" in override.split(" ")[-1] and override.count("=") > 1 else [override]
    with pytest.raises(SettingsError) as error:
        load_settings(None, parts)
    assert message in str(error.value)


@pytest.mark.parametrize("device", ["xpu:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused_with_the_remedy(device):
    with pytest.raises(SettingsError, match="device=cpu"):
        check_device(device)
    check_device("cpu")


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot read"):
        load_settings(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(SettingsError, match="not valid YAML"):
        load_settings(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(SettingsError, match="expected a mapping"):
        load_settings(tmp_path / "list.yaml")
