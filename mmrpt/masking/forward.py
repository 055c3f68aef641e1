"""What masking needs from a VLM: token rows of a prompt and a caption, and one forward pass over some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from mmrpt.policy import Policy
from mmrpt.types import PixelBatch
from mmrpt_kernels.integrations.transformers import record_visual_mass


@dataclass(frozen=True)
class Prompt:
    """One user turn with one image: its token ids, image tokens included, and what the vision tower takes."""

    ids: list[int]
    tensors: dict[str, Tensor]


class CaptionModel(Protocol):
    """A model that captions can be scored by: the trainer's `Policy`, or any family that the recorder serves."""

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
    """The trainer's policy as a `CaptionModel`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.depth: int = policy.model.config.get_text_config().num_hidden_layers
        self.markers = policy.markers
        self.head_bias = None
        self._tokenizer_lock = Lock()  # a tokenizer's options are state of its own, which calls in other threads change

    @property
    def head_weight(self) -> Tensor:
        return self.policy.head_weight

    def prompt(self, instruction: str, image: Image.Image) -> Prompt:
        pixels = self.policy.pixels([image])
        with self._tokenizer_lock:
            ids = self.policy.encode_prompt(instruction, int(pixels.tokens_per_image(self.policy.merge_size)))
        return Prompt(ids, {"pixel_values": pixels.pixel_values, "grid_thw": pixels.grid_thw})

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        with self._tokenizer_lock:
            return self.policy.encode_with_offsets(text)

    def forward(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], layers: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        policy = self.policy
        pixels = PixelBatch(*(torch.cat([p.tensors[name] for p in prompts]) for name in ("pixel_values", "grid_thw")))
        batch = policy.batch([p.ids for p in prompts], responses, pixels, range(len(prompts)))
        if layers is None:
            return policy.hidden(batch), None
        groups = torch.stack((batch.input_ids == policy.image_token_id, batch.response_mask), -1)
        with record_visual_mass(policy.text_model, key_weights=groups, layers=layers, head_reduction="mean") as record:
            hidden = policy.hidden(batch, padded=True)
        return hidden, record.stacked()
