"""Checkpoints: what is saved comes back exactly, other programs can open it, and a half-written one is never found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mmrpt.checkpoint import (
    STATE_FILE,
    drop_older,
    load_checkpoint,
    save_checkpoint,
    unfinished_checkpoints,
)
from mmrpt.policy import QwenVLPolicy
from mmrpt.run_folder import RunError
from tests.trainer.conftest import forward_inputs, make_policy

STATE = {
    "step": 3,
    "round": 7,
    "buffer": [{"prompt": [1, 2], "logps": torch.tensor([[0.1, -2.5]]), "sample_id": "a#1"}],
}


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def weights_of(policy):
    return {name: value.clone() for name, value in policy.model.state_dict().items()}


def check_same_weights(policy, weights):
    found = policy.model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_state_come_back_exactly(policy, tmp_path, dtype):
    policy.model.to(dtype)
    weights = weights_of(policy)
    save_checkpoint(tmp_path / "rl-3", policy, STATE)
    other = make_policy(seed=9)
    other.model.to(dtype)
    head = other.model.lm_head.weight
    state = load_checkpoint(tmp_path / "rl-3", other)
    check_same_weights(other, weights)
    assert other.model.lm_head.weight is head is other.model.get_input_embeddings().weight  # in place, and still tied
    assert {k: v for k, v in state.items() if k != "buffer"} == {"step": 3, "round": 7}
    (group,) = state["buffer"]
    assert group["prompt"] == [1, 2] and torch.equal(group["logps"], STATE["buffer"][0]["logps"])
    assert [p.name for p in tmp_path.iterdir()] == ["rl-3"]


def test_the_folder_is_an_ordinary_hugging_face_folder(policy, pairs, tmp_path):
    save_checkpoint(tmp_path / "rl", policy, STATE)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "rl").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rl")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == policy.prompt_text("describe")
    pixels = policy.pixels([pairs.image(pairs[0].id)])
    prompt = policy.encode_prompt("describe", 4)
    batch = policy.batch([prompt], [[]], pixels, [0])
    with torch.no_grad():
        wanted = policy.hidden(batch)
        found = model.model(**forward_inputs(policy, batch)).last_hidden_state
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        said = model.generate(**forward_inputs(policy, batch), max_new_tokens=3, do_sample=False)
    assert said.shape[1] > len(prompt)


def write_half(folder: Path):
    (folder / "model.safetensors").write_bytes(b"half")


MOMENTS = ["before the weights", "after the weights", "in the state", "before the name"]


def die(monkeypatch, moment):
    def in_files(self, folder):
        if moment == "after the weights":
            write_half(folder)
        raise Killed

    def in_state(state, file, *rest):
        Path(file).write_bytes(b"PK half a file")
        raise Killed

    def in_rename(*_):
        raise Killed

    if moment in MOMENTS[:2]:
        monkeypatch.setattr(QwenVLPolicy, "write_files", in_files)
    elif moment == "in the state":
        monkeypatch.setattr(torch, "save", in_state)
    else:
        monkeypatch.setattr("mmrpt.checkpoint.os.replace", in_rename)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_save_cut_off_leaves_no_checkpoint(policy, tmp_path, monkeypatch, moment, earlier):
    weights = weights_of(policy)
    if earlier:
        save_checkpoint(tmp_path / "rl-2", policy, {"step": 2})
    with torch.no_grad():
        policy.head_weight.add_(1)
    with monkeypatch.context() as patch:
        die(patch, moment)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path / "rl-4", policy, {"step": 4})
    found = unfinished_checkpoints(tmp_path, "rl")
    assert found == ([tmp_path / "rl-2"] if earlier else [])
    if earlier:
        assert load_checkpoint(found[0], policy) == {"step": 2}
        check_same_weights(policy, weights)
    save_checkpoint(tmp_path / "rl-4", policy, {"step": 4})  # the leftover is not in the way
    drop_older(tmp_path, "rl", keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["rl-4"]
    assert (tmp_path / "rl-4" / STATE_FILE).is_file()


def test_a_save_replaces_what_has_its_name(policy, tmp_path):
    save_checkpoint(tmp_path / "rl-2", policy, {"step": 1})
    (tmp_path / "rl-2" / "stray").touch()
    with torch.no_grad():
        policy.head_weight.mul_(2)
    save_checkpoint(tmp_path / "rl-2", policy, {"step": 2})
    weights = weights_of(policy)
    assert load_checkpoint(tmp_path / "rl-2", policy) == {"step": 2}
    check_same_weights(policy, weights)
    assert not (tmp_path / "rl-2" / "stray").exists()


def test_the_newest_is_the_one_of_most_steps(tmp_path):
    for name in ("rl-9", "rl-100", "rl-20", "rl-500.tmp", "rl", "rl-last", "rl-1000-old", "warmup-300"):
        (tmp_path / name).mkdir()
    assert [p.name for p in unfinished_checkpoints(tmp_path, "rl")] == ["rl-100", "rl-20", "rl-9"]
    assert [p.name for p in unfinished_checkpoints(tmp_path, "warmup")] == ["warmup-300"]
    assert unfinished_checkpoints(tmp_path, "control") == unfinished_checkpoints(tmp_path / "none", "rl") == []


def test_older_ones_go_and_others_stay(tmp_path):
    for name in ("rl-9", "rl-20", "rl-100", "rl-110.tmp", "rl", "warmup-300", "control"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    drop_older(tmp_path, "rl", keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"rl-20", "rl-100", "rl", "warmup-300", "control"}
    drop_older(tmp_path, "rl", keep=0)
    assert {p.name for p in tmp_path.iterdir()} == {"rl", "warmup-300", "control"}


def test_a_state_is_data_and_never_code(policy, tmp_path):
    """trainer_state.pt is read without unpickling objects: a folder from elsewhere cannot run anything."""
    save_checkpoint(tmp_path / "rl", policy, {"step": Path("/")})
    with pytest.raises(RunError, match="[Ww]eights.only"):
        load_checkpoint(tmp_path / "rl", policy)


def test_weights_of_another_model_are_refused(policy, tmp_path):
    save_checkpoint(tmp_path / "rl", policy, {"step": 1})
    other = make_policy()
    other.model.model.language_model.layers.append(other.model.model.language_model.layers[0])
    with pytest.raises(RunError, match="rl cannot be read .*RuntimeError: Error.* in loading state_dict"):
        load_checkpoint(tmp_path / "rl", other)
    shutil.rmtree(tmp_path / "rl")
    with pytest.raises(RunError, match=r"FileNotFoundError: no config\.json in .* \(there is no such folder\)"):
        load_checkpoint(tmp_path / "rl", policy)
