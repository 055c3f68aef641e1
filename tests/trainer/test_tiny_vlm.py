"""The tiny model: a real architecture, the same weights for the same arguments, features that vary from the start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLConfig

from mmrpt.policy import Policy
from mmrpt.world import World, WorldConfig, tiny_vlm
from mmrpt.world.tiny_vlm import (
    FORMAT_TOKENS,
    SPECIAL_TOKENS,
    TinyVLMConfig,
    build_tiny_vlm,
    spread_features,
    train_tokenizer,
    whiten_patches,
)
from tests.trainer.conftest import TINY, ColourPairs, make_policy

TEXTS = ["a red card.", "two blue cards lie at the top left."]
CLASS_OF = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
every_family = pytest.mark.parametrize("family", CLASS_OF)


def same_weights(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@every_family
def test_the_default_has_one_to_five_million_parameters(family):
    world = World(WorldConfig())
    texts = [world.example("train", i).caption for i in range(50)]
    model = build_tiny_vlm(TinyVLMConfig(family=family), texts).model
    count = sum(p.numel() for p in model.parameters())  # tied weights once
    assert 1e6 <= count <= 5e6, count
    assert type(model).__name__ == CLASS_OF[family]
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_seed_decides_the_weights_and_nothing_else_does():
    torch.manual_seed(1)
    first = make_policy(seed=5)
    torch.manual_seed(2)
    assert same_weights(first, make_policy(seed=5))
    other = make_policy(seed=6)
    names = dict(first.model.named_parameters())
    drawn = [n for n, p in other.model.named_parameters() if p.ndim > 1]
    assert all(not torch.equal(names[n], dict(other.model.named_parameters())[n]) for n in drawn) and drawn


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    before, wanted = torch.get_rng_state(), np.random.get_state()[1].copy()
    make_policy(seed=8)
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == wanted).all()


def features(policy, images):
    pixels = policy.pixels(images)
    with torch.no_grad():
        return policy.image_features(pixels)[0]


@pytest.mark.parametrize("std", [0.05, 0.2, 1.0])
def test_spread_features_have_mean_zero_and_the_wanted_deviation(std):
    policy, pairs = make_policy(), ColourPairs()
    images = [pairs.image(pairs[i].id) for i in range(16)]
    before = features(policy, images)
    common = before.mean(0).norm() / before.norm(dim=-1).mean()
    spread_features(policy, images, std)
    after = features(policy, images)
    torch.testing.assert_close(after.mean(0), torch.zeros(after.shape[1]), atol=1e-5 + 1e-4 * std, rtol=0)
    assert after.std(0).mean().item() == pytest.approx(std, rel=1e-4)
    assert common > 0.2 and after.mean(0).norm() < 1e-3 * after.norm(dim=-1).mean()
    # one scale and one shift: how images differ from each other is otherwise untouched
    scale = std / before.std(0).mean()
    torch.testing.assert_close(after, (before - before.mean(0)) * scale, atol=1e-4 * std, rtol=1e-3)


def test_whitened_patches_are_uncorrelated_components_of_the_wanted_deviation():
    policy, pairs = make_policy(), ColourPairs()
    images = [pairs.image(pairs[i].id) for i in range(16)]
    pixels = policy.pixels(images).pixel_values
    whiten_patches(policy, images, std=4.0)
    embedded = policy.model.model.visual.patch_embed(pixels).detach().double()
    assert embedded.std(0).square().mean().sqrt().item() == pytest.approx(4.0, rel=1e-4)
    covariance = torch.cov(embedded.T)
    outside = covariance - covariance.diag().diag()
    assert outside.abs().max() < 1e-3 * covariance.diag().max()
    # A component of deviation s becomes one of deviation s ** 0.25, and the largest comes first.
    own = torch.linalg.eigvalsh(torch.cov(pixels.double().T)).flip(0)[: embedded.shape[1]].clamp_min(0).sqrt()
    strong = own > 0.01 * own[0]
    ratio = embedded.std(0)[strong] / own[strong] ** 0.25
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-2, atol=0)


@every_family
def test_building_with_images_spreads_their_features(family):
    pairs, config = ColourPairs(), replace(TINY, feature_std=0.3, family=family)
    images = [pairs.image(pairs[i].id) for i in range(8)]
    policy = build_tiny_vlm(config, TEXTS, seed=1, images=images)
    assert features(policy, images).std(0).mean().item() == pytest.approx(0.3, rel=1e-4)
    assert same_weights(policy, build_tiny_vlm(config, TEXTS, seed=1, images=images))


def test_only_qwen3_vl_tells_where_a_patch_stands():
    """All patches of an image of one colour are alike, so that only their places can tell their features apart."""
    plain = Image.new("RGB", (112, 112), (220, 40, 40))
    images = [ColourPairs().image(f"colour/{i:03d}") for i in range(8)]
    spread = {}
    for family in CLASS_OF:
        policy = build_tiny_vlm(replace(TINY, family=family), TEXTS, images=images)
        spread[family] = features(policy, [plain]).std(0).mean().item()
    assert spread["qwen2_5_vl"] < 1e-4 < 1e-2 < spread["qwen3_vl"], spread


@every_family
def test_the_saved_folder_opens_with_the_auto_classes(tmp_path, family):
    policy = build_tiny_vlm(replace(TINY, family=family), TEXTS)
    policy.write_files(tmp_path / "tiny")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert type(model).__name__ == CLASS_OF[family]
    assert model.generation_config.eos_token_id == policy.eos_token_id
    assert all(torch.equal(value, policy.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    text = "<think> two red cards</think><answer> red</answer>"
    assert tokenizer(text)["input_ids"] == policy.encode_text(text)
    assert same_weights(Policy.load(tmp_path / "tiny"), policy)


def test_the_tokenizer_reads_and_writes_any_text():
    tokenizer = train_tokenizer(TEXTS, 512)
    for text in ["a red card.", "Zoë's 3 naïve émigrés… 🙂", "<mask> <answer> two  spaces", "\n\ttabs"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    for token in FORMAT_TOKENS + SPECIAL_TOKENS:
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1, token
    assert not set(FORMAT_TOKENS) & set(tokenizer.all_special_tokens)  # decoding shows them
    assert len(tokenizer) <= 512
    assert len(tokenizer(" red", add_special_tokens=False)["input_ids"]) == 1  # a word of the texts is one token


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 3}, "multiple of 8"), ({"hidden_size": 36, "heads": 3}, "multiple of 8"), ({"vocab_size": 300}, "512")],
)
def test_sizes_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TinyVLMConfig(), **change)


def test_names_that_a_release_does_not_know_are_refused(monkeypatch):
    config = Qwen2_5_VLConfig().text_config
    tiny_vlm._check_names(config, {"hidden_size": 1, "num_hidden_layers": 2, "pad_token_id": 0})
    with pytest.raises(ValueError, match="knows no num_layerz"):
        tiny_vlm._check_names(config, {"hidden_size": 1, "num_layerz": 2})
    monkeypatch.setattr(tiny_vlm.PreTrainedTokenizerFast, "all_special_tokens", ["<|im_end|>"])
    with pytest.raises(ValueError, match="does not know .*image_pad.* as special tokens"):
        tiny_vlm.train_tokenizer(["a card"], 512)
