"""Draw docs/world.png: scenes of three splits, their captions, and in colour the words that need the image.

python tools/draw_world.py [--out docs/world.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmrpt.types import Example
from mmrpt.world import World

COLUMNS, SIDE, GAP, TEXT = 5, 200, 24, 128  # pixels; TEXT is the height of a caption
ROWS = {
    "train": "train",
    "new_combinations": "new combinations of object and colour, never trained on",
    "new_style": "new art style, never trained on",
}
INK, NEEDS, PAPER = (40, 40, 46), (196, 40, 92), (255, 255, 255)


def write(draw: ImageDraw.ImageDraw, example: Example, left: int, top: int, font: ImageFont.FreeTypeFont) -> None:
    """The caption in lines of SIDE pixels, words that need the image coloured."""
    x, y = left, top
    for i, word in enumerate(example.words):
        following = example.words[i + 1].start if i + 1 < len(example.words) else len(example.caption)
        text = example.caption[word.start : word.end]
        stop = example.caption[word.end : following].strip()
        if x + draw.textlength(text + stop, font) > left + SIDE:
            x, y = left, y + 16
        draw.text((x, y), text, NEEDS if word.needs_image else INK, font, stroke_width=0.4 * word.needs_image)
        x += draw.textlength(text, font)
        draw.text((x, y), stop, INK, font)
        x += draw.textlength(stop + " ", font)


def sheet(world: World) -> Image.Image:
    font, title = ImageFont.load_default(13), ImageFont.load_default(16)
    row_height = 30 + SIDE + 6 + TEXT
    page = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), 40 + len(ROWS) * row_height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 10), "Words in colour need the image: the rest of the caption does not tell them.", NEEDS, title)
    for row, (split, name) in enumerate(ROWS.items()):
        top = 40 + row * row_height
        draw.text((GAP, top + 4), name, INK, title)
        shown = [e for e in world.source(split, 60) if len(e.caption) < 190 and len(world.scene(*key(e)).cards) > 1]
        for column, example in enumerate(shown[:COLUMNS]):
            left = GAP + column * (SIDE + GAP)
            picture = world.image(example.id).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            page.paste(picture, (left, top + 30))
            draw.rectangle((left, top + 30, left + SIDE - 1, top + 29 + SIDE), outline=(205, 205, 205))
            write(draw, example, left, top + 36 + SIDE, font)
    return page


def key(example: Example) -> tuple[str, int]:
    split, _, number = example.id.partition("/")
    return split, int(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/world.png"))
    args = parser.parse_args()
    page = sheet(World()).quantize(200, dither=Image.Dither.NONE)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    page.save(args.out, optimize=True)
    print(f"{args.out}: {page.width} x {page.height}, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
