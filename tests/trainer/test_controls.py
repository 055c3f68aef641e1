"""Controls: each trains what it says it does, for as long as it says, and leaves RL's files alone."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmrpt.captions import masked_batch
from mmrpt.corpus import read_jsonl
from mmrpt.engines import native
from mmrpt.engines.run import open_run
from mmrpt.masking.build import caption_of, masked_at_random, random_masks
from mmrpt.masking.leaks import is_repeated
from mmrpt.policy import QwenVLPolicy
from mmrpt.settings import CONTROL_PHASES, TIMED_CONTROLS, ControlSettings, SettingsError, load_settings
from mmrpt.types import Example, MaskedSample
from tests.trainer.test_resume import finish, kill, outside_world, settings_in, without_seconds  # noqa: F401  a fixture

BY_RL = ("rl_blanked", "rl_random_masks", "grpo")
DURATIONS = (1.0, 0.25, 3.0, 0.5, 2.0, 1.5, 0.75, 1.0)  # seconds of a step in `Clock`
BUDGET = 7.0  # spent after the fifth step: 1 + 0.25 + 3 + 0.5 + 2 = 6.75, after the sixth 8.25


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run with the default control."""
    settings = settings_in(tmp_path_factory.mktemp("trained"))
    assert settings.control.kinds == ("captions",)
    finish(settings)
    return settings.run_dir


def after_rl_in(folder: Path, trained: Path, *overrides: str, spent: float | None = None):
    """Settings of a run that is done but for controls and evaluation, and that differs in `overrides`; RL has taken
    `spent` seconds."""
    settings = settings_in(folder, "evaluation.samples=2", *overrides)
    shutil.copytree(trained, settings.run_dir)
    shutil.rmtree(settings.run_dir / "checkpoints" / "control")
    (settings.run_dir / "evaluation.json").unlink()
    if spent is not None:
        state = settings.run_dir / "checkpoints" / "rl" / "trainer_state.pt"
        torch.save(torch.load(state, weights_only=True) | {"spent": spent}, state)
    return settings


@pytest.fixture
def after_rl(trained, tmp_path):
    return partial(after_rl_in, tmp_path, trained)


@pytest.fixture(scope="module")
def with_all(trained, tmp_path_factory) -> Path:
    """The folder of a run with every control, named in another order than they are trained."""
    kinds = f"control.kinds=[{','.join(reversed(CONTROL_PHASES))}]"
    settings = after_rl_in(tmp_path_factory.mktemp("all"), trained, kinds, spent=0.5)
    finish(settings)
    return settings.run_dir


def weights_of(folder: Path, phase: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / phase / "model.safetensors")


def rows_of(folder: Path, phase: str) -> list[dict]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == phase]


def samples_of(folder: Path) -> list[MaskedSample]:
    return [MaskedSample(**row) for row in read_jsonl(folder / "masked.jsonl")]


def test_kinds_are_named_once():
    kinds = get_args(get_args(get_type_hints(ControlSettings)["kinds"])[0])
    assert kinds == tuple(CONTROL_PHASES)
    assert ControlSettings(kinds=("grpo", "captions", "grpo")).phases == ["control", "grpo"]
    assert ControlSettings(kinds=()).phases == []
    for wrong, told in (("control.kinds=[rl]", "control.kinds is 'rl'"), ("control.enabled=true", "now control.kinds")):
        with pytest.raises(SettingsError, match=told):
            load_settings(None, [wrong])


@pytest.mark.parametrize("phase", CONTROL_PHASES.values())
def test_every_kind_is_trained_and_evaluated(with_all, phase):
    own, start = weights_of(with_all, phase), weights_of(with_all, "warmup")
    for other in {"rl", *CONTROL_PHASES.values()} - {phase}:
        weights = weights_of(with_all, other)
        assert not any(torch.equal(own[name], weights[name]) for name in own if own[name].ndim > 1), other
    assert not any(torch.equal(own[name], start[name]) for name in own if own[name].ndim > 1)
    rows = rows_of(with_all, phase)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) == 6 or phase in TIMED_CONTROLS
    assert all(("reward" in row or row["rounds"] == 0) if phase in BY_RL else "reward" not in row for row in rows)
    assert any("kept_token_rate" in row for row in rows) == (phase in ("rl_blanked", "rl_random_masks"))
    evaluated = json.loads((with_all / "evaluation.json").read_text())["rows"]
    assert {row["condition"] for row in evaluated if row["model"] == phase} == {"image", "blanked", "swapped"}
    assert json.loads((with_all / "seconds.json").read_text())[phase] > 0


