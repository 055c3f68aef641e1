"""A scene: what stands where, drawn to pixels, and measured back from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmrpt.world import sprites
from mmrpt.world.concepts import COLOUR_NAMES, COLOURS, Concept
from mmrpt.world.draws import Draws

POSITIONS = ("top left", "top right", "bottom left", "bottom right")  # cell 0 to 3, row by row


@dataclass(frozen=True)
class Card:
    """A card: `box` is (left, top, right, bottom) in pixels, right and bottom exclusive; `cell` 0 to 3, row by row."""

    object: str
    category: str
    colour: str
    cell: int
    box: tuple[int, int, int, int]
    sprite: int
    sprite_size: int
    sprite_at: tuple[int, int]  # left, top of the sprite in the image
    shade: int

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class Scene:
    """The truth of one image. Cards in the order of their cells; no object twice."""

    cards: tuple[Card, ...]
    style: str
    background: int
    image_size: int

    def signature(self) -> str:
        """What is where, without jitter: two scenes of one signature show the same facts."""
        return ";".join(f"{card.cell} {card.object} {card.colour}" for card in self.cards)


def place(draws: Draws, cell: int, concept: Concept, colour: str, image_size: int, jitter: float = 1.0) -> Card:
    """A card in its cell, its size, place and tint jittered by `jitter` in [0, 1] of the room that there is.

    Lengths are in 112ths of the image, rounded to pixels.
    """
    unit = image_size / 112

    def around(middle: float, reach: float) -> int:
        return round(middle + reach * jitter * (2 * draws.uniform() - 1))

    side = around(48 * unit, 2 * unit)
    border = max(1, round(unit))
    free = (image_size // 2 - side) / 2
    left = cell % 2 * (image_size // 2) + around(free, free - border)
    top = cell // 2 * (image_size // 2) + around(free, free - border)
    size = min(around(38 * unit, 2 * unit), side - 2 * border - 2)
    slack = (side - size) // 2
    wobble = max(0, min(slack - 1 - border, round(unit)))
    at = tuple(edge + slack + around(0, wobble) for edge in (left, top))
    return Card(
        object=concept.name,
        category=concept.category,
        colour=colour,
        cell=cell,
        box=(left, top, left + side, top + side),
        sprite=concept.sprite,
        sprite_size=size,
        sprite_at=(at[0], at[1]),
        shade=draws.below(sprites.SHADES),
    )


def render(scene: Scene) -> Image.Image:
    """The RGB image of a scene."""
    image = sprites.background(scene.background, scene.image_size).copy()
    for card in scene.cards:
        left, top, right, _ = card.box
        art, margin = sprites.card(card.colour, card.shade, right - left)
        image.paste(art, (left - margin, top - margin), art)
        sticker = sprites.sprite(scene.style, card.sprite, card.sprite_size)
        image.paste(sticker, card.sprite_at, sticker)
    return image


def measured_colour(image: Image.Image, box: tuple[int, int, int, int]) -> str:
    """The colour name a card has in the pixels: the median of its rim, named by the nearest tint in CIELAB.

    The rim is the outermost row of card pixels but one, in the middle half of each side: inside the rounded corners
    and outside the sprite.
    """
    pixels = np.asarray(image.convert("RGB"))[box[1] : box[3], box[0] : box[2]]
    middle = slice(len(pixels) // 4, -(len(pixels) // 4))
    rim = np.concatenate([pixels[1, middle], pixels[-2, middle], pixels[middle, 1], pixels[middle, -2]])
    distance = np.linalg.norm(_lab(np.array(list(COLOURS.values()))) - _lab(np.median(rim, axis=0)), axis=-1)
    return COLOUR_NAMES[int(distance.argmin())]


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in 0..255 to CIELAB (D65)."""
    linear = np.asarray(rgb, float) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
