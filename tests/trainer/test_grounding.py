"""The grounding loss: what a name's attention should rest on, against attention computed by hand."""

from __future__ import annotations

import pytest
import torch

from mmrpt.captions import caption_batch
from mmrpt.masking.sentences import sentence_spans
from mmrpt.objective import supervised_backward
from mmrpt.settings import PromptSettings, WorldConfig
from mmrpt.world import RenderedWorld, World
from mmrpt.world.grounding import LAYERS, grounded_backward, names_of

PROMPTS = PromptSettings()


@pytest.fixture(scope="module")
def cards():
    return World(WorldConfig(min_cards=2)).source("train", 40)


def rows_of(policy, source, items):
    batch = caption_batch(policy, source, items, PROMPTS, restore_fraction=0.5, seed=0)
    return batch, [names_of(source, source[i]) for i in items]


def gradients(policy):
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["drawn", "rendered"])
def test_names_have_the_boxes_of_the_things_that_have_them(kind):
    world = World(WorldConfig(min_cards=2)) if kind == "drawn" else RenderedWorld()
    seen = set()
    for i, example in enumerate(source := world.source("train", 60)):
        scene, size = world.scene("train", i), world.config.image_size
        things = scene.cards if kind == "drawn" else scene.solids
        for text, boxes in names_of(source, example).items():
            named = [t for t in things if text in (t.object, t.colour, t.position, getattr(t, "category", t.object))]
            named = named or [t for t in things if text == t.material]
            whole = {tuple(round(edge * size) for edge in box) for box in boxes}
            assert whole <= {t.box for t in named}, (example.caption, text)
            seen.add(len(whole))
        plain = {example.caption[w.start : w.end] for w in example.words if w.kind in ("plain", "count", "relation")}
        assert not plain & names_of(source, example).keys() - {"fruit", "vegetable"}
    assert 1 in seen


def mass_by_hand(policy, batch, names):
    """Eager attention of the first half of the heads, of the layers: -log(mass in the boxes / on the image)."""
    lm, losses = policy.model.model.language_model, []
    layers = [layer for layer in LAYERS if layer < len(lm.layers)]
    probs, hooks = {}, []
    for layer in layers:
        module = lm.layers[layer].self_attn

        def keep(module, args, kwargs, layer=layer):
            hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
            shape = (*hidden.shape[:-1], -1, module.head_dim)
            q, k = module.q_proj(hidden).view(shape), module.k_proj(hidden).view(shape)
            if hasattr(module, "q_norm"):
                q, k = module.q_norm(q), module.k_norm(k)
            half = module.head_dim // 2

            def turned(x):
                return x * cos[:, :, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, :, None]

            q, k = turned(q), turned(k).repeat_interleave(q.shape[2] // k.shape[2], 2)
            scores = torch.einsum("rthd,rshd->rhts", q, k) * module.head_dim**-0.5
            width = scores.shape[-1]
            scores = scores.masked_fill(~torch.ones(width, width, dtype=torch.bool).tril(), -torch.inf)
            probs[layer] = scores.softmax(-1)

        hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        policy.hidden(batch, padded=True)
    for hook in hooks:
        hook.remove()
    for row, named in enumerate(names):
        ids = batch.input_ids[row].tolist()
        image = (batch.input_ids[row] == policy.image_token_id).nonzero()[:, 0]
        side = round(len(image) ** 0.5)
        for text, boxes in named.items():
            word = policy.encode_text(" " + text)
            ends = [s + len(word) - 1 for s in range(len(ids)) if ids[s : s + len(word)] == word]
            inside = [
                any(b[0] < (x + 0.5) / side < b[2] and b[1] < (y + 0.5) / side < b[3] for b in boxes)
                for y in range(side)
                for x in range(side)
            ]
            for end in ends:
                for layer in layers:
                    for head in range(probs[layer].shape[1] // 2):
                        on = probs[layer][row, head, end, image]
                        losses.append(-(on[torch.tensor(inside)].sum() / on.sum()).log())
    return torch.stack(losses).mean()


def test_the_loss_is_that_of_attention_computed_by_hand(policy, cards):
    batch, names = rows_of(policy, cards, [0, 1, 2, 3])
    supervised_backward(policy, batch, 10**6)
    plain = gradients(policy)
    value = grounded_backward(policy, batch, names, 10**6, 0.0)
    for name, found in gradients(policy).items():
        torch.testing.assert_close(found, plain[name], rtol=1e-3, atol=1e-6)
    losses = []
    # A small step along the grounding loss's own gradient lowers the loss computed by hand by step * |gradient|**2.
    grounded_backward(policy, batch, names, 10**6, 1.0)
    own = {name: grad - plain[name] for name, grad in gradients(policy).items()}
    square = sum(float(g.double().square().sum()) for g in own.values())
    step = 1e-3 / square**0.5
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in policy.model.named_parameters():
                p.add_(own[name] * (sign * step)) if name in own else None
        losses.append(float(mass_by_hand(policy, batch, names)))
        with torch.no_grad():
            for name, p in policy.model.named_parameters():
                p.sub_(own[name] * (sign * step)) if name in own else None
    assert value > 0
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(square, rel=0.02)


def test_parts_of_a_batch_add_up(policy, cards):
    batch, names = rows_of(policy, cards, list(range(6)))
    once = grounded_backward(policy, batch, names[:1] * 6, 10**6, 0.0), gradients(policy)
    parts = grounded_backward(policy, batch, names[:1] * 6, 200, 0.0), gradients(policy)
    assert parts[0] == pytest.approx(once[0], rel=1e-5)
    for name, found in parts[1].items():
        torch.testing.assert_close(found, once[1][name], rtol=1e-3, atol=1e-6)


def test_rows_without_names_are_trained_as_ever(policy, cards):
    batch, _ = rows_of(policy, cards, [0, 1])
    assert grounded_backward(policy, batch, [{}, {}], 10**6, 1.0) > 0
    grounded = gradients(policy)
    supervised_backward(policy, batch, 10**6)
    for name, found in gradients(policy).items():
        torch.testing.assert_close(grounded[name], found, rtol=1e-3, atol=1e-6)


def test_a_few_steps_turn_attention_to_what_is_named(policy, cards):
    batch, names = rows_of(policy, cards, list(range(8)))
    optimiser = torch.optim.Adam(policy.model.parameters(), lr=1e-3)
    before = float(mass_by_hand(policy, batch, names))
    for _ in range(15):
        grounded_backward(policy, batch, names, 10**6, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    assert float(mass_by_hand(policy, batch, names)) < 0.8 * before


@pytest.mark.parametrize("kind", ["drawn", "rendered"])
def test_captions_of_facts_tell_of_the_same_scenes_in_every_sentence(kind):
    world = World(WorldConfig(min_cards=2)) if kind == "drawn" else RenderedWorld()
    facts, pairs = world.source("train", 60, facts_only=True), world.source("train", 60)
    assert list(facts) == list(world.source("train", 60, facts_only=True))
    told = 0
    for fact, pair in zip(facts, pairs, strict=True):
        assert fact.id == pair.id and fact.caption != pair.caption
        assert facts.image(fact.id).tobytes() == pairs.image(pair.id).tobytes()
        spans, boxes = sentence_spans(fact.caption), facts.word_boxes(fact.id)
        shown = [word for word, places in zip(fact.words, boxes, strict=True) if places]
        assert len(spans) > 2
        assert all(any(start <= word.start < end for word in shown) for start, end in spans), fact.caption
        told += len(spans)
    assert told > 60 * 3.5
