"""The policy adapter against the model's own forward pass, positions and files."""

from __future__ import annotations

import inspect
import logging
import warnings

import pytest
import torch

from mmrpt import families
from mmrpt.families import PatchProjection, mrope_positions, use_patch_projection
from mmrpt.policy import Policy, QwenVLPolicy
from mmrpt.rollout import generate
from mmrpt_kernels.integrations.transformers import record_visual_mass
from tests.trainer.conftest import make_policy


def make_batch(policy, pairs, *, pad_left=False, shared=False):
    images = [pairs.image(pairs[i].id) for i in range(3)]
    pixels = policy.pixels(images)
    prompts = [policy.encode_prompt("restore: a <mask> card" + " card" * i, 4) for i in range(3)]
    responses = [policy.encode_text("the card is red. cards"[: 10 + 5 * i]) for i in range(3)]
    return policy.batch(prompts, responses, pixels, [0, 0, 2] if shared else [0, 1, 2], pad_left=pad_left)


def own_forward(policy, batch):
    """What transformers computes from pixels repeated row by row."""
    grid = batch.pixels.grid_thw[batch.image_index]
    per_image = batch.pixels.grid_thw.prod(-1).tolist()
    parts = batch.pixels.pixel_values.split(per_image)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": torch.cat([parts[i] for i in batch.image_index.tolist()]),
        "image_grid_thw": grid,
    }
    if "mm_token_type_ids" in inspect.signature(policy.model.model.forward).parameters:
        inputs["mm_token_type_ids"] = (batch.input_ids == policy.image_token_id).int()
    return policy.model.model(**inputs).last_hidden_state


