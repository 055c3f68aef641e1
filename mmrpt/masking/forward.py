"""What masking needs from a VLM: token rows of a prompt and a caption, and one forward pass over some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from mmrpt.policy import Policy
from mmrpt.types import Pixels
from mmrpt_kernels.integrations.transformers import record_visual_mass


@dataclass(frozen=True)
class Prompt:
    """One user turn with one image: its token ids, image tokens included, and the processed image."""

    ids: list[int]
    pixels: Pixels


class CaptionModel(Protocol):
    """A model that captions can be scored by."""

    depth: int  # layers of the text model
    head_weight: Tensor  # (V, H)
    head_bias: Tensor | None
    markers: tuple[str, ...]  # of the chat and of images, which no caption may hold

    def prompt(self, instruction: str, image: Image.Image) -> Prompt:
        """Tokens and processed image of a user turn. Called in several threads."""
        ...

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, whose markers are ordinary characters, and the characters [start, end) of each."""
        ...

    def forward(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], layers: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Last hidden states (R, T, H) of rows of prompt and response, padded on the right.

        With `layers` also the attention mass (L, R, T, 2) of those layers, heads averaged, on the image's tokens and on
        the response's.
        """
        ...


class PolicyModel:
    """A policy as a `CaptionModel`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.depth: int = policy.model.config.get_text_config().num_hidden_layers
        self.markers = policy.markers

    @property
    def head_weight(self) -> Tensor:
        return self.policy.head_weight

    @property
    def head_bias(self) -> Tensor | None:
        return self.policy.head_bias

    def prompt(self, instruction: str, image: Image.Image) -> Prompt:
        (ids,), pixels = self.policy.prompts([instruction], [image])
        return Prompt(ids, pixels)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self.policy.encode_with_offsets(text)

    def forward(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], layers: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        policy = self.policy
        pixels = type(prompts[0].pixels).joined([prompt.pixels for prompt in prompts])
        batch = policy.batch([prompt.ids for prompt in prompts], responses, pixels, range(len(prompts)))
        if layers is None:
            return policy.hidden(batch), None
        groups = torch.stack((batch.input_ids == policy.image_token_id, batch.response_mask), -1)
        with record_visual_mass(policy.model, key_weights=groups, layers=layers, head_reduction="mean") as record:
            hidden = policy.hidden(batch, padded=True)
        return hidden, record.stacked()
