"""The rendered world: image-caption pairs with ground truth, of scenes that the package holds as pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

from PIL import Image

from mmrpt.settings import WorldConfig
from mmrpt.world.captions import Boxes, Caption, boxes_told, write_caption, write_facts
from mmrpt.world.draws import Draws
from mmrpt.world.rendered.atlas import Atlas, shipped_atlas
from mmrpt.world.rendered.captions import rendered_language, vocabulary
from mmrpt.world.rendered.logic import FORMS, Rules
from mmrpt.world.rendered.scene import MAX_SOLIDS, MIN_SOLIDS, RenderedScene
from mmrpt.world.world import SplitWorld, WorldPairs

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive


class RenderedWorld(SplitWorld):
    """Scenes and captions by (split, index). The same config gives the same pairs in every process.

    Splits: "train"; "one_solid", scenes of one solid, which no run uses; "new_scenes", arrangements that train never
    shows; "new_combinations", scenes made only of (object, colour) pairs that no other split shows; "validation",
    drawn as new_scenes are. Scenes do not depend on the seed, captions do. A split has so many scenes; after the last
    a source goes on with the first, under new captions.
    """

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "new_scenes", "new_combinations", "one_solid", "validation")
    HELD_OUT: ClassVar[tuple[str, ...]] = SPLITS[1:3]

    def __init__(self, config: WorldConfig | None = None, atlas: Atlas | None = None) -> None:
        """`atlas` None: the scenes of the package."""
        self.config = config or WorldConfig(kind="rendered")
        self.atlas = atlas or shipped_atlas()
        self._caption = lru_cache(maxsize=65_536)(self._write_caption)

    def __reduce__(self) -> tuple[type[RenderedWorld], tuple[WorldConfig, Atlas | None]]:
        own = None if self.atlas is shipped_atlas() else self.atlas
        return RenderedWorld, (self.config, own)  # loader processes open the package's scenes for themselves

    def source(
        self, split: str, size: int, without: Iterable[WorldPairs] = (), *, facts_only: bool = False
    ) -> WorldPairs:
        """The first `size` pairs of a split. A longer source starts with the same pairs. `facts_only`: of the same
        scenes, captions without a sentence that needs no image.

        `without` is as in the drawn world, and changes nothing: no two splits share an arrangement of several solids.
        """
        self._number(split)
        if size < 1:
            raise ValueError(f"a source of {size} pairs was asked for: expected 1 or more.")
        return WorldPairs(self, split, range(size), facts_only)

    def scene(self, split: str, index: int) -> RenderedScene:
        """The truth of the image of a pair."""
        scene, scale = self.atlas.scenes[split][self._place(split, index)], self.config.image_size
        if scale == scene.image_size:
            return scene
        return RenderedScene(
            tuple(replace(s, box=_scaled(s.box, scale / scene.image_size)) for s in scene.solids), scale
        )

    def image(self, example_id: str) -> Image.Image:
        """The RGB image of an example of any split, by its id, `config.image_size` pixels a side."""
        split, index = self._key(example_id)
        image, size = self.atlas.image(split, self._place(split, index)), self.config.image_size
        return image if image.width == size else image.resize((size, size), Image.Resampling.LANCZOS)

    def word_boxes(self, example_id: str, *, facts_only: bool = False) -> tuple[Boxes, ...]:
        """For each of the example's words the boxes of the solids that it speaks of (`boxes_told`)."""
        split, index = self._key(example_id)
        return boxes_told(self._caption(split, index, facts_only), self.scene(split, index).solids, FORMS)

    def vocabulary(self) -> tuple[str, ...]:
        """Every word a caption of this world can contain, without stops, sorted."""
        return vocabulary()

    def _write_caption(self, split: str, index: int, facts_only: bool) -> Caption:
        language = rendered_language(Rules(1, 1) if split == "one_solid" else Rules(MIN_SOLIDS, MAX_SOLIDS))
        scene, draws = self.scene(split, index), Draws(self.config.seed, self._number(split), index, 1 + facts_only)
        if facts_only:
            return write_facts(scene, draws, language)
        return write_caption(scene, draws, language, self.config.sentence_weights)

    def _place(self, split: str, index: int) -> int:
        self._number(split)
        return index % len(self.atlas.scenes[split])


def _scaled(box: Box, scale: float) -> Box:
    left, top, right, bottom = (round(scale * edge) for edge in box)
    return left, top, max(right, left + 1), max(bottom, top + 1)
