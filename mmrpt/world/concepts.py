"""What can be drawn: the concepts, their categories, the colours of cards, and which pairs are held out."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

ASSETS = files("mmrpt.world") / "assets"
STYLES = ("noto", "fluent")  # the trained artwork, and the one kept for the held-out set "new_style"

# Tints of cards, sRGB. Far enough apart that small jitter never makes one look like another (tests measure it).
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 70, 64),
    "orange": (245, 148, 48),
    "yellow": (250, 222, 84),
    "green": (96, 178, 84),
    "blue": (78, 134, 226),
    "purple": (142, 88, 198),
    "pink": (247, 164, 202),
    "grey": (146, 148, 152),
}
COLOUR_NAMES = tuple(COLOURS)

# The colour that language bias gives a category's cards more often than chance.
USUAL_COLOUR = {
    "animal": "green",
    "bird": "blue",
    "insect": "yellow",
    "plant": "pink",
    "fruit": "orange",
    "vegetable": "green",
    "food": "yellow",
    "sweet": "pink",
    "drink": "purple",
    "building": "grey",
    "nature": "blue",
    "vehicle": "red",
    "toy": "orange",
    "treasure": "yellow",
    "clothing": "purple",
    "instrument": "red",
    "tool": "grey",
    "stationery": "pink",
    "device": "purple",
    "furniture": "orange",
}


@dataclass(frozen=True)
class Concept:
    """One thing that can stand on a card. `sprite` is its place in the sheets, `code_point` its emoji."""

    name: str
    category: str
    code_point: str
    sprite: int

    @property
    def usual_colour(self) -> str:
        return USUAL_COLOUR[self.category]

    @property
    def held_out_colour(self) -> str | None:
        """The colour this concept never has outside the split "new_combinations"; None for about one in five.

        A property of the name alone, so it is the same for every seed and every number of concepts: with 8 colours
        about 10 % of all (object, colour) pairs are held out. Never the usual colour, which would undo the bias.
        """
        if zlib.crc32(f"held out {self.name}".encode()) % 5 == 0:
            return None
        others = [colour for colour in COLOUR_NAMES if colour != self.usual_colour]
        return others[zlib.crc32(f"colour {self.name}".encode()) % len(others)]


@cache
def all_concepts() -> tuple[Concept, ...]:
    """Every concept, in an order that mixes the categories, so that the first n are a fair choice."""
    rows = json.loads((ASSETS / "concepts.json").read_text(encoding="utf-8"))
    concepts = [Concept(row["name"], row["category"], row["code_point"], i) for i, row in enumerate(rows)]
    return tuple(sorted(concepts, key=lambda c: zlib.crc32(f"order {c.name}".encode())))
