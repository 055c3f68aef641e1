"""A tiny policy and a few drawn-by-hand pairs, so that these tests need neither the drawn world nor a download."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmrpt.policy import QwenVLPolicy
from mmrpt.rewards.combine import REWARDS
from mmrpt.settings import Settings, load_settings
from mmrpt.types import Batch, Example, MaskedSample, Word
from mmrpt.world.tiny_vlm import TinyVLMConfig, build_tiny_vlm, spread_features

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40)}

TINY = TinyVLMConfig(
    hidden_size=32,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate_size=48,
    vision_hidden_size=32,
    vision_layers=1,
    vision_heads=2,
    vision_intermediate_size=48,
    vocab_size=512,
)

# A whole run of these takes two seconds on one core. None of twelve sentences scores nine deviations below their mean,
# so all are masked, and there are twelve samples on any CPU: the second and fourth round of seven begin a new epoch.
SMALL_RUN = (
    "device=cpu",
    "threads=1",
    "checkpoint_every=2",
    "demo.vision_steps=3",
    "demo.vision_batch_size=4",
    "warmup.steps=5",
    "demo.fact_steps=2",
    "demo.lesson_batch_size=4",
    "warmup.batch_size=4",
    "demo.vision_frozen_steps=1",
    "masking.captions=6",
    "masking.batch_tokens=150",
    "masking.threshold=mean_std:-9",
    "rollout.prompts=7",
    "rollout.group_size=2",
    "rollout.max_new_tokens=6",
    "rl.groups_per_step=2",
    "rl.steps=6",
    "rl.max_rounds=3",
    "evaluation.samples=4",
    "evaluation.batch_size=3",
    *(f"demo.tiny.{name}={value}" for name, value in asdict(TINY).items() if isinstance(value, int)),
)


class ColourPairs:
    """Pairs whose caption names the one colour of the image: the smallest task that needs looking."""

    def __init__(self, size: int = 24, name: str = "colour") -> None:
        self.size, self.name = size, name

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(index)
        colour = list(COLOURS)[index % len(COLOURS)]
        caption = f"the card is {colour}. cards are made of paper." if index % 2 else f"paper is thin. a {colour} card."
        start = caption.index(colour)
        return Example(f"{self.name}/{index:03d}", caption, (Word(start, start + len(colour), "colour", True),))

    def image(self, example_id: str) -> Image.Image:
        index = int(example_id.split("/")[1])
        pixels = np.empty((56, 56, 3), np.uint8)
        pixels[:] = list(COLOURS.values())[index % len(COLOURS)]
        pixels[index % 8, :] = 255
        return Image.fromarray(pixels)


def make_policy(seed: int = 0) -> QwenVLPolicy:
    texts = [ColourPairs()[i].caption for i in range(4)] + ["user assistant describe restore:"]
    return build_tiny_vlm(TINY, texts, seed=seed)


def make_looking_policy(seed: int = 0) -> QwenVLPolicy:
    """A policy whose words depend on the image, as a random start's hardly do: larger features, attention and head."""
    policy = make_policy(seed)
    pairs = ColourPairs()
    spread_features(policy, [pairs.image(pairs[i].id) for i in range(8)], std=1.0)
    with torch.no_grad():
        for name, parameter in policy.text_model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.mul_(0.12 / parameter.std())
        policy.head_weight.mul_(0.12 / policy.head_weight.std())
    return policy


def masked_colour(pairs: ColourPairs, index: int) -> MaskedSample:
    """The pair's caption with its colour hidden."""
    example = pairs[index]
    word = example.words[0]
    masked = example.caption[: word.start] + "<mask>" + example.caption[word.end :]
    answer = example.caption[word.start : word.end]
    return MaskedSample(
        f"{example.id}#c", example.id, masked, answer, word.start, word.end, 0, 0.5, 0.5, "colour", needs_image=True
    )


def forward_inputs(policy: QwenVLPolicy, batch: Batch) -> dict[str, Any]:
    """The batch as transformers' own forward pass takes it: pixels repeated row by row."""
    parts = batch.pixels.pixel_values.split(batch.pixels.grid_thw.prod(-1).tolist())
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": torch.cat([parts[i] for i in batch.image_index.tolist()]),
        "image_grid_thw": batch.pixels.grid_thw[batch.image_index],
    }
    if "mm_token_type_ids" in inspect.signature(policy.model.model.forward).parameters:
        inputs["mm_token_type_ids"] = (batch.input_ids == policy.image_token_id).int()
    return inputs


def response_logits(policy: QwenVLPolicy, batch: Batch) -> list[torch.Tensor]:
    """Per row (length, V) logits that predict its response, markers at -inf, from transformers' own forward pass."""
    states = policy.model.model(**forward_inputs(policy, batch)).last_hidden_state
    logits = states @ policy.model.lm_head.weight.T
    never = torch.zeros(logits.shape[-1], dtype=torch.bool)
    never[policy.suppressed_ids] = True
    logits = logits.masked_fill(never, -torch.inf)
    rows = []
    for row, mask in zip(logits, batch.response_mask, strict=True):
        positions = mask.nonzero()[:, 0]
        rows.append(row[positions - 1])
    return rows


@pytest.fixture
def pairs() -> ColourPairs:
    return ColourPairs()


@pytest.fixture
def policy() -> QwenVLPolicy:
    torch.manual_seed(0)
    return make_policy()


@pytest.fixture
def looking_policy() -> QwenVLPolicy:
    return make_looking_policy()


@pytest.fixture
def rewards_with_signal(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], float]:
    """An untrained policy earns nothing from the real rewards; these depend on the completion's bytes and do differ."""

    def reward(completion: str) -> float:
        return float(zlib.crc32(completion.encode()) % 3 == 0)

    def column(completions: list[str], **_: Any) -> list[float]:
        return [reward(c) for c in completions]

    for name in REWARDS:
        monkeypatch.setitem(REWARDS, name, column)
    return reward


@pytest.fixture
def small_settings(tmp_path) -> Callable[..., Settings]:
    """Settings of a run that takes seconds, in `tmp_path`; overrides win."""

    def make(*overrides: str, name: str = "run") -> Settings:
        return load_settings(None, [f"output={tmp_path}", f"name={name}", *SMALL_RUN, *overrides])

    return make
