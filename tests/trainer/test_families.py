"""Every family against transformers' own forward pass: positions, hidden states, gradients, sampling, whole steps."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
import transformers

from mmrpt.batching import response_slices
from mmrpt.corpus import ImageCache
from mmrpt.engines.rl_step import train_on_groups
from mmrpt.families import feature_levels, freeze_parts, mrope_positions
from mmrpt.lora import adapter_weights, add_adapters
from mmrpt.objective import response_logps, supervised_loss
from mmrpt.optimiser import Optimiser
from mmrpt.policy import OwnForwardPolicy, Policy, QwenVLPolicy
from mmrpt.policy.qwen_vl import FAMILIES
from mmrpt.rollout.collect import collect_round
from mmrpt.rollout.generate import generate
from mmrpt.settings import LoraSettings, OptimiserSettings
from mmrpt.train import main as train
from tests.kernels.integrations.vlm_families import switch_checkpointing
from tests.trainer.conftest import SMALL_RUN, ColourPairs, forward_inputs, masked_colour
from tests.trainer.family_policies import (
    OTHERS,
    group_batch,
    make_family,
    pictures,
    rows_of,
    write_llava,
)
from tests.trainer.test_pretrained import write_pairs

EPS = torch.finfo(torch.float32).eps
OWN = (*OTHERS, "qwen3_5")
SEED = 5


def close(found, wanted):
    """Of float64 weights: transformers' norms and rotary angles are float32, some thirty roundings forward and back."""
    error = (found - wanted).abs().max()
    assert error <= 64 * EPS * wanted.abs().max(), error


# ------------------------------------------------------------------------------------------------ shared prompts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad_left", [False, True])
def test_hidden_states_and_positions_are_the_models_own(family, pad_left):
    policy = make_family(family)
    policy.model.double()
    prompts, pixels, groups = rows_of(policy, (16, 16), (24, 32))
    batch = policy.batch(prompts, [group[1] for group in groups], pixels, [0, 1], pad_left=pad_left)
    inputs = forward_inputs(policy, batch)
    wanted = policy.model.model(**inputs).last_hidden_state
    keep = batch.attention_mask.bool()
    assert not keep.all()
    close(policy.hidden(batch)[keep], wanted[keep])
    own = {
        name: inputs[name] for name in inspect.signature(policy.model.model.get_rope_index).parameters if name in inputs
    }
    positions, _ = policy.model.model.get_rope_index(**own)
    found = mrope_positions(batch.input_ids, batch.attention_mask, pixels.grid_thw, policy.image_token_id, 2)
    assert torch.equal(found[:, keep], positions[:, keep])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_shared_prompts_are_those_of_rows_alone(family):
    """Of all weights, in float64: shared and packed, rows alone and packed, rows alone and padded, and as transformers
    computes them from a copy of the image for each row."""
    policy = make_family(family)
    policy.model.double()
    prompts, pixels, groups = rows_of(policy, (16, 16), (24, 32))
    shared, alone = (policy.group_batch(prompts, groups, pixels, [0, 1], share=share) for share in (True, False))
    assert shared.segments is not None and alone.segments is None
    found = [gradients(policy, batch, policy.hidden(batch)) for batch in (shared, alone)]
    found.append(gradients(policy, shared, policy.hidden(shared, padded=True)))
    found.append(gradients(policy, alone, policy.model.model(**forward_inputs(policy, alone)).last_hidden_state))
    assert len(found[0]) == sum(1 for _ in policy.model.parameters())
    for name in found[0]:
        for other in found[1:]:
            close(other[name], found[0][name])
    assert found[0]["model.visual.patch_embed.proj.weight"].abs().max() > 0


