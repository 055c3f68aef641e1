"""The artwork: sprites, cards and backgrounds, each made once and kept."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from mmrpt.world.concepts import ASSETS, COLOURS

SPRITE = 64  # side of a sprite in the sheets, pixels
COLUMNS = 16
SHADES = 5  # steps of brightness of a tint
BACKGROUNDS = 24


@cache
def _sheet(style: str) -> Image.Image:
    with (ASSETS / f"{style}.png").open("rb") as file:
        return Image.open(file).convert("RGBA")


@cache
def sprite(style: str, number: int, size: int) -> Image.Image:
    """A concept's picture as a sticker, RGBA (size, size): a thin white rim keeps a tomato visible on a red card."""
    column, row = number % COLUMNS, number // COLUMNS
    box = (column * SPRITE, row * SPRITE, (column + 1) * SPRITE, (row + 1) * SPRITE)
    inner = size - 2
    art = _sheet(style).crop(box).convert("RGBa").resize((inner, inner), Image.Resampling.LANCZOS).convert("RGBA")
    page = Image.new("RGBA", (size, size))
    page.paste(art, (1, 1))
    rim = page.getchannel("A").filter(ImageFilter.MaxFilter(3))
    rim = rim.point(lambda a: a * 4 // 5)
    sticker = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    sticker.putalpha(rim)
    return Image.alpha_composite(sticker, page)


@cache
def card(colour: str, shade: int, side: int) -> tuple[Image.Image, int]:
    """A rounded card with a soft shadow, RGBA, and the margin its shadow adds on each side, pixels."""
    margin = max(2, side // 16)
    scale = 4
    big = Image.new("L", (side * scale, side * scale))
    ImageDraw.Draw(big).rounded_rectangle((0, 0, side * scale - 1, side * scale - 1), side * scale // 6, fill=255)
    shape = big.resize((side, side), Image.Resampling.BOX)
    full = Image.new("L", (side + 2 * margin, side + 2 * margin))
    full.paste(shape, (margin, margin))
    shadow = ImageChops.offset(full, 0, margin // 2).filter(ImageFilter.GaussianBlur(margin / 2))
    art = Image.new("RGBA", full.size, (60, 60, 70, 0))
    art.putalpha(shadow.point(lambda a: a // 4))
    step = 3 * (shade - SHADES // 2)
    tint = Image.new("RGBA", full.size, (*(min(255, max(0, v + step)) for v in COLOURS[colour]), 255))
    tint.putalpha(full)
    return Image.alpha_composite(art, tint), margin


@cache
def background(number: int, size: int) -> Image.Image:
    """A light neutral page, RGB (size, size): plain, grained, ruled, dotted or shaded."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((7, number))))
    base = np.array([244, 243, 240]) + rng.integers(-8, 9, 3) // 2
    page = np.broadcast_to(base, (size, size, 3)).astype(float).copy()
    pattern = number % 5
    y, x = np.mgrid[:size, :size]
    if pattern == 1:
        page += rng.normal(0, 3.0, (size, size, 1))
    elif pattern == 2:
        page[(y % 8) == number % 8] -= 10
    elif pattern == 3:
        page[((x % 9) < 2) & ((y % 9) < 2)] -= 12
    elif pattern == 4:
        page += ((x + y) / (2 * size) - 0.5)[..., None] * 16
    return Image.fromarray(np.clip(page, 0, 255).astype(np.uint8))
