"""Recording behind a key-value cache: under any name, in any form that is understood, and refused where it is not."""

from __future__ import annotations

import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from mmrpt_kernels.integrations import transformers as integration  # noqa: E402
from mmrpt_kernels.integrations.caches import cache_keyword, find_cache, key_counts  # noqa: E402
from mmrpt_kernels.integrations.transformers import record_visual_mass  # noqa: E402
from tests.kernels.integrations.vlm_families import (  # noqa: E402
    IMAGE,
    LAYERS,
    LENGTH,
    eager,
    enabled,
    inputs_of,
    model_of,
)


def text_of(family: str, **settings) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The family's text model, ids (2, LENGTH) without padding, and their masses (L, 2, LENGTH) by eager attention."""
    model, ids = model_of(family).get_decoder(), inputs_of(family)["input_ids"]
    return enabled(model), ids, eager(model, {"input_ids": ids})[1].mean(2)


def cache_of(kind: str, model: torch.nn.Module):
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    if kind == "plain":  # one that does not know of sliding windows and keeps all keys
        return transformers.DynamicCache()
    return transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 3)


class OtherName(torch.nn.Module):
    """A model of a release in which the cache has another name, and is perhaps wrapped into something else."""

    def __init__(self, model: torch.nn.Module, boxed: bool) -> None:
        super().__init__()
        self.module, self.boxed = model, boxed
        self.keyword = cache_keyword(model.forward)

    def forward(self, input_ids: torch.Tensor, key_store=None):
        cache = key_store[0] if self.boxed else key_store
        handle = self.module.forward  # not a call of the module: its hooks would see the cache under the known name
        return handle(input_ids=input_ids, **{self.keyword: cache})


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("kind", ["dynamic", "plain", "static"])
@pytest.mark.parametrize("sizes", [(14,), (5, 4, 5), (3, 8, 1, 1, 1), (1,) * 14])
@torch.no_grad()
def test_chunks_behind_a_cache_are_rows_of_one_pass(family, kind, sizes):
    """A cache that starts empty, chunks of a prompt, single steps: with windows that fill at any of them."""
    model, ids, expected = text_of(family)
    cache, rows = cache_of(kind, model), []
    with record_visual_mass(model, key_weights=lambda ids: ids == IMAGE) as record:
        for part in ids.split(sizes, dim=1):
            model(part, **{cache_keyword(model.forward): cache}, use_cache=True)
            rows.append(record.stacked())
    torch.testing.assert_close(torch.cat(rows, -1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["position", "other name"])
@torch.no_grad()
def test_a_cache_is_found_at_any_place_and_under_any_name(how):
    model, ids, expected = text_of("llava")
    cache, outer = cache_of("dynamic", model), model if how == "position" else OtherName(model, boxed=False)
    with record_visual_mass(outer, key_weights=lambda ids: ids == IMAGE) as record:
        for part in ids.split((10, 4), dim=1):
            _ = outer(part, None, None, cache) if how == "position" else outer(part, key_store=cache)
    torch.testing.assert_close(record.stacked(), expected[..., 10:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["tensor", "function"])
@pytest.mark.parametrize("kind", ["dynamic", "plain", "static"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_a_cache_that_is_not_recognised_is_refused(family, kind, weights):
    """What 5.24's renaming did to 0.1.0: every step looked like the first of a sequence."""
    model, ids, _ = text_of(family)
    box = [cache_of(kind, model)]
    weights = (ids == IMAGE)[:, :11] if weights == "tensor" else (lambda ids: ids == IMAGE)
    renamed = OtherName(model, boxed=True)
    renamed(ids[:, :10], key_store=box)
    with (
        record_visual_mass(renamed, key_weights=weights),
        pytest.raises(ValueError, match=r"got 1 queries and \d+ keys"),
    ):
        renamed(ids[:, 10:11], key_store=box)


@torch.no_grad()
def test_a_static_cache_that_does_not_tell_its_size_is_refused():
    model, ids, _ = text_of("llava")

    class Silent(transformers.StaticCache):
        get_mask_sizes = None

    class Renamed(transformers.StaticCache):
        def get_mask_sizes(self, rows, layer_idx):
            return super().get_mask_sizes(rows, layer_idx)

    for kind in (Silent, Renamed):
        cache = kind(config=model.config, max_cache_len=32)
        assert key_counts(cache, 0, LENGTH, range(LAYERS)) == {LENGTH}
    with record_visual_mass(model, key_weights=ids == IMAGE), pytest.raises(ValueError, match="and 32 keys in layer 0"):
        model(ids, **{cache_keyword(model.forward): cache})


@torch.no_grad()
def test_a_cache_that_the_recording_has_not_seen_is_refused():
    """Of another sequence, which began meanwhile or before: without ids of the whole, or weights for it."""
    model, ids, expected = text_of("llava")
    first, second, third, fourth = (cache_of("dynamic", model) for _ in range(4))
    keyword = cache_keyword(model.forward)
    for cache in (third, fourth):
        model(ids[:, :-1], **{keyword: cache})
    with record_visual_mass(model, key_weights=lambda ids: ids == IMAGE):
        model(ids[:, :-1], **{keyword: first})
        model(ids.flip(1), **{keyword: second})
        with pytest.raises(ValueError, match="expected it to start with the prompt and to go on with the same cache"):
            model(ids[:, -1:], **{keyword: first})
    refused = pytest.raises(ValueError, match="after 13 cached tokens")
    with record_visual_mass(model, key_weights=lambda ids: ids == IMAGE), refused:
        model(ids[:, -1:], **{keyword: third})
    with record_visual_mass(model, key_weights=ids == IMAGE) as record:
        model(ids[:, -1:], **{keyword: fourth})
    torch.testing.assert_close(record.stacked(), expected[..., -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_beam_search(family, cache, monkeypatch):
    """Beams exchange the rows of the cache: right for image tokens, refused where sampled tokens have weights."""
    model, inputs = model_of(family), inputs_of(family, "left")
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9}
    settings |= {"suppress_tokens": [IMAGE], "cache_implementation": cache, "disable_compile": True}
    prepare, seen = model.prepare_inputs_for_generation, []

    @functools.wraps(prepare)
    def watched(input_ids, *args, **kwargs):
        seen.append(input_ids.clone())
        return prepare(input_ids, *args, **kwargs)

    monkeypatch.setattr(model, "prepare_inputs_for_generation", watched)
    with record_visual_mass(model) as record:
        model.generate(**inputs, **settings)
    ids = seen[-1]
    whole = inputs_of(family, "left", extra=torch.zeros(2, ids.shape[1] - LENGTH, dtype=torch.long))
    whole = {name: value.repeat_interleave(3, 0) for name, value in whole.items()} | {"input_ids": ids}
    expected = eager(model, whole)[1].mean(2)[..., -1:]
    torch.testing.assert_close(record.stacked(), expected, rtol=1e-4, atol=1e-5)
    refused = pytest.raises(ValueError, match="rows were exchanged")
    with record_visual_mass(model, key_weights=lambda ids: ids % 2 == 0), refused:
        model.generate(**inputs, **settings)


@torch.no_grad()
def test_a_layer_that_is_skipped_is_told(monkeypatch):
    model, ids, _ = text_of("llava")
    monkeypatch.setattr(model.layers[1], "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    with record_visual_mass(model, key_weights=ids == IMAGE), pytest.raises(ValueError, match=r"from layers \[1\]"):
        model(ids)
    assert integration._WINDOW.get() is None
    with record_visual_mass(model, key_weights=ids == IMAGE, layers=[0, 2]) as record:
        model(ids)
    assert sorted(record.masses) == [0, 2]


@torch.no_grad()
def test_a_layer_that_drops_queries_is_told():
    model, ids, _ = text_of("llava")
    attend = integration._attention_forward
    transformers.AttentionInterface.register(
        integration.DEFAULT_NAME, lambda module, query, *rest, **kw: attend(module, query[:, :, -1:], *rest, **kw)
    )
    try:
        with (
            record_visual_mass(model, key_weights=ids == IMAGE),
            pytest.raises(ValueError, match="got 1 queries and 14"),
        ):
            model(ids)
    finally:
        integration.register_attention()


@pytest.mark.parametrize("name", ["s_aux", "sinks", "head_mask", "indices", "block_indices", "position_bias"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_tensors_that_attention_would_ignore_are_refused(name, softcap):
    """Sinks, biases and chosen keys, whatever their name: in layers that are not recorded too."""
    q, kv = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    module = model_of("llava").get_decoder().layers[0].self_attn
    attend = functools.partial(integration._attention_forward, module, q, kv, kv, None, softcap=softcap)
    attend(position_ids=torch.arange(3)[None], sliding_window=4, **{name: None})
    if name in integration._SERVED_BY_SDPA and softcap is None:
        pytest.skip("this release's SDPA attention adds it")
    with pytest.raises(ValueError, match=f"{name}: got a tensor among an attention layer's arguments"):
        attend(**{name: torch.zeros(4, dtype=torch.int64 if "indices" in name else torch.float32)})


def test_checkpointing_that_no_layer_tells_of_is_refused(monkeypatch):
    model, ids, _ = text_of("llava")
    name = next(n for n in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(type(model), n))
    monkeypatch.setattr(type(model), name, True)
    with (
        record_visual_mass(model, key_weights=ids == IMAGE),
        pytest.raises(ValueError, match=f"got {name}=True and no"),
    ):
        model.train()(ids)


def test_names_of_the_cache():
    cache = transformers.DynamicCache()
    assert cache_keyword(lambda input_ids, cache=None, past_key_values=None: 0) == "cache"
    assert cache_keyword(lambda input_ids, past_key_values=None: 0) == "past_key_values"
    with pytest.raises(ValueError, match=r"takes \(input_ids, kwargs\), expected one of"):
        cache_keyword(lambda input_ids, **kwargs: 0)
    assert find_cache((1, cache), {"cache": None}) is cache
    assert find_cache((), {"past_key_values": cache, "cache": cache}) is cache
    assert find_cache((torch.zeros(1),), {"use_cache": True}) is None
    with pytest.raises(ValueError, match="past_key_values: got tuple without get_seq_length"):
        find_cache((), {"past_key_values": ((torch.zeros(1), torch.zeros(1)),)})
    with pytest.raises(ValueError, match="got 2 caches"):
        find_cache((cache,), {"cache": transformers.DynamicCache()})
