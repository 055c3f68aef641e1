"""What a rendered scene can hold, the truth of one, and the plan that it is rendered from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from mmrpt.world.draws import Draws

SHAPES = ("cube", "sphere", "cylinder", "cone", "ring")
MATERIALS = ("metal", "rubber")
POSITIONS = ("back left", "back middle", "back right", "front left", "front middle", "front right")  # cell 0 to 5
MIN_SOLIDS, MAX_SOLIDS = 3, 5  # of every split but "one_solid"

# What a solid reflects of red, green and blue light, linear. Far apart in hue, so that shade and gloss change no name.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.62, 0.03, 0.03),
    "orange": (0.88, 0.27, 0.01),
    "yellow": (0.85, 0.68, 0.03),
    "green": (0.06, 0.38, 0.07),
    "blue": (0.03, 0.13, 0.62),
    "purple": (0.25, 0.05, 0.50),
    "pink": (0.90, 0.24, 0.52),
    "grey": (0.28, 0.28, 0.28),
}
COLOUR_NAMES = tuple(COLOURS)
# The colours each shape has in the split "new_combinations" and nowhere else.
HELD_OUT_COLOURS = {
    "cube": ("purple", "orange"),
    "sphere": ("grey", "green"),
    "cylinder": ("red", "pink"),
    "cone": ("yellow", "blue"),
    "ring": ("green", "red"),
}
# As in the drawn world: the colour a shape has more often than chance, so that a guess without looking is worth more.
USUAL_COLOUR = {"cube": "red", "sphere": "blue", "cylinder": "green", "cone": "orange", "ring": "yellow"}
LANGUAGE_BIAS = 0.3
SOLIDS_WEIGHTS = (0.35, 0.35, 0.3)  # of 3, 4 and 5 solids

PITCH = (1.5, 1.75)  # between columns and rows of cells, in the units of the scene
JITTER = (0.15, 0.2)  # how far a solid stands from the middle of its cell, at most
# Of a solid of size 1: its height, and the radius of the circle on the ground that holds it.
HEIGHT = {"cube": 1.6, "sphere": 2.0, "cylinder": 1.8, "cone": 2.1, "ring": 0.64}
RADIUS = {"cube": 1.13, "sphere": 1.0, "cylinder": 0.85, "cone": 1.0, "ring": 1.04}


@dataclass(frozen=True)
class Solid:
    """A solid. `box` is (left, top, right, bottom) of its visible pixels, right and bottom exclusive; `visible` the
    share of its pixels that no other solid hides."""

    object: str
    colour: str
    material: str
    cell: int
    box: tuple[int, int, int, int]
    visible: float

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class RenderedScene:
    """The truth of one image: its solids in the order of their cells, boxes in pixels of `image_size`."""

    solids: tuple[Solid, ...]
    image_size: int

    def signature(self) -> str:
        """What is where, without jitter, camera and light: two scenes of one signature show the same facts."""
        return ";".join(f"{s.cell} {s.material} {s.colour} {s.object}" for s in self.solids)


@dataclass(frozen=True)
class PlannedSolid:
    """A solid before it is rendered: `x`, `y` its middle on the ground, `turn` in degrees about the vertical."""

    object: str
    colour: str
    material: str
    cell: int
    x: float
    y: float
    size: float
    turn: float


@dataclass(frozen=True)
class Plan:
    """A scene before it is rendered: `eye` and `target` of the camera and the middle of the `lamp`, all (x, y, z)."""

    solids: tuple[PlannedSolid, ...]
    eye: tuple[float, float, float]
    target: tuple[float, float, float]
    lamp: tuple[float, float, float]
    brightness: float
    ground: tuple[float, float, float]

    def signature(self) -> str:
        """As RenderedScene's."""
        return ";".join(f"{s.cell} {s.material} {s.colour} {s.object}" for s in self.solids)

    def is_free(self) -> bool:
        """Whether no two solids touch."""
        return all(
            math.dist((a.x, a.y), (b.x, b.y)) > a.size * RADIUS[a.object] + b.size * RADIUS[b.object]
            for a, b in combinations(self.solids, 2)
        )


def draw_cells(draws: Draws, split: str) -> list[int]:
    """The cells in which the solids of a scene stand."""
    count = 1 if split == "one_solid" else MIN_SOLIDS + draws.weighted(SOLIDS_WEIGHTS)
    return sorted(draws.sample(range(len(POSITIONS)), count))


def plan_scene(draws: Draws, cells: Sequence[int], split: str) -> Plan:
    """A scene of a split with solids in these cells, by its random draws alone."""
    solids = tuple(_plan_solid(draws, cell, split) for cell in cells)

    def around(middle: float, reach: float) -> float:
        return middle + reach * (2 * draws.uniform() - 1)

    turn, tilt, distance = math.radians(around(0, 6)), math.radians(around(40, 3)), around(8.6, 0.3)
    flat = distance * math.cos(tilt)
    eye = (flat * math.sin(turn), -flat * math.cos(turn), distance * math.sin(tilt))
    side, tint = around(0, 3.5), around(0, 0.03)
    return Plan(
        solids,
        eye,
        target=(around(0, 0.08), around(0.15, 0.08), 0.3),
        lamp=(side, around(-3, 1), around(8, 0.5)),
        brightness=around(1, 0.12),
        ground=(0.62 + tint, 0.61, 0.60 - tint),
    )


def _plan_solid(draws: Draws, cell: int, split: str) -> PlannedSolid:
    shape, row, column = draws.pick(SHAPES), *divmod(cell, 3)
    held_out = HELD_OUT_COLOURS[shape]
    if split == "new_combinations":
        colour = draws.pick(held_out)
    elif draws.uniform() < LANGUAGE_BIAS:
        colour = USUAL_COLOUR[shape]
    else:
        colour = draws.pick([name for name in COLOUR_NAMES if name not in held_out])
    material = draws.pick(MATERIALS)
    x = PITCH[0] * (column - 1) + JITTER[0] * (2 * draws.uniform() - 1)
    y = PITCH[1] * (0.5 - row) + JITTER[1] * (2 * draws.uniform() - 1)
    return PlannedSolid(shape, colour, material, cell, x, y, 0.48 + 0.1 * draws.uniform(), 90 * draws.uniform())