def test_controls_change_neither_rl_nor_each_other(trained, with_all):
    """What RL wrote stays, and the default control is that of a run without the others."""
    for name in ("samples.jsonl", "perception.jsonl", "masked.jsonl"):
        assert (with_all / name).read_bytes() == (trained / name).read_bytes(), name
    for phase in ("rl", "control"):
        alone, beside = (weights_of(folder, phase) for folder in (trained, with_all))
        assert all(torch.equal(alone[name], beside[name]) for name in alone)
        assert without_seconds(rows_of(with_all, phase)) == without_seconds(rows_of(trained, phase))
    phases = ["vision_pretraining", "warmup", "rl", *CONTROL_PHASES.values()]
    assert list(dict.fromkeys(row["phase"] for row in read_jsonl(with_all / "metrics.jsonl"))) == phases
    assert {p.name for p in (with_all / "checkpoints").iterdir()} == {*phases}
    evaluated = json.loads((with_all / "evaluation.json").read_text())["rows"]
    assert list(dict.fromkeys(row["model"] for row in evaluated)) == phases[1:]


def test_without_rl_steps_every_control_is_the_warm_start(after_rl):
    settings = after_rl("control.kinds=[captions, captions_seconds, grpo]", "rl.steps=0")
    shutil.rmtree(settings.run_dir / "checkpoints" / "rl")
    finish(settings)
    rows = json.loads((settings.run_dir / "evaluation.json").read_text())["rows"]
    found = {}
    for row in rows:
        found.setdefault(row["model"], []).append({**row, "model": ""})
    assert found.keys() == {"warmup", "rl", "control", "captions_seconds", "grpo"}
    assert all(cells == found["warmup"] for cells in found.values())


# ------------------------------------------------------------------------------------------------ reinforcement


@pytest.mark.parametrize(("kind", "grey"), [("rl_blanked", True), ("grpo", False)])
def test_a_blanked_control_is_shown_nothing_but_grey(after_rl, monkeypatch, kind, grey):
    """In sampling, in updates, and in the captions that are mixed in. Nor is it validated where RL is."""
    settings, shown = after_rl(f"control.kinds=[{kind}]", "evaluation.every=2"), []
    run, pixels = open_run(settings), QwenVLPolicy.pixels

    def seen(self, images):
        shown.extend(images)
        return pixels(self, images)

    monkeypatch.setattr(QwenVLPolicy, "pixels", seen)
    monkeypatch.setattr(native, "evaluate", lambda run: None)
    assert settings.rl.caption_weight > 0
    native.train(run)
    of_captions = settings.rl.steps * settings.warmup.batch_size
    of_updates = settings.rl.steps * settings.rl.groups_per_step
    assert len(shown) >= of_captions + of_updates + settings.rollout.prompts
    assert all((np.asarray(image) == 127).all() == grey for image in shown)
    assert not (settings.run_dir / "validation.jsonl").exists()


def test_random_masks_are_others_of_the_same_captions(trained, after_rl, monkeypatch):
    settings, used = after_rl("control.kinds=[rl_random_masks]"), []
    fill_buffer = native.fill_buffer

    def seen(policy, buffer, samples, *args, **options):
        used.append(samples)
        return fill_buffer(policy, buffer, samples, *args, **options)

    monkeypatch.setattr(native, "fill_buffer", seen)
    monkeypatch.setattr(native, "evaluate", lambda run: None)
    finish(settings)
    chosen = samples_of(trained)
    assert all(samples == used[0] for samples in used) and len(used[0]) == len(chosen)
    assert sorted(s.example_id for s in used[0]) == sorted(s.example_id for s in chosen)
    assert {s.id for s in used[0]} != {s.id for s in chosen}


def test_every_span_is_drawn_about_as_often_whatever_was_chosen():
    caption = "a red fox sits. the fox sleeps on grass."
    rng = np.random.default_rng(0)
    spans = sorted((s.start, s.answer) for s in random_masks(Example("0", caption), 99, mask="<m>", rng=rng))
    chosen = replace(random_masks(Example("0", caption), 1, mask="<m>", rng=rng)[0], span_score=1.0)
    draws = 400
    starts = [masked_at_random([chosen], mask="<m>", drop_repeated=False, seed=i)[0].start for i in range(draws)]
    share = 1 / len(spans)
    error = math.sqrt(share * (1 - share) / draws)  # of a share of independent draws
    assert len(spans) == 6
    assert all(abs(starts.count(start) / draws - share) < 5 * error for start, _ in spans), starts
    # "fox" stands twice; a two-word span with it ("red fox") does not.
    kept = [masked_at_random([chosen] * 6, mask="<m>", drop_repeated=True, seed=i) for i in range(50)]
    answers = {s.answer for drawn in kept for s in drawn}
    assert "fox" not in answers and {"red", "sleeps", "grass"} <= answers
    assert all(len({s.id for s in drawn}) == len(drawn) for drawn in kept)
    assert not any(is_repeated(caption, s.start, s.end) for drawn in kept for s in drawn)


# ------------------------------------------------------------------------------------------------ supervised


