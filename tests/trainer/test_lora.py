"""LoRA adapters: where they go, what they leave alone, and that whatever reads or writes a model knows of them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from mmrpt import families
from mmrpt.captions import caption_batch
from mmrpt.checkpoint import STATE_FILE, load_checkpoint, save_checkpoint
from mmrpt.export import main as export
from mmrpt.lora import CONFIG, WEIGHTS, adapter_weights, add_adapters, copied, imported, with_weights
from mmrpt.objective import response_logps, supervised_loss
from mmrpt.optimiser import Optimiser
from mmrpt.policy import Policy
from mmrpt.rollout.generate import generate
from mmrpt.run_folder import RunError
from mmrpt.settings import LoraSettings, OptimiserSettings, PromptSettings, SettingsError
from tests.trainer.conftest import ColourPairs, forward_inputs, make_looking_policy

peft = pytest.importorskip("peft", reason="needs peft: pip install 'mmrpt[lora]'")
EPS = torch.finfo(torch.float32).eps
BF16_EPS = torch.finfo(torch.bfloat16).eps
RANK_4 = LoraSettings(rank=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model whose words depend on the image."""
    folder = tmp_path_factory.mktemp("base")
    make_looking_policy().write_files(folder)
    return folder


@pytest.fixture
def adapted(base):
    """A function: the base with adapters, which change nothing yet, or by `moved` as much as if they were trained."""

    def make(lora=RANK_4, dtype=torch.float32, seed=0, moved=0.0):
        policy = Policy.load(base, dtype)
        add_adapters(policy, lora, str(base), None, seed)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter_weights(policy.model).values():
                parameter.add_(moved * torch.randn(parameter.shape, generator=generator))
        return policy

    return make


def rows(policy, count=3):
    return caption_batch(policy, ColourPairs(), range(count), PromptSettings(), restore_fraction=0.2, seed=0)


@torch.no_grad()
def states(policy):
    return policy.hidden(rows(policy)).float()


def names_of(policy):
    """The adapted layers, by their names in the plain model."""
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter_weights(policy.model)}


def linears(base, under):
    modules = Policy.load(base).model.named_modules()
    return {name for name, module in modules if isinstance(module, nn.Linear) and name.startswith(under)}


# ------------------------------------------------------------------------------------------------ where they go


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_nothing_and_they_alone_are_trained(adapted, base, dtype):
    policy, plain = adapted(dtype=dtype), Policy.load(base, dtype)
    assert type(policy.model) is type(plain.model) and policy.text_model is policy.model.model.language_model
    assert policy.head_weight is policy.model.lm_head.weight and policy.model.dtype == dtype
    assert torch.equal(states(policy), states(plain))
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapter_weights(policy.model).values()}
    assert {p.dtype for p in trained} == {torch.float32}


def test_targets(adapted, base):
    decoder = linears(base, "model.language_model.")
    everything = linears(base, "model.")
    assert len(decoder) == 14 and any(".visual.merger." in name for name in everything)
    assert names_of(adapted()) == decoder
    assert names_of(adapted(LoraSettings(rank=2, targets="all"))) == everything
    chosen = names_of(adapted(LoraSettings(rank=2, targets=("q_proj", "self_attn.o_proj"))))
    assert chosen == {name for name in decoder if name.endswith(("q_proj", "self_attn.o_proj"))}


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("lm_head", "which is lm_head: embedding and lm head get no adapters"),
        ("embed_tokens", "which is model.language_model.embed_tokens: embedding"),
        ("q_prij", "no module of Qwen2_5_VLForConditionalGeneration is called"),
        ("input_layernorm", "peft refuses model.lora.targets: .*not supported"),
    ],
)
def test_targets_that_get_no_adapters_are_refused(adapted, target, told):
    with pytest.raises(SettingsError, match=told):
        adapted(LoraSettings(rank=2, targets=("k_proj", target)))


def test_the_first_weights_depend_on_the_seed_alone(adapted):
    first = copied(adapted(seed=3).model)
    torch.rand(5)
    again, other = copied(adapted(seed=3).model), copied(adapted(seed=4).model)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)
    layer = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
    width = first[layer].shape[1]  # uniform in +- 1/sqrt(width), as peft's
    assert 0.5 * width**-0.5 < first[layer].abs().max() <= width**-0.5


