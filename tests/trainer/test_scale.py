"""scale=tiny: a small model of the same architecture, sizes cut, and all else of a run as its settings say."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PretrainedConfig

from mmrpt import families, scale
from mmrpt.corpus import read_jsonl
from mmrpt.evaluate import main as evaluate
from mmrpt.families import load_image_processor
from mmrpt.mask import main as mask
from mmrpt.policy import Policy
from mmrpt.rewards.arbitrary import arbitrary
from mmrpt.scale import scaled_sections, with_tiny_model, write_tiny_model
from mmrpt.settings import load_settings, save_settings
from mmrpt.train import main as train
from tests.trainer.conftest import ColourPairs
from tests.trainer.shapes import SHAPES, write_shape
from tests.trainer.test_train_cli import write_pairs

# (heads, key and value heads) of a real model and of its tiny one.
HEADS = {
    "Qwen2-VL-2B": ((12, 2), (6, 1)),
    "Qwen2.5-VL-3B": ((16, 2), (8, 1)),
    "Qwen2.5-VL-7B": ((28, 4), (7, 1)),
    "Qwen3-VL-4B": ((32, 8), (4, 1)),
    "Qwen3-VL-8B": ((32, 8), (4, 1)),
}


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tiny_model_is_of_the_same_architecture_and_small(tmp_path, shape):
    source = write_shape(tmp_path / "real", shape)
    write_tiny_model(str(source), None, tmp_path / "tiny", 0)
    real, config = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(tmp_path / "tiny")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    assert type(config) is type(real)
    texts = [one.get_text_config() for one in (real, config)]
    assert tuple((t.num_attention_heads, t.num_key_value_heads) for t in texts) == HEADS[shape]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == SHAPES[shape]["tie_word_embeddings"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    words = model.get_input_embeddings().weight.shape[0]
    assert len(tokenizer) <= words < len(tokenizer) + 64 and words > config.image_token_id
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    kinds = [{type(m).__name__ for m in one.modules()} for one in (model, empty(real))]
    assert kinds[0] == kinds[1]
    for name in ("patch_size", "spatial_merge_size", "temporal_patch_size", "window_size", "hidden_act"):
        assert getattr(config.vision_config, name, None) == getattr(real.vision_config, name, None), name


def empty(config):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tiny_model_reads_an_image_and_trains_all_its_weights(tmp_path, shape):
    write_tiny_model(str(write_shape(tmp_path / "real", shape)), None, tmp_path / "tiny", 0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    photo = ColourPairs().image("colour/000").resize((640, 480))
    inputs = dict(load_image_processor(tmp_path / "tiny")(images=[photo], return_tensors="pt"))
    (_, rows, columns), side = inputs["image_grid_thw"][0].tolist(), model.config.vision_config.patch_size
    assert 0.8 * 224 * 224 < rows * columns * side**2 <= 224 * 224
    ids = [model.config.vision_start_token_id, *[model.config.image_token_id] * (rows * columns // 4), 50, 60, 70]
    inputs["input_ids"] = torch.tensor([ids])
    if "mm_token_type_ids" in inspect.signature(model.model.forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    model(**inputs).logits[0, -3:].log_softmax(-1)[:, 80].sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_sections_of_rotary_pairs_keep_their_proportions():
    assert scaled_sections([16, 24, 24], 8) == [2, 3, 3]
    assert scaled_sections([24, 20, 20], 8) == [3, 3, 2]
    assert scaled_sections([16, 24, 24], 64) == [16, 24, 24]


def test_the_same_seed_draws_the_same_weights_and_leaves_the_callers_draws_alone(tmp_path):
    source, weights = str(write_shape(tmp_path / "real", "Qwen2.5-VL-3B")), []
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tiny_model(source, None, tmp_path / name, seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(torch.rand(4), expected)


def test_no_weights_are_downloaded(tmp_path, monkeypatch):
    folder, asked = write_shape(tmp_path / "real", "Qwen2.5-VL-3B"), []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(families, "snapshot_download", download)
    settings = load_settings(None, [f"output={tmp_path}", "scale=tiny", "model.path=org/model", "model.revision=v2"])
    found = with_tiny_model(settings)
    assert found.model.path == str(tmp_path / "demo" / "tiny_model") and found.model.revision is None
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("org/model", "v2") and "*.json" in patterns
    assert not any("safetensors" in pattern for pattern in patterns)
    assert with_tiny_model(settings) == found and len(asked) == 1  # a resumed run goes on with the same
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["tiny_model"]
    Policy.load(found.model.path)


def test_settings_that_ask_for_no_tiny_model_stay(tmp_path):
    for overrides in (["scale=tiny"], ["model.path=/m"]):
        settings = load_settings(None, [f"output={tmp_path}", *overrides])
        assert with_tiny_model(settings) is settings


def test_a_model_that_cannot_be_made_small_is_refused(tmp_path, monkeypatch):
    source = write_shape(tmp_path / "real", "Qwen2.5-VL-3B")
    monkeypatch.setattr(scale, "MOST_PARAMETERS", 100_000)
    with pytest.raises(ValueError, match=r"how to make a 'qwen2_5_vl' small \(\d+,\d{3} parameters"):
        write_tiny_model(str(source), None, tmp_path / "tiny", 0)
    config = AutoConfig.from_pretrained(source)
    config.vision_config = PretrainedConfig(num_heads=4)
    with pytest.raises(ValueError, match=r"Pre[Tt]rainedConfig has no depth or num_hidden_layers. This release"):
        scale.shrink(config, 512)


# ------------------------------------------------------------------------------------------------ sizes and rewards


def test_sizes_are_cut_and_smaller_ones_stay(tmp_path):
    given = ["scale=tiny", "model.path=/m", "rl.steps=1", "rollout.max_new_tokens=5", "model.max_pixels=1003520"]
    settings = load_settings(None, [*given, "reward.custom={a.py:f: 2}", "rl.optimiser.lr=3e-7", "checkpoint_every=9"])
    assert (settings.rl.steps, settings.rollout.max_new_tokens, settings.rollout.prompts) == (1, 5, 2)
    assert (settings.model.max_pixels, settings.model.min_pixels) == (224 * 224, None)
    assert settings.masking.captions == 8 and settings.checkpoint_every == 1 and settings.rl.optimiser.lr == 3e-7
    assert settings.reward.weights() == {
        "format": 0.1,
        "exact": 1,
        "prefix": 0.1,
        "semantic": 0.2,
        "arbitrary": 1,
        "f": 2,
    }
    save_settings(settings, tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == settings


def test_the_reward_of_anything_differs_between_answers_and_is_the_same_each_time():
    texts = [f"answer {i}" for i in range(200)]
    values = arbitrary(texts, answer=["x"] * 200)
    assert values == arbitrary(texts) and len(set(values)) == 200 and all(0 <= value < 1 for value in values)
    assert 0.4 < sum(values) / 200 < 0.6


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_run_trains_its_tiny_model_and_its_checkpoints_are_models_of_their_own(tmp_path, capsys):
    model = write_shape(tmp_path / "real", "Qwen2.5-VL-7B")
    write_pairs(tmp_path / "pairs", 24)
    chosen = ["device=cpu", "threads=1", f"data.pairs={tmp_path / 'pairs' / 'pairs.jsonl'}"]
    run = [
        *chosen,
        f"output={tmp_path}",
        "scale=tiny",
        "name=it",
        f"model.path={model}",
        "control.kinds=[]",
        "rl.optimiser.lr=0.01",
    ]
    assert train(run) == 0
    folder = tmp_path / "it"
    start, end = (Policy.load(path) for path in (folder / "tiny_model", folder / "checkpoints" / "rl"))
    moved = {
        name: not torch.equal(p, dict(start.model.named_parameters())[name]) for name, p in end.model.named_parameters()
    }
    assert all(moved[name] for name in moved if "proj.weight" in name)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["groups"] for row in rows] == [2, 2] and all(row["reward/arbitrary"] > 0 for row in rows)
    capsys.readouterr()
    config = ["--config", str(folder / "config.yaml")]
    assert evaluate([str(folder / "checkpoints" / "rl"), *chosen, *config, "--out", str(tmp_path / "seen")]) == 0
    asked, again = (
        [row for row in read_jsonl(path / "answers.jsonl") if row["model"].endswith("rl")]
        for path in (folder, tmp_path / "seen")
    )
    assert [row["completion"] for row in asked] == [row["completion"] for row in again] and asked


def test_masking_with_a_tiny_model(tmp_path, capsys):
    model = write_shape(tmp_path / "real", "Qwen2.5-VL-3B")
    write_pairs(tmp_path / "pairs", 12)
    pairs = f"data.pairs={tmp_path / 'pairs' / 'pairs.jsonl'}"
    run = [f"output={tmp_path}", "device=cpu", pairs, "name=it", f"model.path={model}", "scale=tiny"]
    assert mask(run) == 0
    assert len({row["example_id"] for row in read_jsonl(tmp_path / "it" / "scores.jsonl")}) == 8


def test_a_refused_run_leaves_no_tiny_model(tmp_path, capsys):
    model = write_shape(tmp_path / "real", "Qwen2.5-VL-3B")
    assert (
        train([f"output={tmp_path / 'runs'}", "name=it", "scale=tiny", f"model.path={model}", "model.max_pixels=784"])
        == 2
    )
    assert "images get at least 3136 and at most 784 pixels" in capsys.readouterr().err
    assert not Path(tmp_path / "runs" / "it").exists()
