"""Whole runs with LoRA: what settings contradict, every phase, and other command lines on what a run leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmrpt.corpus import read_jsonl
from mmrpt.engines.run import check_dtype, open_run
from mmrpt.evaluate import main as evaluate
from mmrpt.lora import CONFIG, WEIGHTS, adapter_weights, add_adapters, check_lora, copied
from mmrpt.mask import main as mask
from mmrpt.policy import Policy
from mmrpt.settings import LoraSettings, SettingsError, load_settings, settings_help
from mmrpt.train import main as train
from mmrpt.world.tiny_vlm import build_tiny_vlm
from tests.trainer.conftest import SMALL_RUN, TINY, ColourPairs, make_looking_policy
from tests.trainer.test_pretrained import trained, write_pairs

pytest.importorskip("peft", reason="needs peft: pip install 'mmrpt[lora]'")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def given(tmp_path):
    """Overrides of a short run of a model on disk with adapters."""
    make_looking_policy().write_files(tmp_path / "model")
    short = ["warmup.steps=3", "rl.steps=3", "rl.max_rounds=1", "evaluation.samples=2", "data.held_out=3"]
    rates = ["warmup.optimiser.lr=1e-2", "rl.optimiser.lr=1e-2", "rollout.prompts=5"]
    model = [f"model.path={tmp_path / 'model'}", "model.lora.rank=4"]
    return [f"output={tmp_path}", *SMALL_RUN, *short, *rates, *model, write_pairs(tmp_path)]


# ------------------------------------------------------------------------------------------------ settings


def test_adapters_have_defaults_of_their_own_and_what_is_given_wins(tmp_path):
    given = ["model.path=/m", "model.lora.rank=8"]
    settings = load_settings(None, given)
    assert settings.rl.optimiser.lr == settings.warmup.optimiser.lr == 1e-5 and settings.model.dtype == "bfloat16"
    assert settings.model.compute == "bfloat16" and settings.rollout.max_new_tokens == 2048
    check_lora(settings), check_dtype(settings)
    mine = load_settings(None, [*given, "rl.optimiser.lr=2e-4", "model.dtype=float32"])
    assert (mine.rl.optimiser.lr, mine.warmup.optimiser.lr, mine.model.dtype) == (2e-4, 1e-5, "float32")
    (tmp_path / "a.yaml").write_text("model: {path: /m, lora: {rank: 8}}\n")
    assert load_settings(tmp_path / "a.yaml") == settings
    assert load_settings(None, ["model.path=/m", "model.lora.rank=0"]) == load_settings(None, ["model.path=/m"])
    told = " ".join(settings_help().split()).rpartition("then with model.lora.rank: ")[2].split()
    assert {*told} == {"model.dtype='bfloat16'", "warmup.optimiser.lr=1e-05", "rl.optimiser.lr=1e-05"}


def test_adapters_of_a_given_model_are_shown(capsys):
    assert train(["--show", "model.path=/m", "model.lora.rank=8", "model.lora.targets=[q_proj]"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["model"]
    assert shown["lora"] == {"rank": 8, "alpha": None, "targets": ["q_proj"], "quantized": False}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.lora.rank=8"], "model.lora.rank is 8 and model.path is null"),
        (["model.lora.quantized=true"], "model.lora.quantized is true and model.path is null"),
        (["model.path=/m", "model.lora.quantized=true"], "quantized is true and model.lora.rank is 0: .*set a rank"),
        (["model.path=/m", "model.lora.rank=8", "model.freeze=[vision]"], r"model.freeze is \['vision'\]: beneath"),
        (["model.path=/m", "model.lora.rank=8", "rl.optimiser.kind=muon"], "rl.optimiser.kind is muon: .*use adamw"),
    ],
)
def test_what_contradicts_adapters_is_refused_before_a_model_is_opened(tmp_path, overrides, told):
    with pytest.raises(SettingsError, match=told):
        open_run(load_settings(None, [f"output={tmp_path}", "name=a", *overrides]))


# ------------------------------------------------------------------------------------------------ whole runs


def test_adapters_go_through_every_phase_and_leave_the_model_alone(given, tmp_path, capsys, rewards_with_signal):
    before = bytes_of(tmp_path / "model")
    exact = ["model.dtype=float32", "model.compute=float32"]
    assert train([*given, *exact, "name=it", "rl.kl_coef=0.1", "rl.max_importance=2", "rl.statistics_every=1"]) == 0
    assert bytes_of(tmp_path / "model") == before
    checkpoints = tmp_path / "it" / "checkpoints"
    weights = {phase.name: load_file(phase / WEIGHTS) for phase in checkpoints.iterdir()}
    assert weights.keys() == {"warmup", "rl", "control"}
    for phase, own in weights.items():
        assert not list((checkpoints / phase).glob("model*.safetensors"))
        others = [weights[other] for other in weights if other != phase]
        assert all(value.isfinite().all() for value in own.values())
        assert not any(torch.equal(own[name], other[name]) for other in others for name in own if ".lora_B." in name)
    rows = read_jsonl(tmp_path / "it" / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in rows)
    first, *later = [row["ref_kl"] for row in rows if row["phase"] == "rl"]
    assert abs(first) < 1e-6 < min(later)  # the reference is the warm start
    capsys.readouterr()

    # What a run leaves is a model for the other command lines, with the run's settings or without.
    config = tmp_path / "it" / "config.yaml"
    folders = [str(checkpoints / "rl"), str(tmp_path / "model")]
    assert evaluate([*folders, "--config", str(config), "--out", str(tmp_path / "e")]) == 0
    judged = {row["model"] for row in json.loads((tmp_path / "e" / "evaluation.json").read_text())["rows"]}
    assert judged == {*folders}
    pairs = next(item for item in given if item.startswith("data.pairs="))
    scores = []
    for name, model in (("adapted", checkpoints / "rl"), ("plain", tmp_path / "model")):
        masks = [f"output={tmp_path}", f"name={name}", f"model.path={model}", pairs, "masking.threshold=mean_std:-9"]
        assert mask([*masks, "device=cpu"]) == 0
        scores.append([row["score"] for row in read_jsonl(tmp_path / name / "scores.jsonl")])
    assert scores[0] != scores[1]


def test_adapters_are_trained_on_and_merged_by_name(given, tmp_path, capsys, rewards_with_signal):
    assert train([*given, "name=first", "rl.steps=0"]) == 0
    end = tmp_path / "first" / "checkpoints" / "warmup"
    again = [*given, f"model.path={end}", "warmup.steps=0", "rl.steps=1", "control.kinds=[]"]
    run = open_run(load_settings(None, [*again, "name=opened"]))
    assert all(torch.equal(value, load_file(end / WEIGHTS)[name]) for name, value in run.start_adapters.items())
    assert train([*again, "name=second"]) == 0
    saved = json.loads((tmp_path / "second" / "checkpoints" / "rl" / CONFIG).read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "model")
    capsys.readouterr()
    assert train([*again, "name=third", "model.lora.rank=8"]) == 2
    assert "adapters with model.lora.rank=4 model.lora.alpha=8" in capsys.readouterr().err
    assert train([*again, "name=third", "model.lora.targets=all"]) == 2
    assert "adapters of 14 layers, which are not those of model.lora.targets=all" in capsys.readouterr().err
    assert train([*again, "name=third", "model.lora.rank=0"]) == 2
    assert f"python -m mmrpt.export {end} MERGED" in capsys.readouterr().err


def test_the_start_is_the_reference_and_what_the_control_begins_with(given, tmp_path):
    """A run whose warm start has no steps, and no second copy of the model anywhere."""
    run = open_run(load_settings(None, [*given, "name=it", "warmup.steps=0"]))
    start = copied(run.policy.model)
    with torch.no_grad():
        for parameter in adapter_weights(run.policy.model).values():
            parameter.add_(1.0)
    moved, parameters = copied(run.policy.model), set(run.policy.model.parameters())
    reference = run.frozen("warmup")
    with reference() as frozen:
        assert frozen is run.policy
        found = copied(frozen.model)
        assert all(torch.equal(found[name], start[name]) for name in start)
    assert all(torch.equal(value, moved[name]) for name, value in copied(run.policy.model).items())
    run.load("warmup")
    assert all(torch.equal(value, start[name]) for name, value in copied(run.policy.model).items())
    assert parameters == set(run.policy.model.parameters())


# ------------------------------------------------------------------------------------------------ 4 bits


def test_quantized_weights_stay_and_adapters_over_them_learn(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'mmrpt[qlora]'")
    texts = [ColourPairs()[i].caption for i in range(4)] + ["user assistant describe restore:"]
    # On a CPU bitsandbytes wants widths of 64.
    build_tiny_vlm(replace(TINY, hidden_size=64, intermediate_size=128), texts).write_files(tmp_path / "model")
    policy = Policy.load(tmp_path / "model", torch.bfloat16, quantized=True)
    policy.compute = torch.bfloat16
    add_adapters(policy, LoraSettings(rank=4, quantized=True), str(tmp_path / "model"), None, seed=0)
    layer = policy.text_model.layers[0].mlp.down_proj.base_layer
    assert layer.weight.dtype == torch.uint8 and policy.head_weight.dtype == torch.bfloat16
    visual = policy.model.model.visual
    assert {p.dtype for p in visual.parameters()} == {torch.bfloat16}
    frozen = {n: p.clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    losses, *_ = trained(policy)
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4]), losses
    now = dict(policy.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    policy.write_files(tmp_path / "adapters")
    again = Policy.load(tmp_path / "adapters", torch.bfloat16, quantized=True)
    assert all(torch.equal(value, copied(policy.model)[name]) for name, value in copied(again.model).items())


def test_bitsandbytes_is_asked_for_by_name(tmp_path, monkeypatch):
    make_looking_policy().write_files(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(SettingsError, match=r"pip install bitsandbytes, or pip install 'mmrpt\[qlora\]'"):
        Policy.load(tmp_path, torch.bfloat16, quantized=True)
