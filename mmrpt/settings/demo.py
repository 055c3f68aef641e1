"""The demo's settings: its world, the tiny model built for it, and the training that only a model from scratch
needs. A run on given pairs and a given model uses none of them."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mmrpt.settings.base import STRICT, require

CONCEPTS = 224  # objects that the drawn world has artwork for
IN_BOTH_WORLDS = ("kind", "seed", "image_size", "sentence_weights")  # the other settings are of the drawn world alone


@dataclass(frozen=True, config=STRICT)
class WorldConfig:
    """The demo's world: drawn cards with objects on them, or rendered scenes of solids, and captions that describe
    them."""

    kind: Literal["drawn", "rendered"] = Field(
        "drawn", description="drawn: cards, drawn as they are asked for; rendered: 3-D scenes, which the package holds"
    )
    seed: int = Field(0, ge=0, description="seed of the scenes and captions; the held-out combinations ignore it")
    concepts: int = Field(CONCEPTS, ge=16, le=CONCEPTS, description="how many different objects there are")
    image_size: int = Field(
        112, ge=56, le=1024, multiple_of=2, description="side of an image in pixels; a multiple of 28 suits the model"
    )
    jitter: float = Field(0.0, ge=0, le=1, description="how far cards move and scale within their cells, 0 to 1")
    min_cards: int = Field(1, ge=1, le=4, description="fewest cards of a scene, 1 to 4")
    max_cards: int = Field(4, ge=1, le=4, description="most cards of a scene, min_cards to 4")
    language_bias: float = Field(
        0.3, ge=0, le=1, description="probability that an object has its category's usual colour; 0: all colours alike"
    )
    object_zipf: float = Field(
        0.0, ge=0, le=5, description="exponent s: the k-th object is drawn in proportion to k ** -s; 0: all alike"
    )
    card_weights: tuple[float, ...] = Field(
        (0.15, 0.3, 0.3, 0.25), description="relative frequencies of scenes with 1, 2, 3 and 4 cards"
    )
    sentence_weights: tuple[float, ...] = Field(
        (0.2, 0.4, 0.25, 0.15), description="relative frequencies of captions with 3, 4, 5 and 6 sentences"
    )

    def __post_init__(self) -> None:
        require(
            self.min_cards <= self.max_cards,
            f"demo.world.max_cards is {self.max_cards}: expected at least demo.world.min_cards, {self.min_cards}.",
        )
        for name in ("card_weights", "sentence_weights"):
            weights = getattr(self, name)
            good = len(weights) == 4 and min(weights) >= 0 and sum(weights) > 0
            require(
                good, f"demo.world.{name} is {weights}: expected four relative frequencies, none negative, not all 0."
            )
        require(
            sum(self.card_weights[self.min_cards - 1 : self.max_cards]) > 0,
            f"demo.world.card_weights is {self.card_weights}: expected one above 0 from min_cards to max_cards.",
        )
        if self.kind == "rendered":
            self._refuse_settings_of_cards()

    def _refuse_settings_of_cards(self) -> None:
        """Rendered scenes are as they are: what would change cards must not be set in vain."""
        plain, demo = WorldConfig(), demo_world()
        for name in (f.name for f in fields(self) if f.name not in IN_BOTH_WORLDS):
            value = getattr(self, name)
            require(
                value in (getattr(plain, name), getattr(demo, name)),
                f"demo.world.{name} is {value}: expected {getattr(demo, name)}, since the rendered world has no cards; "
                "leave it out, or set demo.world.kind=drawn.",
            )


@dataclass(frozen=True, config=STRICT)
class TinyVLMConfig:
    """Kind and sizes of the tiny model: 1.8 million parameters, 16 visual tokens for a 112 x 112 image."""

    family: Literal["qwen2_5_vl", "qwen3_vl"] = Field(
        "qwen2_5_vl", description="architecture; qwen3_vl learns where an image's patches stand, qwen2_5_vl does not"
    )
    hidden_size: int = Field(128, gt=0, description="width of the decoder; heads times a multiple of 8")
    layers: int = Field(5, gt=0, description="layers of the decoder")
    heads: int = Field(4, gt=0, description="attention heads of the decoder")
    kv_heads: int = Field(2, gt=0, description="key and value heads of the decoder; divides heads")
    intermediate_size: int = Field(352, gt=0, description="width of the decoder's MLP")
    vision_hidden_size: int = Field(128, gt=0, description="width of the vision tower")
    vision_layers: int = Field(2, gt=0, description="layers of the vision tower")
    vision_heads: int = Field(4, gt=0, description="attention heads of the vision tower")
    vision_intermediate_size: int = Field(256, gt=0, description="width of the vision tower's MLP")
    patch_size: int = Field(14, gt=0, description="side of an image patch in pixels; four patches make a visual token")
    vocab_size: int = Field(2048, ge=512, description="most tokens of the tokenizer; bytes and markers need 512")
    max_pixels: int = Field(224 * 224, gt=0, description="pixels above which an image is scaled down")
    patch_std: float = Field(16.0, gt=0, description="standard deviation of the embedded patches at the start")
    feature_std: float = Field(
        0.2,
        gt=0,
        description="standard deviation of image features at the start; word embeddings have 0.02",
    )
    # The drawn world is bright. With CLIP's statistics nearly every pixel is far above zero, the features of all images
    # grow one large common part, and the model learns to ignore them.
    image_mean: tuple[float, float, float] = Field(
        (0.75, 0.70, 0.65), description="subtracted from red, green and blue, which run from 0 to 1"
    )
    image_std: tuple[float, float, float] = Field(
        (0.25, 0.25, 0.25), description="divides red, green and blue after the mean is subtracted"
    )

    def __post_init__(self) -> None:
        require(
            self.hidden_size % self.heads == 0 and self.hidden_size // self.heads % 8 == 0,
            f"demo.tiny.hidden_size / demo.tiny.heads is {self.hidden_size} / {self.heads}: expected a head size that "
            "is a multiple of 8 (three rotary sections share it); change one of the two.",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"demo.tiny.heads / demo.tiny.kv_heads is {self.heads} / {self.kv_heads}: expected a whole number.",
        )
        require(min(self.image_std) > 0, f"demo.tiny.image_std is {self.image_std}: expected numbers above 0.")


def demo_world() -> WorldConfig:
    """The drawn world as a laptop meets it: shorter captions, fewer cards, objects as unequal as words are."""
    return WorldConfig(object_zipf=1.0, card_weights=(0.35, 0.3, 0.2, 0.15), sentence_weights=(0.5, 0.3, 0.15, 0.05))


def demo_model() -> TinyVLMConfig:
    """The tiny model as the demo trains it: Qwen3-VL's MLP of the vision tower has two matrices, Qwen2.5-VL's three."""
    return TinyVLMConfig(family="qwen3_vl", vision_intermediate_size=384)


@dataclass(frozen=True, config=STRICT)
class DemoSettings:
    """The demo: pairs of a small world (unless data.pairs is given) and a tiny model (unless model.path is given)."""

    size: int = Field(20_000, ge=1, description="pairs of the training split of demo.world")
    vision_steps: int = Field(
        100, ge=0, description="optimiser steps of the vision tower's pre-training; always 0 with model.path"
    )
    vision_batch_size: int = Field(32, ge=1, description="images in a step of the vision pre-training")
    vision_lr: float = Field(3e-3, gt=0, description="peak learning rate of the vision pre-training")
    vision_frozen_steps: int = Field(
        30,
        ge=0,
        description="first steps of the warm-up, without the vision tower; always 0 with model.path",
    )
    fact_steps: int = Field(
        160,
        ge=0,
        description="first steps of the warm-up, on captions that tell facts alone; always 0 with data.pairs",
    )
    lesson_batch_size: int = Field(
        48, ge=1, description="rows in a step of the warm-up that trains on facts alone or on 1 to 3 sentences"
    )
    grounding: float = Field(
        0.3,
        ge=0,
        description="weight in the warm-up of the loss that shows attention where the things are that words name, 0: "
        "none; always 0 with data.pairs or model.path",
    )
    world: WorldConfig = field(default_factory=demo_world)
    tiny: TinyVLMConfig = field(default_factory=demo_model)
