"""What a pretrained model needs: defaults of its own, half-precision products, frozen parts, image sizes, a device."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from mmrpt import families
from mmrpt.captions import caption_batch
from mmrpt.corpus import items_at, write_jsonl
from mmrpt.engines.run import check_dtype, open_run, resolve_device
from mmrpt.families import freeze_parts, load_image_processor, model_folder
from mmrpt.mask import main as mask
from mmrpt.objective import response_logps, supervised_loss
from mmrpt.optimiser import Optimiser
from mmrpt.policy import Policy
from mmrpt.rollout.generate import generate
from mmrpt.settings import OptimiserSettings, PromptSettings, Settings, SettingsError, load_settings, settings_help
from mmrpt.train import main as train
from tests.trainer.conftest import SMALL_RUN, ColourPairs, make_looking_policy, make_policy

BF16_STEP = 2**-8  # relative distance of bfloat16 numbers


def write_pairs(folder: Path, count: int = 8) -> str:
    """A file of pairs on disk, as an override."""
    pairs, folder = ColourPairs(count), folder / "pairs"
    folder.mkdir()
    rows = [{"image": f"{i}.png", "caption": pairs[i].caption} for i in range(count)]
    for i, row in enumerate(rows):
        pairs.image(pairs[i].id).save(folder / row["image"])
    write_jsonl(folder / "pairs.jsonl", rows)
    return f"data.pairs={folder / 'pairs.jsonl'}"


def trained(policy, steps=12, lr=5e-3):
    """Losses of supervised steps, and the metrics of each."""
    pairs, losses, metrics = ColourPairs(), [], []
    optimiser = Optimiser(policy.model, OptimiserSettings(lr=lr, warmup_steps=2))
    for step in range(steps):
        items = items_at(step * 4, 4, len(pairs), 0)
        batch = caption_batch(policy, pairs, items, PromptSettings(), restore_fraction=0.2, seed=step)
        loss = supervised_loss(policy, batch)
        loss.backward()
        losses.append(loss.item())
        metrics.append(optimiser.step(step, steps))
    return losses, metrics, optimiser


# ------------------------------------------------------------------------------------------------ defaults


def test_a_given_model_has_defaults_of_its_own_and_what_is_given_wins(tmp_path):
    settings = load_settings(None, ["model.path=/m"])
    assert (settings.rollout.max_new_tokens, settings.rollout.top_p) == (2048, 0.99)
    assert settings.rl.optimiser.lr == settings.warmup.optimiser.lr == 1e-6
    assert settings.warmup.steps == 0 and settings.warmup.optimiser.kind == "adamw"
    assert settings.model.compute == "bfloat16" and settings.model.dtype == "float32"
    assert settings.rl.caption_weight == 0 and settings.masking.captions is None
    assert all(mark in settings.prompts.restore for mark in ("<think>", "</think>", "<answer>", "{masked_caption}"))
    (tmp_path / "a.yaml").write_text("model: {path: /m, compute: float32}\nrollout: {top_p: 0.5}\nwarmup: {steps: 7}\n")
    mine = load_settings(tmp_path / "a.yaml", ["warmup.steps=9", "rl.optimiser.lr=6e-4"])
    assert (mine.model.compute, mine.rollout.top_p, mine.warmup.steps, mine.rl.optimiser.lr) == (
        "float32",
        0.5,
        9,
        6e-4,
    )
    assert mine.rollout.max_new_tokens == 2048 and mine.prompts == settings.prompts
    assert load_settings(None, ["model.path=null"]) == Settings()


def test_the_defaults_of_a_given_model_are_shown(capsys):
    assert train(["--show", "model.path=/m", "rollout.top_p=0.5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["rollout"]["max_new_tokens"] == 2048 and shown["rollout"]["top_p"] == 0.5
    told = settings_help().rpartition("with model.path: ")[2].split()
    assert {"rollout.max_new_tokens=2048", "rl.optimiser.lr=1e-06", "warmup.steps=0"} <= {*told}


# ------------------------------------------------------------------------------------------------ bfloat16 products


def test_bfloat16_compute_learns_as_float32_does_and_keeps_float32_weights():
    """Of products with 8 significant bits each loss is within one of their steps (0.4 %) of float32's."""
    full, half = make_policy(seed=1), make_policy(seed=1)
    half.compute = torch.bfloat16
    wanted, found = trained(full)[0], trained(half)[0]
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert wanted[-1] < 0.7 * wanted[0] and found[-1] < 0.7 * found[0]
    assert found != wanted
    for a, b in zip(found, wanted, strict=True):
        assert abs(a - b) < BF16_STEP * b, (found, wanted)


