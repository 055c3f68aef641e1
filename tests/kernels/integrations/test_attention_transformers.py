"""Recording visual mass in tiny random VLMs of six families, against the attention weights of eager attention."""

from __future__ import annotations

import contextlib

import pytest
import torch

transformers = pytest.importorskip("transformers")

from benchmarks.measure import peak_bytes  # noqa: E402
from mmrpt_kernels.integrations import transformers as integration  # noqa: E402
from mmrpt_kernels.integrations.transformers import record_visual_mass, register_attention  # noqa: E402
from tests.kernels.integrations.vlm_families import (  # noqa: E402
    BUILDERS,
    IMAGE,
    LAST_IMAGE,
    LAYERS,
    LENGTH,
    TEXT,
    eager,
    inputs_of,
    model_of,
    recorded,
    switch_checkpointing,
)

families = pytest.mark.parametrize("family", BUILDERS)


@contextlib.contextmanager
def counted_attention(monkeypatch):
    """How often our attention runs inside the block, as a list that grows."""
    calls = []
    with monkeypatch.context() as patch:
        for name in ("attention_with_visual_mass", "masked_attention_with_visual_mass"):
            real = getattr(integration, name)
            patch.setattr(integration, name, lambda *a, real=real, **k: (calls.append(1), real(*a, **k))[1])
        yield calls


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Error relative to each parameter's largest gradient, and to the model's: some gradients are zero but for rounding
    (a bias of keys shifts all scores of a row alike)."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name in found.keys() | expected.keys():
        gradient = expected.get(name, torch.zeros(()))
        error = (found.get(name, torch.zeros(())) - gradient).abs().max().item()
        limit = 1e-4 * gradient.abs().max().item() + 8 * torch.finfo(torch.float32).eps * largest
        assert error <= limit, f"{name}: error {error:.2e} > {limit:.2e}"


