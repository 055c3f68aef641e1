"""`python -m mmrpt.train --dry-run`: what it prints, that it leaves nothing behind, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoConfig

from mmrpt import families
from mmrpt.engines import dry_run as module
from mmrpt.engines.dry_run import device_memory, model_config, tell_memory
from mmrpt.engines.estimate import Estimate, estimate
from mmrpt.settings import Settings, load_settings
from mmrpt.train import main
from mmrpt.world.tiny_vlm import build_tiny_vlm
from tests.trainer.conftest import SMALL_RUN
from tests.trainer.test_pretrained import write_pairs

MIB = 2**20


@pytest.fixture
def dry(tmp_path, capsys):
    """Exit status, stdout and stderr of a dry run, after which the run's folder is not there."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["--dry-run", f"output={tmp_path / 'runs'}", *SMALL_RUN, *arguments])
        assert not (tmp_path / "runs").exists()
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def foreseen(monkeypatch):
    """Estimates that are made up: MiB of each phase by the settings; and what was asked for."""
    asked = []

    def estimate(settings: Settings, config, device_type: str, *, only: str | None = None) -> Estimate:
        asked.append((device_type, only))
        update = 100 if settings.model.gradient_checkpointing else 300 if settings.model.freeze else 400
        phases = {"sampling": {"weights": 150 * MIB}, "update": {"weights": 10 * MIB, "decoder": (update - 10) * MIB}}
        return Estimate({name: parts for name, parts in phases.items() if only in (None, name)}, 5, 4)

    monkeypatch.setattr(module, "estimate", estimate)
    return asked


def test_the_demos_dry_run_shows_every_phase_and_leaves_nothing(dry, tmp_path):
    status, out, err = dry()
    assert status == 0 and not err
    # The demo's model of these sizes, but for words that its tokenizer did not find.
    model = build_tiny_vlm(load_settings(None, SMALL_RUN).demo.tiny, ["a red card."]).model
    words = 512 * 32 - model.get_input_embeddings().weight.numel()
    count = sum(p.numel() for p in model.parameters()) + words
    assert f"model: the tiny model, {count:,} parameters, {count:,} trained" in out
    assert "steps: 5 of warm-up, 6 of RL, 6 of control" in out
    assert "images of 112 x 112 pixels, 64 tokens of text with each, answers of 6 tokens" in out
    rows = {line[:20].strip(): line.split()[-1] for line in out.splitlines() if re.search(r"\d\.\d\d$", line)}
    steps = {f"{name}{step}" for name in ("warm-up", "update", "control") for step in ("", ": optimiser")}
    assert rows.keys() == steps | {"scoring", "sampling", "perception", "evaluation"}
    largest = max(rows, key=lambda name: float(rows[name]))
    assert re.search(rf"^memory: \d+\.\d MiB in {largest}, 0% of the device's \d+\.\d GiB$", out, re.MULTILINE)


def test_controls_are_told_and_those_that_rl_does_not_measure_are_measured(dry, foreseen):
    out = dry("control.kinds=[grpo, captions_seconds]")[1]
    assert "steps: 5 of warm-up, 6 of RL, 6 of grpo, RL's seconds of captions_seconds\n" in out
    for kinds, phases in (("grpo, rl_blanked", set()), ("supervised_masks", {"control", "control: optimiser"})):
        settings = load_settings(None, [*SMALL_RUN, f"control.kinds=[{kinds}]"])
        assert estimate(settings, model_config(settings), "cpu", only="control").phases.keys() == phases


def test_settings_that_lower_the_peak_are_told_the_best_first(dry, foreseen):
    status, out, _ = dry("--gpu-memory", "0.375")
    assert status == 0 and "memory: 400.0 MiB in update, 104% of the device's 384.0 MiB" in out
    advice = out.partition("would lower it to:\n")[2].splitlines()
    # What sampling needs is the floor, and what changes nothing is not named.
    found = [line.split() for line in advice]
    assert [[change, size, unit] for change, size, unit in found] == [
        ["model.gradient_checkpointing=true", "150.0", "MiB"],
        ["model.freeze=[vision]", "300.0", "MiB"],
    ]
    assert foreseen[0] == ("cuda", None) and {*foreseen[1:]} == {("cuda", "update")}
    status, out, _ = dry("--gpu-memory", "0.5")
    assert status == 0 and "78% of the device's 512.0 MiB" in out and "lower" not in out
    status, out, _ = dry("--gpu-memory", "0.1", "model.gradient_checkpointing=true", "model.freeze=[vision,merger]")
    assert "150.0 MiB in sampling" in out and "no one setting lowers it" in out


def test_given_pairs_are_counted_and_wrong_ones_refused(dry, foreseen, tmp_path):
    status, out, _ = dry(write_pairs(tmp_path, 9))
    assert status == 0 and "pairs: 9 rows in " in out
    assert foreseen[0] == ("cpu", None)
    for arguments, error in (
        (["data.pairs=/no/such.jsonl"], "/no/such.jsonl"),
        (["model.path=/no/such"], "there is no such folder"),
        (["rl.stepps=3"], "unknown setting 'rl.stepps'"),
        (["model.path=/no/such", "model.dtype=bfloat16"], "model.compute=bfloat16"),
        (["--gpu-memory", "-3"], "--gpu-memory -3: expected a size above 0"),
    ):
        status, out, err = dry(*arguments)
        assert status == 2 and err.startswith("error: ") and error in err, err


def test_of_another_family_it_cannot_tell(dry, tmp_path):
    AutoConfig.for_model("llava").save_pretrained(tmp_path / "llava")
    status, _, err = dry(f"model.path={tmp_path / 'llava'}")
    assert status == 2 and "memory is estimated for qwen2_vl, qwen2_5_vl, qwen3_vl, and the model is a llava" in err


def test_of_attention_mass_it_cannot_tell(dry):
    status, _, err = dry("perception.kind=mass")
    assert status == 2 and "memory is not known of perception.kind=mass: ask with kl" in err


def test_a_gpus_memory_is_for_a_dry_run(capsys):
    assert main(["--gpu-memory", "24"]) == 2
    assert "with --dry-run" in capsys.readouterr().err


def test_of_a_hub_name_nothing_but_the_config_is_asked_for(policy, tmp_path, monkeypatch):
    policy.write_files(tmp_path)
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, [*allow_patterns]))
        return str(tmp_path)

    monkeypatch.setattr(families, "snapshot_download", download)
    config = model_config(load_settings(None, ["model.path=org/model", "model.revision=v2"]))
    assert type(config) is type(policy.model.config)
    assert asked == [("org/model", "v2", ["config.json", "adapter_config.json"])]


def test_a_run_tells_the_memory_of_large_models_alone(foreseen, capsys, monkeypatch):
    device = torch.device("cpu")
    tell_memory(Settings(), 99_999_999, device)
    assert capsys.readouterr().out == "" and not foreseen
    tell_memory(Settings(), 100_000_000, device)
    assert re.fullmatch(r"memory: 400\.0 MiB in update, \d+% of the device's .* GiB\n", capsys.readouterr().out)

    def fails(*arguments, **options):
        raise AttributeError("no such name")

    monkeypatch.setattr(module, "estimate", fails)
    tell_memory(Settings(), 100_000_000, device)
    assert capsys.readouterr().out == "memory: no estimate (AttributeError: no such name)\n"


def test_a_cpu_has_the_machines_memory():
    with open("/proc/meminfo") as lines:
        total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    assert device_memory(torch.device("cpu")) == pytest.approx(1024 * total, rel=0.01)
