"""The vision tower's own training: its loss against a plain count, and what it teaches."""

from __future__ import annotations

import math

import pytest
import torch

from mmrpt.world.vision_pretraining import SHARPNESS, label_ids, label_weights, vision_loss


def test_rarity_is_the_log_of_how_seldom_a_token_stands_in_a_caption(policy):
    captions = ["the card is red.", "the card is blue.", "the paper is red. red red.", "the card is soft."]
    found = label_weights(policy, captions)
    for word, captions_with_it in (("the", 4), ("card", 3), ("red", 2), ("soft", 1), ("green", 0)):
        for token in policy.encode_text(f" {word}"):
            held = sum(token in policy.encode_text(" " + caption) for caption in captions)
            assert found[token].item() == pytest.approx(max(0.0, math.log(4) - math.log1p(held)), abs=1e-6), word
            assert held >= captions_with_it
    assert (found >= 0).all()


def test_the_loss_is_the_weighted_cross_entropy_of_the_captions_words(policy, pairs):
    captions = [pairs[i].caption for i in range(3)]
    weights = label_weights(policy, [pairs[i].caption for i in range(len(pairs))])
    pixels = policy.pixels([pairs.image(pairs[i].id) for i in range(3)])
    loss = vision_loss(policy, pixels, captions, weights)
    expected = []
    with torch.no_grad():
        for i, caption in enumerate(captions):
            own = policy.pixels([pairs.image(pairs[i].id)])
            pooled = policy.image_features(own)[0].mean(0)
            logits = SHARPNESS * torch.cosine_similarity(pooled[None], policy.head_weight, dim=-1)
            logps = logits.log_softmax(-1)
            ids = label_ids(policy, caption)
            expected.append(sum(-weights[t] * logps[t] for t in ids) / sum(weights[t] for t in ids))
    assert loss.item() == pytest.approx(float(sum(expected) / 3), rel=1e-4)


def test_only_the_tower_and_the_head_are_trained(policy, pairs):
    weights = label_weights(policy, [pairs[i].caption for i in range(len(pairs))])
    vision_loss(policy, policy.pixels([pairs.image(pairs[0].id)]), [pairs[0].caption], weights).backward()
    trained = {name for name, p in policy.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all("visual." in name or "embed_tokens" in name for name in trained)
    assert any("patch_embed" in name for name in trained) and any("embed_tokens" in name for name in trained)


def test_a_caption_of_common_words_alone_adds_nothing(policy, pairs):
    pixels = policy.pixels([pairs.image(pairs[0].id)])
    assert vision_loss(policy, pixels, ["paper."], torch.zeros(policy.head_weight.shape[0])).item() == 0.0


def test_a_few_steps_teach_the_tower_to_tell_colours(policy, pairs):
    source = range(len(pairs))
    captions, images = [pairs[i].caption for i in source], [pairs.image(pairs[i].id) for i in source]
    weights, pixels = label_weights(policy, captions), policy.pixels(images)
    colours = [
        policy.encode_text(" " + pairs[i].caption[pairs[i].words[0].start : pairs[i].words[0].end]) for i in source
    ]
    optimiser = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=3e-3)

    def told() -> float:
        with torch.no_grad():
            features = policy.image_features(pixels)[0].view(len(pairs), -1, 32).mean(1)
            words = sorted({ids[0] for ids in colours})
            scores = torch.cosine_similarity(features[:, None], policy.head_weight[words], dim=-1)
        return sum(words[best] == ids[0] for best, ids in zip(scores.argmax(-1).tolist(), colours, strict=True)) / 24

    before = told()
    for _ in range(40):
        vision_loss(policy, pixels, captions, weights).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert before < 0.6 and told() > 0.9
