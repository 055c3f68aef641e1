"""Draw docs/world.png: scenes of three splits, their captions, and in colour the words that need the image.

python tools/draw_world.py [--kind rendered] [--out docs/world.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmrpt.types import Example
from mmrpt.world import RenderedWorld, World, WorldConfig, open_world

COLUMNS, SIDE, GAP, TEXT = 5, 200, 24, 128  # pixels; TEXT is the height of a caption
ROWS = {
    "train": "train",
    "new_combinations": "new combinations of object and colour, never trained on",
}
LAST_ROW = {
    "drawn": {"new_style": "new art style, never trained on"},
    "rendered": {"one_solid": "one solid"},
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


def sheet(world: World | RenderedWorld) -> Image.Image:
    rows = ROWS | LAST_ROW[world.config.kind]
    font, title = ImageFont.load_default(13), ImageFont.load_default(16)
    row_height = 30 + SIDE + 6 + TEXT
    page = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), 40 + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 10), "Words in colour need the image: the rest of the caption does not tell them.", NEEDS, title)
    for row, (split, name) in enumerate(rows.items()):
        top = 40 + row * row_height
        draw.text((GAP, top + 4), name, INK, title)
        shown = [e for e in world.source(split, 60) if len(e.caption) < 190 and is_full(world, e)]
        for column, example in enumerate(shown[:COLUMNS]):
            left = GAP + column * (SIDE + GAP)
            picture = world.image(example.id).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            page.paste(picture, (left, top + 30))
            draw.rectangle((left, top + 30, left + SIDE - 1, top + 29 + SIDE), outline=(205, 205, 205))
            write(draw, example, left, top + 36 + SIDE, font)
    return page


def is_full(world: World | RenderedWorld, example: Example) -> bool:
    """Whether the scene is worth a place in the sheet: not a drawn one of a single card."""
    split, _, number = example.id.partition("/")
    return isinstance(world, RenderedWorld) or len(world.scene(split, int(number)).cards) > 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=LAST_ROW, default="drawn")
    parser.add_argument("--out", type=Path, help="default: docs/world.png, or docs/rendered_world.webp")
    args = parser.parse_args()
    out = args.out or Path("docs/world.png" if args.kind == "drawn" else "docs/rendered_world.webp")
    page = sheet(open_world(WorldConfig(kind=args.kind)))
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        page.quantize(200, dither=Image.Dither.NONE).save(out, optimize=True)
    else:
        page.save(out, quality=75, method=6)
    print(f"{out}: {page.width} x {page.height}, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
