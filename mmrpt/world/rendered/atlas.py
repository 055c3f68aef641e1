"""The rendered scenes on disk: `scenes.json.gz` with the truth of each, `images.bin` with their WebP files in a row."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrpt.world.concepts import ASSETS
from mmrpt.world.rendered.scene import COLOUR_NAMES, MATERIALS, SHAPES, RenderedScene, Solid

ATLAS = ASSETS / "rendered"
IMAGE_SIZE = 112  # pixels of a side, as the tiny model takes them
SIZES = {"train": 1200, "new_combinations": 300, "validation": 100, "one_solid": 100, "new_scenes": 400}
TRUTH, IMAGES = "scenes.json.gz", "images.bin"


@dataclass(frozen=True)
class Part:
    """Scenes of one split beside each other, and the WebP file of each."""

    split: str
    scenes: list[RenderedScene]
    images: list[bytes]


class Atlas:
    """All scenes of a folder, images decoded when they are asked for."""

    def __init__(self, folder: Traversable | Path = ATLAS) -> None:
        try:
            tree = json.loads(gzip.decompress((folder / TRUTH).read_bytes()))
            self._bytes = (folder / IMAGES).read_bytes()
        except OSError as error:
            raise FileNotFoundError(
                f"no rendered scenes in {folder} ({error}): install the package again; from a checkout: "
                "git checkout -- mmrpt/world/assets"
            ) from error
        self.image_size = tree["image_size"]
        self.scenes = {s: [_from_row(row, self.image_size) for row in rows] for s, rows in tree["scenes"].items()}
        lengths = [size for split in self.scenes for size in tree["bytes"][split]]
        ends = np.cumsum([0, *lengths]).tolist()
        if ends[-1] != len(self._bytes):
            raise ValueError(f"{folder / IMAGES} has {len(self._bytes)} bytes: expected {ends[-1]}, by {TRUTH}.")
        keys = [(split, index) for split, scenes in self.scenes.items() for index in range(len(scenes))]
        self._place = {key: ends[i : i + 2] for i, key in enumerate(keys)}

    def image(self, split: str, index: int) -> Image.Image:
        """The RGB picture of a scene, `image_size` pixels a side."""
        start, end = self._place[split, index]
        return Image.open(io.BytesIO(self._bytes[start:end])).convert("RGB")


@cache
def shipped_atlas() -> Atlas:
    """The scenes of the package, read once."""
    return Atlas()


def write_atlas(folder: Path, parts: Sequence[Part]) -> int:
    """Writes both files; their size in bytes. The same parts give the same bytes."""
    splits = dict.fromkeys(part.split for part in parts)
    images = [image for split in splits for part in parts if part.split == split for image in part.images]
    tree = {
        "image_size": IMAGE_SIZE,
        "scenes": {s: [_to_row(scene) for p in parts if p.split == s for scene in p.scenes] for s in splits},
        "bytes": {s: [len(image) for p in parts if p.split == s for image in p.images] for s in splits},
    }
    folder.mkdir(parents=True, exist_ok=True)
    truth = gzip.compress(json.dumps(tree, separators=(",", ":")).encode(), mtime=0)
    (folder / TRUTH).write_bytes(truth)
    (folder / IMAGES).write_bytes(b"".join(images))
    return len(truth) + sum(map(len, images))


def write_part(path: Path, part: Part) -> None:
    """One part as a file of its own, whole or not at all."""
    tree = {"split": part.split, "scenes": [_to_row(s) for s in part.scenes], "bytes": [len(i) for i in part.images]}
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(json.dumps(tree).encode() + b"\n" + b"".join(part.images))
    os.replace(unfinished, path)


def read_part(path: Path) -> Part:
    """The part of a file of `write_part`."""
    head, _, data = path.read_bytes().partition(b"\n")
    tree = json.loads(head)
    ends = np.cumsum([0, *tree["bytes"]]).tolist()
    images = [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    return Part(tree["split"], [_from_row(row, IMAGE_SIZE) for row in tree["scenes"]], images)


def _to_row(scene: RenderedScene) -> list[list[Any]]:
    return [
        [SHAPES.index(s.object), COLOUR_NAMES.index(s.colour), MATERIALS.index(s.material), s.cell, *s.box, s.visible]
        for s in scene.solids
    ]


def _from_row(row: list[list[Any]], image_size: int) -> RenderedScene:
    solids = (
        Solid(SHAPES[shape], COLOUR_NAMES[colour], MATERIALS[material], cell, tuple(box), visible)
        for shape, colour, material, cell, *box, visible in row
    )
    return RenderedScene(tuple(solids), image_size)