def gradients(policy, batch, hidden) -> dict[str, torch.Tensor]:
    states, ids, mask = response_slices(hidden, batch)
    logps = (states @ policy.head_weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    (logps * torch.arange(1.0, mask.numel() + 1).view(mask.shape))[mask].sum().backward()
    found = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
    policy.model.zero_grad()
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def test_deepstack_features_reach_the_first_layers_and_are_asked_for():
    policy = make_family("qwen3_vl")
    _, pixels, _ = rows_of(policy)
    embeds, deep = policy.image_features(pixels)
    assert embeds.shape == deep.shape and not torch.equal(embeds, deep)
    get = policy.model.model.get_image_features
    policy.model.model.get_image_features = lambda *args: (feature_levels(get(*args), deepstack=True)[:1], [])
    with pytest.raises(ValueError, match=r"gave \(8, 32\): expected \(8, 32\), \(8, 32\)"):
        policy.image_features(pixels)


# ------------------------------------------------------------------------------------------------ any family


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", [*FAMILIES, *OWN])
def test_sampled_log_probs_are_those_of_a_training_pass(family, temperature):
    """Prompts of different lengths; the gap is the rounding of two orders of the same float32 sums of 32 to 96 terms
    through three layers, in logits below 8."""
    policy = make_family(family)
    prompts, pixels, _ = rows_of(policy)
    options = {"group_size": 3, "max_new_tokens": 6, "temperature": temperature, "top_p": 0.9}

    def draw():
        return generate(policy, prompts, pixels, [0, 1], **options, generator=torch.Generator().manual_seed(SEED))

    out = draw()
    policy.model.generation_config.update(num_beams=3, repetition_penalty=5.0)  # as a folder's own settings may say
    again = draw()
    assert policy.model.generation_config.num_beams == 3
    assert out.token_ids == again.token_ids and torch.equal(out.logps, again.logps)
    groups = [[list(ids) for ids in out.token_ids[i : i + 3]] for i in (0, 3)]
    batch = group_batch(policy, prompts, groups, pixels)
    found = response_logps(policy, batch, temperature=temperature or 1.0)
    assert (found - out.logps).abs().max() < 3 * 96 * EPS * 8
    assert not {token for ids in out.token_ids for token in ids} & set(policy.suppressed_ids)
    assert policy.image_token_id in policy.suppressed_ids
    hidden, _, mask = response_slices(policy.hidden(batch), batch)
    assert (hidden - out.hidden)[mask].abs().max() < 3 * 96 * EPS * 8


@pytest.mark.parametrize("family", [*FAMILIES, *OWN])
def test_black_patches_change_log_probs_and_depend_on_their_seed(family):
    policy = make_family(family)
    prompts, pixels, groups = rows_of(policy)
    options = {"patch_size": 8, "probability": 0.5}
    views = [policy.perturbed(pixels, seeds, **options) for seeds in ([1, 2], [1, 2], [3, 4])]
    batches = (group_batch(policy, prompts, groups, view) for view in (pixels, *views))
    clean, one, again, other = (response_logps(policy, batch) for batch in batches)
    assert torch.equal(one, again)
    for a, b in ((clean, one), (one, other)):
        assert (a - b)[:, :1].abs().min() > 100 * EPS  # every response's first token sees another image
    shown = np.asarray(policy.perturbed_picture(pictures()[0], 1, **options))
    assert 0 < (shown == 0).all(-1).mean() < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_own_forward_and_shared_prompts_are_the_same_policy(family):
    shared, own = make_family(family), make_family(family, own=True)
    assert isinstance(shared, QwenVLPolicy) and isinstance(own, OwnForwardPolicy)
    own.check_head()
    drawn = []
    for policy in (shared, own):
        prompts, pixels, _ = rows_of(policy)
        options = {"group_size": 3, "max_new_tokens": 6, "generator": torch.Generator().manual_seed(SEED)}
        drawn.append((prompts, generate(policy, prompts, pixels, [0, 1], **options)))
    (prompts, one), (also, other) = drawn
    assert prompts == also and one.token_ids == other.token_ids
    assert (one.logps - other.logps).abs().max() < 3 * 96 * EPS * 8


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_vl", *OWN])
def test_a_step_of_reinforcement_trains_the_family(family, compute, small_settings, rewards_with_signal):
    """Sampling, perception, loss and optimiser, under gradient checkpointing: weights of every part move."""
    if family == "smolvlm" and compute is torch.bfloat16 and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 puts SmolVLM's features into embeddings of another dtype under autocast")
    policy, pairs = make_family(family), ColourPairs()
    policy.compute = compute
    switch_checkpointing(policy.model, {"use_reentrant": False})
    settings = small_settings("rollout.group_size=4", "rollout.max_new_tokens=4")
    samples = [masked_colour(pairs, i) for i in range(8)]
    images = {sample.example_id: pairs.image(sample.example_id) for sample in samples}
    outcome = collect_round(policy, samples, images, settings, seed=SEED)
    assert outcome.groups and all(group.perception.max() > 0 for group in outcome.groups)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimiser = Optimiser(policy.model.train(), OptimiserSettings(lr=1e-3))
    metrics, _ = train_on_groups(policy, optimiser, outcome.groups, ImageCache(pairs, 1 << 20), settings, step=0)
    # bfloat16: the sampler's products have other shapes than the trainer's, each rounded to 8 bits.
    assert metrics["rollout_logp_gap"] < (3 * 96 * EPS * 8 if compute is torch.float32 else 2**-8 * 8)
    assert metrics["grad_norm"] > 0 and not metrics["skipped"]
    moved = {part_of(policy, name) for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"vision", "merger", "decoder"}


def part_of(policy, name) -> str:
    """By the names of all families here."""
    if "merger" in name or "projector" in name or "connector" in name:
        return "merger"
    return "vision" if "visual" in name or "vision" in name else "decoder"


@pytest.mark.parametrize("frozen", ["vision", "merger", "decoder"])
@pytest.mark.parametrize("family", [*FAMILIES, *OWN])
def test_parts_are_frozen_by_name(family, frozen):
    policy = make_family(family)
    freeze_parts(policy.model, [frozen])
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == (part_of(policy, name) != frozen), name


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_a_folder_of_the_family_runs_from_start_to_end(family, tmp_path, rewards_with_signal, monkeypatch):
    """Warm-up, masking, reinforcement, checkpoints and evaluation, in bfloat16 products; plots take as long again."""
    monkeypatch.setattr("mmrpt.engines.native.report", lambda run: run.folder.path)
    if family == "llava":
        write_llava(tmp_path / "model")
    else:
        make_family(family).write_files(tmp_path / "model")
    given = [f"model.path={tmp_path / 'model'}", "model.gradient_checkpointing=true", "rl.optimiser.lr=1e-3"]
    given += ["warmup.steps=1", "warmup.optimiser.kind=adamw", "rl.steps=2", "rl.max_rounds=1", "rl.kl_coef=0.01"]
    given += ["rl.max_importance=2", "evaluation.samples=2", "data.held_out=3", "rollout.prompts=5", "name=it"]
    assert train([f"output={tmp_path}", *SMALL_RUN, *given, write_pairs(tmp_path)]) == 0
    start, end = (Policy.load(path) for path in (tmp_path / "model", tmp_path / "it" / "checkpoints" / "rl"))
    assert type(end) is (OwnForwardPolicy if family == "llava" else QwenVLPolicy)
    before = dict(start.model.named_parameters())
    moved = {part_of(end, name) for name, p in end.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"vision", "merger", "decoder"}
    rows = [json.loads(line) for line in (tmp_path / "it" / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["rollout_logp_gap"] for row in rows if "rollout_logp_gap" in row]
    assert gaps and max(gaps) < 2**-8 * 8


def test_adapters_train_a_model_of_another_family(tmp_path):
    write_llava(tmp_path / "model")
    policy = Policy.load(tmp_path / "model")
    add_adapters(policy, LoraSettings(rank=2), str(tmp_path / "model"), None, seed=0)
    prompts, pixels, groups = rows_of(policy)
    batch = group_batch(policy, prompts, groups, pixels)
    supervised_loss(policy, batch).backward()
    learning = {name for name, parameter in policy.model.named_parameters() if parameter.grad is not None}
    assert learning and all(".lora_" in name and ".language_model." in name for name in learning)
    with torch.no_grad():
        for parameter in adapter_weights(policy.model).values():
            parameter.add_(0.1)
    policy.write_files(tmp_path / "adapters")
    again = Policy.load(tmp_path / "adapters")
    assert torch.equal(again.hidden(batch), policy.hidden(batch))
    assert not torch.equal(again.hidden(batch), Policy.load(tmp_path / "model").hidden(batch))