def test_under_bfloat16_compute_sampler_and_trainer_multiply_alike():
    """Both in bfloat16, decoder and head; their log-probs differ by less than either does from float32's."""
    policy, pairs = make_looking_policy(), ColourPairs()
    policy.compute = torch.bfloat16
    dtypes = set()
    layer = policy.text_model.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    pixels = policy.pixels([pairs.image(pairs[0].id)])
    prompts = [policy.encode_prompt("describe", 4)]
    options = {"group_size": 4, "max_new_tokens": 6}
    out = generate(policy, prompts, pixels, [0], **options, generator=torch.Generator().manual_seed(0))
    batch = policy.group_batch(prompts, [out.token_ids], pixels, [0], share=True)
    gaps = (response_logps(policy, batch) - out.logps).abs()
    gap = gaps.max()
    assert gaps[:, 0].max() < 1e-3  # of one state: heads in different dtypes give 0.003
    assert dtypes == {torch.bfloat16} and out.logps.dtype == torch.float32
    policy.compute = torch.float32
    rounding = (response_logps(policy, batch) - out.logps).abs().max()
    assert 0 < rounding < 0.5 and gap < 2 * rounding


def test_bfloat16_weights_are_refused_where_they_could_not_move():
    bad = ["model.path=/m", "model.dtype=bfloat16"]
    with pytest.raises(SettingsError, match="rl.optimiser.lr is 1e-06: .*above 0.0005: .*model.compute=bfloat16"):
        check_dtype(load_settings(None, bad))
    with pytest.raises(SettingsError, match="warmup.optimiser.lr"):
        check_dtype(load_settings(None, [*bad, "warmup.steps=1", "rl.optimiser.lr=1e-4"]))
    for fine in (["rl.optimiser.lr=1e-4"], ["rl.steps=0"], ["model.dtype=float32"]):
        check_dtype(load_settings(None, [*bad, *fine]))
    check_dtype(load_settings(None, ["model.dtype=bfloat16", "rl.optimiser.lr=1e-6"]))  # the tiny model is float32


def test_weights_just_above_the_told_size_do_not_move():
    """What the refusal says, of torch's AdamW itself: of the weights below it some do."""
    for size, moves in ((6e-4, False), (1e-4, True)):
        weight = torch.nn.Parameter(torch.full((64,), size, dtype=torch.bfloat16))
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0).step()
        assert torch.equal(weight, before) != moves


# ------------------------------------------------------------------------------------------------ frozen parts


def part_of(name: str) -> str:
    return "merger" if ".visual.merger." in name else "vision" if ".visual." in name else "decoder"


@pytest.mark.parametrize("frozen", [["vision"], ["merger"], ["decoder"], ["vision", "merger"], ["vision", "decoder"]])
def test_frozen_parts_stay_bit_for_bit_and_take_no_memory(frozen):
    policy = make_policy(seed=1)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    freeze_parts(policy.model, frozen)
    assert {part_of(name) for name in before} == {"vision", "merger", "decoder"}
    *_, optimiser = trained(policy, steps=3)
    stateful = {p for part in optimiser.parts for p in part.state}
    for name, parameter in policy.model.named_parameters():
        stays = part_of(name) in frozen
        assert torch.equal(parameter, before[name]) == stays, name
        assert (parameter not in stateful) == stays and parameter.grad is None, name


def test_frozen_parts_are_not_in_the_clipped_norm():
    policy, pairs = make_policy(seed=1), ColourPairs()
    batch = caption_batch(policy, pairs, [0, 1, 2], PromptSettings(), restore_fraction=0.2, seed=0)
    supervised_loss(policy, batch).backward()
    gradients = [p.grad for name, p in policy.model.named_parameters() if part_of(name) != "decoder"]
    wanted = torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
    policy = make_policy(seed=1)
    freeze_parts(policy.model, ["decoder"])
    supervised_loss(policy, batch).backward()
    assert not any(p.grad is not None for name, p in policy.model.named_parameters() if part_of(name) == "decoder")
    found = Optimiser(policy.model, OptimiserSettings()).step(0, 1)["grad_norm"]
    assert found == pytest.approx(wanted, rel=1e-4) and wanted > 0


def test_a_model_whose_parts_are_not_found_is_refused(policy, monkeypatch):
    monkeypatch.setattr(policy.model.model, "visual", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="its parts cannot be told; leave model.freeze out"):
        freeze_parts(policy.model, ["vision"])


