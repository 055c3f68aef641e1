"""A tiny policy and a few drawn-by-hand pairs, so that these tests need neither the drawn world nor a download."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmrpt.models import Policy
from mmrpt.types import Example, Word
from mmrpt.world.tiny_vlm import TinyVLMConfig, build_tiny_vlm

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40)}


class ColourPairs:
    """Pairs whose caption names the one colour of the image: the smallest task that needs looking."""

    def __init__(self, size: int = 24) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(index)
        colour = list(COLOURS)[index % len(COLOURS)]
        caption = f"the card is {colour}. cards are made of paper." if index % 2 else f"paper is thin. a {colour} card."
        start = caption.index(colour)
        return Example(f"colour/{index:03d}", caption, (Word(start, start + len(colour), "colour", True),))

    def image(self, example_id: str) -> Image.Image:
        index = int(example_id.split("/")[1])
        pixels = np.empty((56, 56, 3), np.uint8)
        pixels[:] = list(COLOURS.values())[index % len(COLOURS)]
        pixels[index % 8, :] = 255
        return Image.fromarray(pixels)


def make_policy(seed: int = 0) -> Policy:
    config = TinyVLMConfig(
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
    texts = [ColourPairs()[i].caption for i in range(4)] + ["user assistant describe restore:"]
    return build_tiny_vlm(config, texts, seed=seed)


@pytest.fixture
def pairs() -> ColourPairs:
    return ColourPairs()


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return make_policy()