def gradients_of(model: torch.nn.Module, scalar: torch.Tensor) -> dict[str, torch.Tensor]:
    """d scalar / d parameter, those that are there and not all zero."""
    model.zero_grad()
    scalar.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@families
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_masses_are_those_of_eager_attention(family, padding):
    model, inputs = model_of(family), inputs_of(family, padding)
    logits, expected = eager(model, inputs)
    with record_visual_mass(model, head_reduction="none") as record:
        found = model(**inputs)
    real = inputs["attention_mask"].bool()
    masses = record.stacked()
    assert masses.shape == (LAYERS, 2, 4, inputs["input_ids"].shape[1]) and not masses.requires_grad
    rows = real[None, :, None, :].expand_as(masses)
    torch.testing.assert_close(masses[rows], expected[rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits[real], logits[real], rtol=1e-4, atol=1e-5)
    assert masses.isfinite().all() and found.logits.isfinite().all(), "rows with nothing to attend to stay finite"
    assert masses[rows].max() > 0.05
    record = recorded(model, inputs)
    torch.testing.assert_close(record.stacked(), masses.mean(2))


@families
def test_without_a_recording_it_is_sdpa(family):
    model, inputs = model_of(family), inputs_of(family, "left")
    assert model.config.get_text_config()._attn_implementation == "mmrpt_visual_mass"
    assert model.config.vision_config._attn_implementation == "sdpa"
    ours = model(**inputs).logits
    gradients = gradients_of(model, ours.square().mean())
    model.set_attn_implementation("sdpa")
    theirs = model(**inputs).logits
    expected = gradients_of(model, theirs.square().mean())
    assert torch.equal(ours, theirs) and gradients.keys() == expected.keys()
    for name in expected:
        assert torch.equal(gradients[name], expected[name]), name


@families
@torch.no_grad()
def test_layers_not_wanted_run_sdpa(family, monkeypatch):
    model, inputs = model_of(family), inputs_of(family)
    with counted_attention(monkeypatch) as calls, record_visual_mass(model, layers=[-1, 0]) as record:
        model(**inputs)
    assert sorted(record.masses) == [0, LAYERS - 1] and len(calls) == 2
    with counted_attention(monkeypatch) as calls:
        model(**inputs)
    assert not calls


@families
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(family, reentrant, monkeypatch):
    model, inputs = model_of(family).train(), inputs_of(family, "left")

    def gradients() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        with record_visual_mass(model) as record:
            logits = model(**inputs, use_cache=False).logits
        masses = record.stacked().clone()
        with counted_attention(monkeypatch) as calls:
            found = gradients_of(model, logits.square().mean())
        assert not calls, "the backward pass records nothing"
        assert torch.equal(record.stacked(), masses) and not masses.requires_grad
        return found, masses

    plain, plain_masses = gradients()
    switch_checkpointing(model, {"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed, masses = gradients()
    torch.testing.assert_close(masses, plain_masses, rtol=1e-5, atol=1e-6)
    assert_same_gradients(checkpointed, plain)


@families
def test_differentiable_masses_have_eager_gradients(family):
    model, inputs = model_of(family), inputs_of(family)
    factors = torch.rand(LAYERS, 2, 4, LENGTH, generator=torch.Generator().manual_seed(0))
    _, mass = eager(model, inputs)
    expected = gradients_of(model, (mass * factors).sum())
    record = recorded(model, inputs, differentiable=True, head_reduction="none")
    assert_same_gradients(gradients_of(model, (record.stacked() * factors).sum()), expected)
    switch_checkpointing(model.train(), {"use_reentrant": False})
    refused = pytest.raises(ValueError, match="differentiable: got True under gradient checkpointing")
    with record_visual_mass(model, differentiable=True), refused:
        model(**inputs)


GENERATION = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9, "suppress_tokens": [IMAGE, 4, 5, 6]}


@families
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@torch.no_grad()
def test_generate_records_each_step(family, cache):
    """The last step's masses are the last row of one pass over prompt and answer; windows are long left behind."""
    model, inputs = model_of(family), inputs_of(family, "left")
    settings = GENERATION | {"cache_implementation": cache, "disable_compile": True}
    plain = model.generate(**inputs, **settings)
    steps = []
    with record_visual_mass(model) as record:
        handle = model.register_forward_hook(lambda *_: steps.append(record.stacked().clone()))
        found = model.generate(**inputs, **settings)
        handle.remove()
    assert torch.equal(found, plain)
    assert [tuple(step.shape) for step in steps] == [(LAYERS, 2, LENGTH)] + [(LAYERS, 2, 1)] * 8
    whole = inputs_of(family, "left", extra=found[:, LENGTH:-1])
    _, expected = eager(model, whole)
    rows = torch.cat(steps, dim=2)
    real = whole["attention_mask"].bool()[None].expand_as(rows)
    torch.testing.assert_close(rows[real], expected.mean(2)[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_key_weights_of_every_kind():
    model, inputs = model_of("llava"), inputs_of("llava", "left")
    ids = inputs["input_ids"]
    image = recorded(model, inputs).stacked()
    groups = torch.stack([ids == IMAGE, (ids != IMAGE) & (ids != 0)], dim=-1)
    for weights in (groups, groups.double(), lambda ids: torch.stack([ids == IMAGE, (ids != IMAGE) & (ids != 0)], -1)):
        found = recorded(model, inputs, key_weights=weights).stacked()
        assert found.shape == (*image.shape, 2)
        torch.testing.assert_close(found[..., 0], image, rtol=1e-5, atol=1e-6)
        real = inputs["attention_mask"].bool()[None].expand(LAYERS, -1, -1)
        torch.testing.assert_close(found.sum(-1)[real], torch.ones_like(image[real]))


@torch.no_grad()
def test_calls_with_embeddings_need_weights():
    model, inputs = model_of("llava"), inputs_of("llava")
    visual = inputs["input_ids"] == IMAGE
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with record_visual_mass(model, key_weights=visual) as record:
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    expected = eager(model, {"inputs_embeds": embeds}, visual)[1].mean(2)
    torch.testing.assert_close(record.stacked(), expected, rtol=1e-5, atol=1e-6)
    with record_visual_mass(model), pytest.raises(ValueError, match="without input_ids"):
        model(inputs_embeds=embeds)


@torch.no_grad()
def test_every_forward_starts_afresh_and_base_model_calls_count():
    model, inputs = model_of("qwen2_5_vl"), inputs_of("qwen2_5_vl")
    short = {"input_ids": torch.tensor([[8, 9, 10]])}
    with record_visual_mass(model) as record:
        with pytest.raises(ValueError, match="stacked: got an empty record"):
            record.stacked()
        model(**inputs)
        first = record.stacked()
        model(**short)
        assert record.stacked().shape == (LAYERS, 1, 3) and (record.stacked() == 0).all()
        model.model(**inputs)
        torch.testing.assert_close(record.stacked(), first)
    model(**short)
    assert record.stacked().shape == first.shape, "after the block nothing is recorded"


@torch.no_grad()
def test_query_mask_blanks_the_other_rows():
    model, inputs = model_of("llava"), inputs_of("llava")
    wanted = torch.arange(LENGTH).expand(2, -1) >= LAST_IMAGE
    every = recorded(model, inputs).stacked()
    for reduction in ("mean", "none"):
        record = recorded(model, inputs, query_mask=wanted, head_reduction=reduction)
        found = record.stacked() if reduction == "mean" else record.stacked().mean(2)
        torch.testing.assert_close(found, every * wanted)
    with record_visual_mass(model, query_mask=wanted[:, 1:]), pytest.raises(ValueError, match="query_mask: got shape"):
        model(**inputs)


@torch.no_grad()
def test_the_record_is_layers_times_tokens_and_no_layer_holds_all_pairs():
    model, num_tokens = model_of("llava"), 1500
    inputs = {"input_ids": torch.randint(8, 40, (1, num_tokens), generator=torch.Generator().manual_seed(0))}
    visual = torch.arange(num_tokens)[None] < num_tokens // 2

    def call():
        with record_visual_mass(model, key_weights=visual) as record:
            model.model(**inputs, use_cache=False)
        return record

    masses = call().masses
    assert sum(mass.untyped_storage().nbytes() for mass in masses.values()) == LAYERS * num_tokens * 4
    matrix = 4 * num_tokens**2 * 4  # the weights of four heads, as eager attention has them
    assert peak_bytes(call, torch.device("cpu")) < matrix / 2


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_records_what_a_cpu_does():
    model, inputs = model_of("qwen2_5_vl"), inputs_of("qwen2_5_vl", "left")
    expected = recorded(model, inputs).stacked()
    try:
        model.cuda()
        with record_visual_mass(model) as record:
            model(**{name: x.cuda() for name, x in inputs.items()})
    finally:
        model.cpu()
    real = inputs["attention_mask"].bool()[None].expand_as(expected)
    torch.testing.assert_close(record.stacked().cpu()[real], expected[real], rtol=1e-3, atol=1e-4)


def test_attention_dropout_leaves_the_mass_alone():
    model, inputs = model_of("llava"), inputs_of("llava")
    with record_visual_mass(model) as record, torch.no_grad():
        model(**inputs)
    expected = record.masses[0]
    attentions = [m for m in model.modules() if hasattr(m, "attention_dropout")]
    try:
        for module in attentions:
            module.attention_dropout = 0.5
        with record_visual_mass(model, differentiable=True) as record:
            dropped = model.train()(**inputs).logits
    finally:
        for module in attentions:
            module.attention_dropout = 0.0
    torch.testing.assert_close(record.masses[0].detach(), expected)
    assert record.masses[0].requires_grad
    assert not torch.allclose(dropped, model.eval()(**inputs).logits, atol=1e-3)


def test_autocast():
    model, inputs = model_of("llava"), inputs_of("llava")
    with record_visual_mass(model) as record:
        model(**inputs)
        expected = record.stacked()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits
        logits.float().square().mean().backward()
    assert record.stacked().dtype == torch.float32
    torch.testing.assert_close(record.stacked(), expected, rtol=0.0, atol=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_soft_capped_attention(checkpointing):
    """A text model of its own, with a soft cap that SDPA would ignore: recorded or not, eager's numbers."""
    torch.manual_seed(0)
    text = TEXT | {"head_dim": 8, "attn_logit_softcapping": 0.05, "sliding_window": 6, "query_pre_attn_scalar": 8}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**text)).eval()
    ids = inputs_of("gemma3")["input_ids"]
    expected_logits, expected = eager(model, {"input_ids": ids})
    gradients = gradients_of(model, expected_logits.square().mean())
    if checkpointing:
        switch_checkpointing(model.train(), {"use_reentrant": False})
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected_logits, rtol=1e-4, atol=1e-5)
    with record_visual_mass(model, key_weights=lambda ids: ids == IMAGE) as record:
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(record.stacked(), expected.mean(2), rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients_of(model, logits.square().mean()), gradients)


def test_an_error_in_the_model_ends_its_recording():
    model, inputs = model_of("llava"), inputs_of("llava")
    broken = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with record_visual_mass(model) as record:
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        broken.remove()
        assert integration._WINDOW.get() is None
        model(**inputs)
    assert sorted(record.masses) == list(range(LAYERS))


VISUAL = inputs_of("llava")["input_ids"] == IMAGE
BAD_RECORDINGS = [
    ({"layers": [3]}, r"layers: got \[3\]"),
    ({"layers": []}, r"layers: got \[\]"),
    ({"head_reduction": "max"}, "head_reduction: got 'max'"),
    ({"key_weights": VISUAL.repeat(2, 1)[:3]}, r"key_weights: got shape \(3, 14\) for a batch of 2"),
    ({"key_weights": torch.nn.functional.pad(VISUAL, (0, 1))}, "key_weights: got 15 keys, expected at most 14"),
    ({"key_weights": lambda ids: ids[:, 1:] == IMAGE}, r"key_weights\(input_ids\): got"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD_RECORDINGS, ids=lambda value: value if type(value) is str else "")
def test_bad_recordings_are_refused(keywords, message):
    model = model_of("llava")
    with pytest.raises(ValueError, match=message), record_visual_mass(model, **keywords):
        model(**inputs_of("llava"))


def test_bad_calls_are_refused():
    model, inputs = model_of("llava"), inputs_of("llava")
    with record_visual_mass(model), pytest.raises(ValueError, match="being recorded already"):
        record_visual_mass(model).__enter__()
    with record_visual_mass(model), pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model(pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="expected one without 'flash'"):
        register_attention("my_flash")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="call enable_visual_mass"), record_visual_mass(model):
        pass
    assert register_attention() == register_attention() == "mmrpt_visual_mass"