def test_alpha_is_twice_the_rank_unless_given(adapted):
    assert adapted(LoraSettings(rank=3)).model.peft_config["default"].lora_alpha == 6
    assert adapted(LoraSettings(rank=3, alpha=5)).model.peft_config["default"].lora_alpha == 5


def test_a_package_that_is_missing_is_named(monkeypatch):
    with pytest.raises(SettingsError, match=r"pip install no_such_package, or pip install 'mmrpt\[lora\]'"):
        imported("no_such_package", "lora")


# ------------------------------------------------------------------------------------------------ training


def test_recomputed_activations_give_the_same_gradients(adapted):
    gradients = []
    for recomputed in (False, True):
        policy = adapted(moved=0.05)
        policy.model.train()
        if recomputed:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        supervised_loss(policy, rows(policy)).backward()
        gradients.append({name: p.grad for name, p in adapter_weights(policy.model).items()})
        assert all(p.grad is None for p in policy.model.parameters() if not p.requires_grad)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients[1].values())


def test_gradients_are_those_of_the_merged_weights(adapted, base):
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, where W + s B A is the weight of an ordinary model."""
    policy, plain = adapted(moved=0.05), Policy.load(base)
    weights = copied(policy.model)
    factors = {}
    with torch.no_grad():
        for name in names_of(policy):
            a, b = (weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            factors[name] = a, b
            plain.model.get_submodule(name).weight.add_(2 * b @ a)  # alpha / rank = 2
    for model in (policy, plain):
        supervised_loss(model, rows(model)).backward()
    found = {name: p.grad for name, p in adapter_weights(policy.model).items()}
    for name, (a, b) in factors.items():
        whole = plain.model.get_submodule(name).weight.grad
        for x, wanted in (("A", 2 * b.T @ whole), ("B", 2 * whole @ a.T)):
            got = found[f"base_model.model.{name}.lora_{x}.weight"]
            # Two ways to the same sums through 2 layers of some 10 products each: rounding, far below one part in 1000.
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_half_precision_weights_stay_and_float32_adapters_learn(adapted, base):
    """The losses of two batches differ by the batch, so all steps see one; bfloat16 rounding is a share of 2**-8."""
    policy = adapted(dtype=torch.bfloat16)
    policy.compute = torch.bfloat16
    optimiser, losses = Optimiser(policy.model, OptimiserSettings(lr=1e-2, warmup_steps=0)), []
    for step in range(8):
        loss = supervised_loss(policy, rows(policy))
        loss.backward()
        losses.append(loss.item())
        optimiser.step(step, 8)
    assert losses[-1] < losses[0] * (1 - 8 * BF16_EPS), losses
    plain = dict(Policy.load(base, torch.bfloat16).model.named_parameters())
    kept = {n.replace(".base_layer", ""): p for n, p in policy.model.named_parameters() if not p.requires_grad}
    assert kept.keys() == plain.keys() and all(torch.equal(kept[name], plain[name]) for name in plain)
    assert all(p.dtype == torch.float32 for p in adapter_weights(policy.model).values())


def test_adapters_of_the_tower_are_the_towers(adapted):
    """Its learning rate is theirs, decoder's and tower's adapters are decayed as matrices, and nothing else is held."""
    policy = adapted(LoraSettings(rank=2, targets="all"), moved=0.05)
    before = copied(policy.model)
    optimiser = Optimiser(policy.model, OptimiserSettings(vision_scale=0.0, warmup_steps=0))
    assert {group["weight_decay"] for part in optimiser.parts for group in part.param_groups} == {0.01}
    supervised_loss(policy, rows(policy)).backward()
    optimiser.step(0, 1)
    for name, weight in copied(policy.model).items():
        assert torch.equal(weight, before[name]) == (".visual." in name), name
    assert {p for part in optimiser.parts for p in part.state} == set(adapter_weights(policy.model).values())


def test_sampling_and_log_probs_are_of_the_adapted_weights(adapted):
    policy, pairs = adapted(moved=0.1), ColourPairs()
    pixels, prompts = policy.pixels([pairs.image(pairs[0].id)]), [policy.encode_prompt("describe", 4)]
    options = {"group_size": 3, "max_new_tokens": 5}
    out = generate(policy, prompts, pixels, [0], **options, generator=torch.Generator().manual_seed(0))
    batch = policy.group_batch(prompts, [[list(ids) for ids in out.token_ids]], pixels, [0], share=True)
    gap = (response_logps(policy, batch) - out.logps).abs().max()
    with with_weights(policy, {name: 0 * weight for name, weight in copied(policy.model).items()}):
        plain = response_logps(policy, batch)
    assert gap < 1e-4 < 0.01 < (plain - out.logps).abs().max()


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_other_adapters_for_a_while(adapted, compute):
    """Inside an autocast that remembers what it cast, between a loss and its gradient."""
    policy, other = adapted(moved=0.1), adapted(seed=5, moved=0.2)
    policy.compute = other.compute = compute
    weights, batch = copied(other.model), rows(policy)
    supervised_loss(policy, batch).backward()
    once = {name: p.grad.clone() for name, p in adapter_weights(policy.model).items()}
    before = copied(policy.model)
    policy.model.train()
    with policy.autocast():
        loss = supervised_loss(policy, batch)
        with with_weights(policy, weights) as reference:
            assert reference is policy and not policy.model.training
            inside = policy.hidden(batch)
        assert not inside.requires_grad and policy.model.training
        after = policy.hidden(batch).detach()
    with other.autocast():
        assert torch.equal(inside, other.hidden(batch))
    assert torch.equal(after, policy.hidden(batch)) and not torch.equal(after, inside)
    loss.backward()
    for name, parameter in adapter_weights(policy.model).items():
        assert parameter.requires_grad and torch.equal(parameter, before[name])
        assert torch.equal(parameter.grad, once[name] + once[name])  # the same loss again


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_holds_the_adapters_alone_and_comes_back_in_place(adapted, tmp_path):
    policy, other = adapted(moved=0.1), adapted(seed=9)
    save_checkpoint(tmp_path / "rl-3", policy, {"step": 3})
    names = {path.name for path in (tmp_path / "rl-3").iterdir()}
    assert {CONFIG, WEIGHTS, STATE_FILE, "tokenizer_config.json", "preprocessor_config.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    saved = load_file(tmp_path / "rl-3" / WEIGHTS)
    assert saved.keys() == adapter_weights(policy.model).keys()
    parameters = list(other.model.parameters())
    assert load_checkpoint(tmp_path / "rl-3", other) == {"step": 3}
    assert all(a is b for a, b in zip(parameters, other.model.parameters(), strict=True))
    assert torch.equal(states(other), states(policy))


def test_other_programs_open_the_adapters(adapted, base, tmp_path):
    policy = adapted(moved=0.1)
    policy.write_files(tmp_path / "adapters")
    plain = AutoModelForImageTextToText.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapters")).eval()
    config = json.loads((tmp_path / "adapters" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base) and config["revision"] is None
    with torch.no_grad():
        found = model.base_model.model.model(**forward_inputs(policy, rows(policy))).last_hidden_state
    mask = rows(policy).attention_mask.bool()
    torch.testing.assert_close(found[mask], states(policy)[mask], rtol=1e-4, atol=1e-4)


def test_checkpoints_of_another_kind_are_refused(adapted, base, tmp_path):
    policy, plain = adapted(), Policy.load(base)
    save_checkpoint(tmp_path / "adapters", policy, {})
    save_checkpoint(tmp_path / "whole", plain, {})
    with pytest.raises(RunError, match=r"adapters holds adapters alone .* this run trains all weights"):
        load_checkpoint(tmp_path / "adapters", plain)
    with pytest.raises(RunError, match=r"whole holds all weights .* this run trains adapters alone"):
        load_checkpoint(tmp_path / "whole", policy)
    with pytest.raises(RunError, match=r"cannot be read .*lora_A.weight is \(4, \d+\), expected \(2, \d+\)"):
        load_checkpoint(tmp_path / "adapters", adapted(LoraSettings(rank=2)))
    with pytest.raises(RunError, match=r"cannot be read .*adapters are not on both sides"):
        load_checkpoint(tmp_path / "adapters", adapted(LoraSettings(rank=4, targets=("q_proj",))))


def test_a_folder_of_adapters_opens_with_its_model(adapted, base, tmp_path):
    policy = adapted(moved=0.1)
    policy.write_files(tmp_path / "adapters")
    assert torch.equal(states(Policy.load(tmp_path / "adapters")), states(policy))
    file = tmp_path / "adapters" / CONFIG
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/model"}))
    with pytest.raises(FileNotFoundError, match=r"for the model /no/such/model: .*no such folder.* base_model_name_or"):
        Policy.load(tmp_path / "adapters")
    # Bytes that are not the adapters' own are not passed over.
    file.write_text(json.dumps(config))
    save_file({**load_file(file.with_name(WEIGHTS)), "bias": torch.zeros(1)}, file.with_name(WEIGHTS))
    with pytest.raises(ValueError, match="adapters are not on both sides, the first bias"):
        Policy.load(tmp_path / "adapters")


def test_the_model_of_a_hub_name_is_opened_at_its_revision(base, tmp_path, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr(families, "snapshot_download", download)
    policy = Policy.load("org/model", revision="v2")
    add_adapters(policy, RANK_4, "org/model", "v2", seed=0)
    policy.write_files(tmp_path)
    assert copied(Policy.load(tmp_path).model).keys() == copied(policy.model).keys()
    assert asked == [("org/model", "v2")] * 2


# ------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_adapters_are_an_ordinary_model(adapted, base, tmp_path, dtype, capsys):
    """Merged weights are W + s B A in the model's own type, to which the product and the sum are rounded."""
    typed = tmp_path / "typed"
    Policy.load(base, dtype).write_files(typed)
    policy = adapted(moved=0.1)
    policy.model.peft_config["default"].base_model_name_or_path = str(typed)
    save_checkpoint(tmp_path / "rl", policy, {})
    assert export([str(tmp_path / "rl"), str(tmp_path / "out")]) == 0
    assert not {CONFIG, WEIGHTS, STATE_FILE} & {path.name for path in (tmp_path / "out").iterdir()}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype
    weights, plain = copied(policy.model), dict(Policy.load(typed, dtype).model.named_parameters())
    for name, merged in model.named_parameters():
        if name.removesuffix(".weight") not in names_of(policy) or name.endswith("bias"):
            assert torch.equal(merged, plain[name]), name
            continue
        a, b = (weights[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"].double() for x in "AB")
        product, size = 2 * b @ a, 2 * b.abs() @ a.abs()  # of rank 4: five roundings in float32
        wanted = plain[name].double() + product
        bound = torch.finfo(dtype).eps / 2 * (1 + BF16_EPS) * (product.abs() + wanted.abs()) + 3 * EPS * size
        assert ((merged.double() - wanted).abs() <= bound).all(), name
    if dtype == torch.float32:
        with torch.no_grad():
            found = model.model(**forward_inputs(policy, rows(policy))).last_hidden_state @ model.lm_head.weight.T
        mask = rows(policy).attention_mask.bool()
        torch.testing.assert_close(found[mask], (states(policy) @ policy.head_weight.T)[mask], rtol=1e-4, atol=1e-4)
    opened = Policy.load(tmp_path / "out", dtype)
    assert opened.image_processor.size == policy.image_processor.size
    capsys.readouterr()
    assert export([str(tmp_path / "rl"), str(tmp_path / "out")]) == 2
    assert "out exists already: remove it or choose another folder" in capsys.readouterr().err


def test_an_exported_checkpoint_of_all_weights_is_a_copy(base, tmp_path, capsys):
    save_checkpoint(tmp_path / "rl", Policy.load(base), {"step": 1})
    (tmp_path / "out").mkdir()  # empty: not in the way
    assert export([str(tmp_path / "rl"), str(tmp_path / "out")]) == 0
    kept = {p.name: p.read_bytes() for p in (tmp_path / "rl").iterdir() if p.name != STATE_FILE}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == kept
    assert export([str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert "no config.json in" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rl"]


def test_an_export_that_fails_leaves_nothing(adapted, tmp_path, capsys):
    adapted().write_files(tmp_path / "rl")
    shutil.copy(tmp_path / "rl" / CONFIG, tmp_path / "rl" / WEIGHTS)
    assert export([str(tmp_path / "rl"), str(tmp_path / "out")]) == 2
    assert f"({tmp_path / 'rl'} could not be exported)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rl"]