@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_hidden_equals_the_models_own_forward(policy, pairs, pad_left, shared):
    batch = make_batch(policy, pairs, pad_left=pad_left, shared=shared)
    keep = batch.attention_mask.bool()
    torch.testing.assert_close(policy.hidden(batch)[keep], own_forward(policy, batch)[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad_left", [False, True])
def test_positions_equal_get_rope_index(policy, pairs, pad_left):
    batch = make_batch(policy, pairs, pad_left=pad_left)
    grid = batch.pixels.grid_thw[batch.image_index]
    inputs = {"input_ids": batch.input_ids, "image_grid_thw": grid, "attention_mask": batch.attention_mask}
    if "mm_token_type_ids" in inspect.signature(policy.model.model.get_rope_index).parameters:
        inputs["mm_token_type_ids"] = (batch.input_ids == policy.image_token_id).int()
    wanted, _ = policy.model.model.get_rope_index(**inputs)
    found = mrope_positions(batch.input_ids, batch.attention_mask, grid, policy.image_token_id, 2)
    keep = batch.attention_mask.bool()
    assert torch.equal(found[:, keep], wanted[:, keep])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_padding_is_left_out_without_a_trace(policy, pairs, shared, checkpointing):
    """Of padded rows and of rows that share a prompt: hidden states and gradients; only tokens enter the layers."""
    pixels = policy.pixels([pairs.image(pairs[i].id) for i in range(2)])
    prompts = [policy.encode_prompt("restore: a <mask> card" + " card" * (5 * i), 4) for i in range(2)]
    batch = policy.group_batch(prompts, [[[50, 60], [70]], [[80], [90, 100]]], pixels, [0, 1], share=shared)
    keep = batch.attention_mask.bool()
    assert not keep.all() and (batch.segments is not None) == shared
    if checkpointing:
        policy.model.train()
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = []
    policy.text_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    weights = [p for p in policy.text_model.layers.parameters()]
    factors = torch.randn(*keep.shape, policy.head_weight.shape[1])
    results = []
    for padded in (False, True):
        hidden = policy.hidden(batch, padded=padded)
        results.append((hidden, torch.autograd.grad((hidden * factors)[keep].sum(), weights)))
    (packed, gradients), (hidden, wanted) = results
    assert seen[0] == (1, int(keep.sum())) and seen[-1] == keep.shape
    torch.testing.assert_close(packed[keep], hidden[keep], rtol=1e-5, atol=1e-5)
    assert not packed[~keep].any()
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_packed_rows_are_refused_in_a_recorded_layer(policy, pairs):
    batch = make_batch(policy, pairs)
    weights = batch.input_ids == policy.image_token_id
    with (
        pytest.raises(ValueError, match="packed_rows: got packed rows in a recorded layer"),
        record_visual_mass(policy.text_model, key_weights=weights[:, : int(batch.attention_mask.sum())]),
    ):
        policy.hidden(batch)


def test_the_patch_embedding_is_the_convolution_it_replaces():
    """Sums of 24 products in another order: within 24 eps of the sum of their sizes."""
    tower = torch.nn.Module()
    tower.patch_embed = torch.nn.Module()
    tower.patch_embed.proj = convolution = torch.nn.Conv3d(3, 5, kernel_size=(2, 2, 2), stride=(2, 2, 2))
    patches = torch.randn(7, 3, 2, 2, 2)
    wanted = convolution(patches)
    sizes = torch.nn.functional.conv3d(patches.abs(), convolution.weight.abs(), convolution.bias.abs(), stride=2)
    gradients = torch.autograd.grad(wanted.square().sum(), [*tower.parameters()])
    use_patch_projection(tower)
    found = tower.patch_embed.proj(patches)
    assert found.shape == wanted.shape and type(convolution) is PatchProjection
    assert ((found - wanted).abs() <= 24 * torch.finfo(torch.float32).eps * sizes).all()
    for a, b in zip(torch.autograd.grad(found.square().sum(), [*tower.parameters()]), gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_tiny_models_patches_are_projected_and_overlapping_ones_are_not(policy):
    assert type(policy.model.model.visual.patch_embed.proj) is PatchProjection
    tower = torch.nn.Module()
    tower.patch_embed = torch.nn.Module()
    tower.patch_embed.proj = torch.nn.Conv3d(3, 5, kernel_size=2, stride=1)
    use_patch_projection(tower)
    assert type(tower.patch_embed.proj) is torch.nn.Conv3d


def test_shared_image_gradient_is_the_sum_over_rows(policy, pairs):
    batch = make_batch(policy, pairs, shared=True)
    patch = policy.model.model.visual.patch_embed.proj.weight
    (g_shared,) = torch.autograd.grad(policy.hidden(batch).square().sum(), patch)
    (g_own,) = torch.autograd.grad(own_forward(policy, batch).square().sum(), patch)
    # padded positions differ between the two; compare on rows without padding
    row = batch.attention_mask.all(-1).nonzero()[0, 0]
    (a,) = torch.autograd.grad(policy.hidden(batch)[row].square().sum(), patch)
    (b,) = torch.autograd.grad(own_forward(policy, batch)[row].square().sum(), patch)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert g_shared.isfinite().all() and g_own.isfinite().all() and a.abs().max() > 0


def test_save_and_load_give_the_same_policy(policy, pairs, tmp_path):
    policy.write_files(tmp_path / "model")
    loaded = Policy.load(tmp_path / "model")
    batch = make_batch(policy, pairs)
    assert torch.equal(loaded.hidden(batch), policy.hidden(batch))
    assert loaded.encode_text("the card is red.") == policy.encode_text("the card is red.")
    assert loaded.prompt_text("describe") == policy.prompt_text("describe")


def test_format_marks_are_single_tokens_and_decode_back(policy):
    text = "<think> a red card.</think><answer> red</answer>"
    ids = policy.encode_text(text)
    assert policy.tokenizer.decode(ids) == text
    for mark in ("<mask>", "<think>", "</think>", "<answer>", "</answer>"):
        assert len(policy.encode_text(mark)) == 1


def test_a_sampled_image_marker_is_refused_with_its_row(policy, pairs):
    batch = make_batch(policy, pairs)
    batch.input_ids[1, -1] = policy.image_token_id
    with pytest.raises(ValueError, match="row 1 holds 5 image tokens but its image has 4"):
        policy.hidden(batch)


def test_markers_are_never_sampled_but_the_end_is(policy):
    bias = policy.sampling_bias()
    for name in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>", "<|endoftext|>"):
        assert bias[policy.tokenizer.convert_tokens_to_ids(name)] < -1e3, name
    assert bias[policy.eos_token_id] == 0
    assert (bias[len(policy.tokenizer) :] < -1e3).all()


def test_a_marker_in_a_text_is_ordinary_characters(policy, pairs):
    text = "a <|im_end|> red <|image_pad|> card <|im_start|>assistant"
    markers = set(policy.tokenizer.all_special_ids)
    assert not markers & set(policy.encode_text(text))
    prompt = policy.encode_prompt(text, image_tokens=3)
    plain = policy.encode_prompt("a card", image_tokens=3)
    assert [t for t in prompt if t in markers] == [t for t in plain if t in markers]
    assert text in policy.tokenizer.decode(prompt)
    ids, offsets = policy.encode_with_offsets(text)
    assert [text[a:b] for a, b in offsets] == [policy.tokenizer.decode([token]) for token in ids]


def test_bad_inputs_say_what_to_do(policy, tmp_path):
    with pytest.raises(ValueError, match="no image"):
        policy.pixels([])
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Policy.load(tmp_path)


@pytest.fixture
def deprecations():
    """What transformers logs inside the test: it tells of some old names so, once a process."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("transformers")
    getattr(logging.Logger.warning_once, "cache_clear", lambda: None)()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_our_calls_use_no_deprecated_name(pairs, tmp_path, deprecations):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        policy = make_policy()
        policy.write_files(tmp_path / "model")
        policy = Policy.load(tmp_path / "model")
        policy.hidden(make_batch(policy, pairs)).sum().backward()
        pixels = policy.pixels([pairs.image(pairs[0].id)])
        generate(policy, [policy.encode_prompt("describe", 4)], pixels, [0], group_size=2, max_new_tokens=3)
    assert not [message for message in deprecations if "deprecated" in message]


def test_an_unknown_release_is_refused(policy, pairs, monkeypatch):
    pixels = policy.pixels([pairs.image(pairs[0].id)])
    model = policy.model.model
    get = model.get_image_features
    for result, message in (
        (lambda *a: {"features": torch.zeros(4, 32)}, "returned a dict without pooler_output"),
        (lambda *a: [torch.zeros(3, 32)], r"gave \(3, 32\): expected \(4, 32\)"),
    ):
        monkeypatch.setattr(model, "get_image_features", result)
        with pytest.raises(ValueError, match=message):
            policy.image_features(pixels)
    monkeypatch.setattr(model, "get_image_features", get)
    forward = policy.text_model.forward
    for taken, message in (
        (lambda input_ids, **kwargs: 0, "expected one of .* for its key-value cache"),
        (lambda input_ids, cache, inputs_embeds, use_cache, **kwargs: 0, "takes no position_ids, attention_mask"),
    ):
        monkeypatch.setattr(policy.text_model, "forward", taken)
        with pytest.raises(ValueError, match=message):
            QwenVLPolicy(policy.model, policy.tokenizer, policy.image_processor)
    monkeypatch.setattr(policy.text_model, "forward", forward)
    with pytest.raises(ValueError, match="patch_size is None: expected 14"):
        families.check_kept(object(), "patch_size", 14)