@pytest.mark.parametrize("mask", ["<mask>", "_"])
def test_masked_rows_give_the_hidden_words_back(policy, pairs, small_settings, mask):
    prompts = replace(small_settings().prompts, mask=mask, restore="{masked_caption}")
    samples = [random_masks(pairs[i], 1, mask=mask, rng=np.random.default_rng(i))[0] for i in range(6)]
    assert [caption_of(s, mask) for s in samples] == [pairs[i].caption for i in range(6)]
    batch = masked_batch(policy, samples, [pairs.image(s.example_id) for s in samples], prompts)
    for row, chosen, sample in zip(batch.input_ids, batch.response_mask, samples, strict=True):
        text = policy.tokenizer.decode(row[chosen][:-1])
        assert text.endswith(f"{sample.answer}</think><answer> {sample.answer}</answer>"), text
        assert mask not in text
        asked = policy.tokenizer.decode(row[~chosen], skip_special_tokens=True)
        assert sample.masked_caption in asked


def test_supervised_masks_visit_rls_samples_in_rls_order(trained, after_rl, monkeypatch):
    settings, shown = after_rl("control.kinds=[supervised_masks]", spent=BUDGET), []

    def seen(policy, samples, *args):
        shown.append(samples)
        return masked_batch(policy, samples, *args)

    monkeypatch.setattr(native, "masked_batch", seen)
    monkeypatch.setattr(native, "evaluate", lambda run: None)
    steady_clock(monkeypatch, BUDGET / 5.5)
    finish(settings)
    visited = [s.id for samples in shown for s in samples]
    samples = samples_of(trained)
    assert [len(samples) for samples in shown] == [settings.warmup.batch_size] * 6
    assert len(samples) == 12 and set(visited[:12]) == set(visited[12:]) == {s.id for s in samples}  # two epochs


# ------------------------------------------------------------------------------------------------ seconds


def steady_clock(monkeypatch, tick: float) -> None:
    """Every step takes `tick` seconds of `Phase.timed`, however long it takes."""
    now = 0.0

    def perf_counter() -> float:
        nonlocal now
        now += tick
        return now

    monkeypatch.setattr("mmrpt.engines.phase.time", SimpleNamespace(perf_counter=perf_counter))


@pytest.fixture
def clock(monkeypatch):
    """Step n of a supervised phase on captions takes DURATIONS[n] seconds, and nothing else takes any."""
    now, later_captions = [100.0], native.later_captions

    def slow(run, step, pairs=None):
        now[0] += DURATIONS[step]
        return later_captions(run, step, pairs)

    monkeypatch.setattr(native, "later_captions", slow)
    monkeypatch.setattr("mmrpt.engines.phase.time", SimpleNamespace(perf_counter=lambda: now[0]))


TIMED = ("control.kinds=[captions_seconds]", "rl.optimiser.warmup_steps=0")


def test_rls_seconds_are_those_of_its_steps(trained):
    state = torch.load(trained / "checkpoints" / "rl" / "trainer_state.pt", weights_only=True)
    parts = sum(v for row in rows_of(trained, "rl") for k, v in row.items() if k.startswith("seconds_"))
    whole = json.loads((trained / "seconds.json").read_text())["rl"]
    assert state["step"] == 6 and 0.9 * parts <= state["spent"] <= whole + 0.01  # of the sum of rounded numbers


def test_a_timed_control_ends_when_rls_seconds_are_spent(after_rl, clock):
    settings = after_rl(*TIMED, spent=BUDGET)
    finish(settings)
    rows = rows_of(settings.run_dir, "captions_seconds")
    assert len(rows) == 6, "the sixth step begins at 6.75 of 7 seconds, a seventh would at 8.25"
    state = torch.load(settings.run_dir / "checkpoints/captions_seconds/trainer_state.pt", weights_only=True)
    assert state == {"step": 6, "spent": sum(DURATIONS[:6])}
    # The cosine over the share of the seconds that was spent before each step.
    low, peak = settings.rl.optimiser.final_fraction, settings.rl.optimiser.lr
    shares = [sum(DURATIONS[:step]) / BUDGET for step in range(6)]
    wanted = [peak * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2) for share in shares]
    assert [row["lr"] for row in rows] == pytest.approx(wanted, rel=1e-9)


def test_a_timed_control_that_was_killed_goes_on_with_the_seconds_it_had(after_rl, clock, tmp_path):
    straight = after_rl(*TIMED, spent=BUDGET)
    killed = settings_in(tmp_path / "killed", *TIMED)
    shutil.copytree(straight.run_dir, killed.run_dir)
    finish(straight)
    kill(killed, "mmrpt.engines.native.supervised_backward", 6)  # its seconds are lost with the step
    (checkpoint, *_) = sorted((killed.run_dir / "checkpoints").glob("captions_seconds-*"), reverse=True)
    state = torch.load(checkpoint / "trainer_state.pt", weights_only=True)
    assert (checkpoint.name, state["step"], state["spent"]) == ("captions_seconds-4", 4, sum(DURATIONS[:4]))
    finish(killed)
    a, b = (weights_of(settings.run_dir, "captions_seconds") for settings in (straight, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [without_seconds(rows_of(settings.run_dir, "captions_seconds")) for settings in (straight, killed)]
    assert rows[0] == rows[1] and len(rows[0]) == 6
