"""The drawn world: endless image-caption pairs with ground truth, deterministic by seed, with fixed held-out sets."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from mmrpt.settings import WorldConfig
from mmrpt.types import Example, PairSource
from mmrpt.world import grammar
from mmrpt.world.captions import Boxes, Caption, boxes_told, drawn_language, write_caption, write_facts
from mmrpt.world.concepts import COLOUR_NAMES, Concept, all_concepts
from mmrpt.world.draws import Draws
from mmrpt.world.logic import CATEGORIES, COUNTS, FORMS, RELATIONS, Rules
from mmrpt.world.scene import POSITIONS, Card, Scene, place, render
from mmrpt.world.sprites import BACKGROUNDS

if TYPE_CHECKING:
    from mmrpt.world.rendered import RenderedWorld

_RESERVED = 8  # one of so many scenes is kept for the held-out sets
_PATIENCE = 10_000  # draws before a split is called impossible


class SplitWorld:
    """What the worlds share: pairs by (split, index), whose ids are "<split>/<number>"."""

    SPLITS: ClassVar[tuple[str, ...]]
    _caption: Callable[[str, int, bool], Caption]  # of a split, an index and whether it tells facts alone

    def example(self, split: str, index: int, *, facts_only: bool = False) -> Example:
        """The pair of a split at an index, its words with their truth. Kept in memory once made."""
        caption = self._caption(split, index, facts_only)
        return Example(f"{split}/{index:06d}", caption.text, caption.words)

    def _key(self, example_id: str) -> tuple[str, int]:
        split, _, number = example_id.partition("/")
        if split not in self.SPLITS or not number.isdecimal():
            raise KeyError(f"{example_id!r} is no id of this world: expected '<split>/<number>', as in 'train/000012'.")
        return split, int(number)

    def _number(self, split: str) -> int:
        if split not in self.SPLITS:
            raise ValueError(f"no split {split!r}: expected one of {', '.join(self.SPLITS)}.")
        return self.SPLITS.index(split)


class World(SplitWorld):
    """Scenes and captions by (split, index). The same config gives the same pairs in every process.

    Splits: "train"; "new_scenes", arrangements that train never shows; "new_combinations", scenes made only of
    (object, colour) pairs that no other split shows; "new_style", arrangements that train never shows, in artwork
    that no other split uses; "validation", drawn as new_scenes are. What is held out does not depend on the seed.
    """

    SPLITS: ClassVar[tuple[str, ...]] = ("train", "new_scenes", "new_combinations", "new_style", "validation")
    HELD_OUT: ClassVar[tuple[str, ...]] = SPLITS[1:4]

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = config or WorldConfig()
        self.concepts = all_concepts()[: self.config.concepts]
        rules = Rules(self.config.min_cards, self.config.max_cards, {c.name: c.category for c in self.concepts})
        self._language = drawn_language(rules)
        self._weights = [(k + 1) ** -self.config.object_zipf for k in range(len(self.concepts))]
        self._caption = lru_cache(maxsize=65_536)(self._write_caption)

    def __reduce__(self) -> tuple[type[World], tuple[WorldConfig]]:
        return World, (self.config,)  # loader processes draw for themselves; the memory of pairs stays here

    def source(
        self, split: str, size: int, without: Iterable[WorldPairs] = (), *, facts_only: bool = False
    ) -> WorldPairs:
        """The first `size` pairs of a split, those left out whose arrangement one of `without` shows. A longer source
        starts with the same pairs. `facts_only`: of the same scenes, captions without a sentence that needs no image.
        """
        self._number(split)
        if size < 1:
            raise ValueError(f"a source of {size} pairs was asked for: expected 1 or more.")
        if not (shown := {self.scene(other.split, i).signature() for other in without for i in other.indices}):
            return WorldPairs(self, split, range(size), facts_only)
        fresh = (i for i in range(_PATIENCE) if self.scene(split, i).signature() not in shown)
        indices = tuple(islice(fresh, size))
        if len(indices) < size:
            raise ValueError(
                f"of {_PATIENCE} scenes {len(indices)} are not among the held-out ones, but {size} were asked for: "
                "lower data.validation or evaluation.samples, or raise demo.world.concepts or max_cards."
            )
        return WorldPairs(self, split, indices, facts_only)

    def scene(self, split: str, index: int) -> Scene:
        """The truth of the image of a pair."""
        draws = Draws(self.config.seed, self._number(split), index, 0)
        reserved = split in ("new_scenes", "new_style", "validation")
        for _ in range(_PATIENCE):
            plan = self._plan(draws, split)
            text = ";".join(f"{cell} {concept.name} {colour}" for cell, concept, colour in plan)
            if split == "new_combinations" or _is_reserved(text) == reserved:
                break
        else:
            raise ValueError(f"no scene for {split} in {_PATIENCE} draws; raise demo.world.concepts or max_cards.")
        size = self.config.image_size
        cards: tuple[Card, ...] = tuple(place(draws, *part, size, self.config.jitter) for part in plan)
        return Scene(cards, "fluent" if split == "new_style" else "noto", draws.below(BACKGROUNDS), size)

    def image(self, example_id: str) -> Image.Image:
        """The RGB image of an example of any split, by its id."""
        return render(self.scene(*self._key(example_id)))

    def word_boxes(self, example_id: str, *, facts_only: bool = False) -> tuple[Boxes, ...]:
        """For each of the example's words the boxes of the cards that it speaks of (`boxes_told`)."""
        split, index = self._key(example_id)
        return boxes_told(self._caption(split, index, facts_only), self.scene(split, index).cards, FORMS)

    def vocabulary(self) -> tuple[str, ...]:
        """Every word a caption of this world can contain, without stops, sorted."""
        words = grammar.plain_words() | {concept.name for concept in self.concepts}
        for phrase in (*COLOUR_NAMES, *POSITIONS, *COUNTS, *RELATIONS, *CATEGORIES):
            words.update(phrase.split())
        return tuple(sorted(words))

    def _write_caption(self, split: str, index: int, facts_only: bool) -> Caption:
        scene, draws = self.scene(split, index), Draws(self.config.seed, self._number(split), index, 1 + facts_only)
        if facts_only:
            return write_facts(scene, draws, self._language)
        return write_caption(scene, draws, self._language, self.config.sentence_weights)

    def _plan(self, draws: Draws, split: str) -> list[tuple[int, Concept, str]]:
        """Which object in which colour stands in which cell, in the order of cells."""
        low, high = self.config.min_cards, self.config.max_cards
        count = low + draws.weighted(self.config.card_weights[low - 1 : high])
        chosen: list[Concept] = []
        while len(chosen) < count:
            concept = self._concept(draws)
            if concept not in chosen and (split != "new_combinations" or concept.held_out_colour):
                chosen.append(concept)
        cells = sorted(draws.sample(range(4), count))
        return [
            (cell, concept, self._colour(draws, concept, split)) for cell, concept in zip(cells, chosen, strict=True)
        ]

    def _concept(self, draws: Draws) -> Concept:
        if self.config.object_zipf == 0:
            return draws.pick(self.concepts)
        return self.concepts[draws.weighted(self._weights)]

    def _colour(self, draws: Draws, concept: Concept, split: str) -> str:
        if split == "new_combinations":
            return str(concept.held_out_colour)
        if draws.uniform() < self.config.language_bias:
            return concept.usual_colour
        return draws.pick([colour for colour in COLOUR_NAMES if colour != concept.held_out_colour])


def _is_reserved(signature: str) -> bool:
    return zlib.crc32(signature.encode()) % _RESERVED == 0


@dataclass(frozen=True)
class WorldPairs(PairSource):
    """Pairs of a split, made when they are asked for."""

    world: World | RenderedWorld
    split: str
    indices: Sequence[int]
    facts_only: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a source of {len(self)} pairs")
        return self.world.example(self.split, self.indices[index], facts_only=self.facts_only)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def image(self, example_id: str) -> Image.Image:
        return self.world.image(example_id)

    def word_boxes(self, example_id: str) -> tuple[Boxes, ...]:
        """For each of the example's words the boxes of what it speaks of."""
        return self.world.word_boxes(example_id, facts_only=self.facts_only)