def test_a_given_model_runs_from_start_to_report(tmp_path, capsys, rewards_with_signal):
    """Half-precision products, a frozen tower and a smaller image: through sampling, training and evaluation."""
    make_policy().write_files(tmp_path / "model")
    start = dict(Policy.load(tmp_path / "model").model.named_parameters())
    given = [
        f"model.path={tmp_path / 'model'}",
        "model.freeze=[vision]",
        "model.max_pixels=784",
        "rl.optimiser.lr=1e-3",
    ]
    short = ["warmup.steps=0", "rl.steps=2", "rl.max_rounds=1", "evaluation.samples=2", "data.held_out=3", "name=it"]
    sizes = ["rollout.prompts=5", "control.kinds=[]"]
    run = [f"output={tmp_path}", *SMALL_RUN, *given, *short, *sizes, write_pairs(tmp_path)]
    assert train(run) == 0
    assert "device: cpu\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "it" / "environment.json").read_text())["device"] == "cpu"
    end = Policy.load(tmp_path / "it" / "checkpoints" / "rl")
    assert end.image_processor.size["longest_edge"] == 784
    moved = {part_of(name) for name, p in end.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"merger", "decoder"}
    assert all(p.dtype == torch.float32 for p in end.model.parameters())


def test_masking_by_a_given_model_uses_its_compute_type(tmp_path):
    make_looking_policy().write_files(tmp_path / "model")
    pairs, scores = write_pairs(tmp_path), {}
    for compute in ("float32", "bfloat16"):
        run = [f"output={tmp_path}", f"model.path={tmp_path / 'model'}", pairs, "masking.threshold=mean_std:-9"]
        assert mask([*run, "device=cpu", f"name={compute}", f"model.compute={compute}"]) == 0
        rows = (tmp_path / compute / "scores.jsonl").read_text().splitlines()
        scores[compute] = torch.tensor([json.loads(row)["score"] for row in rows])
    difference = (scores["float32"] - scores["bfloat16"]).abs().max()
    assert 0 < difference < 4 * BF16_STEP


# ------------------------------------------------------------------------------------------------ folder and device


def test_image_sizes_are_the_folders_own_unless_given(policy, tmp_path):
    policy.write_files(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, "size": {"shortest_edge": 4 * 784, "longest_edge": 16 * 784}}))
    for limits, sizes in (({}, (4, 16)), ({"max_pixels": 9 * 784}, (4, 9)), ({"min_pixels": 9 * 784}, (9, 16))):
        size = load_image_processor(tmp_path, **limits).size
        assert (size["shortest_edge"], size["longest_edge"]) == tuple(784 * x for x in sizes)
    photo = ColourPairs().image("colour/000").resize((28 * 6, 28 * 6))
    for limits, tokens in (({}, 16), ({"max_pixels": 9 * 784}, 9)):
        loaded = Policy.load(tmp_path, **limits)
        assert int(loaded.pixels([photo]).tokens_per_image(2)) == tokens
    with pytest.raises(ValueError, match="at least 3136 and at most 784 pixels"):
        load_image_processor(tmp_path, max_pixels=784)
    path.write_text(json.dumps({**own, "image_processor_type": "SiglipImageProcessor"}))
    with pytest.raises(ValueError, match="are for Qwen2-VL's image processor"):
        load_image_processor(tmp_path, max_pixels=784)


def test_a_hub_name_is_downloaded_at_its_revision_and_a_folder_is_not(policy, tmp_path, monkeypatch):
    policy.write_files(tmp_path / "there")
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        if name != "org/model":
            raise OSError("404\nnot found")
        return str(tmp_path / "there")

    monkeypatch.setattr(families, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert Policy.load("org/model", revision="v2").model.config.model_type == policy.model.config.model_type
    assert asked == [("org/model", "v2")]
    with pytest.raises(OSError, match=r"'org/none': no such folder, .* at revision 'v9' \(404\)"):
        model_folder("org/none", "v9")
    assert model_folder("there") == Path("there") and len(asked) == 2
    with pytest.raises(ValueError, match="model.revision is 'v2', but model.path is the folder"):
        model_folder("there", "v2")
    for missing in ("./none", "/no/such/folder", "a/b/c", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            model_folder(missing)
    assert len(asked) == 2


def test_auto_takes_cuda_where_torch_has_it(monkeypatch):
    assert Settings().device == "auto"
    monkeypatch.setattr(torch, "empty", lambda *shape, device: SimpleNamespace(device=device))
    for available, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto") == device
        assert [resolve_device(name) for name in ("cpu", "mps")] == ["cpu", "mps"]


def test_a_run_is_refused_before_its_model_is_opened(tmp_path):
    settings = load_settings(None, [f"output={tmp_path}", *SMALL_RUN, "model.path=/no/such", "model.dtype=bfloat16"])
    with pytest.raises(SettingsError, match="model.compute=bfloat16"):
        open_run(settings)


def test_adamw_updates_all_weights_in_one_kernel():
    def ways(model):
        return {
            (g["fused"], g["foreach"])
            for part in Optimiser(model, OptimiserSettings()).parts
            for g in part.param_groups
        }

    assert ways(make_policy().model) == {(None, True)}
    if torch.cuda.is_available():
        assert ways(make_policy().model.cuda()) == {(True, None)}
