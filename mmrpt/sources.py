"""Which pairs a run trains on, which it keeps for evaluation, and the texts its tokenizer learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image

from mmrpt.data import open_pairs
from mmrpt.settings import Settings, SettingsError
from mmrpt.types import Example, PairSource
from mmrpt.world import World

TOKENIZER_CAPTIONS = 1_000


@dataclass(frozen=True)
class Sources:
    """`train` is sampled from, `one_card` (scenes of one card, where the world draws) by the warm-up's first lessons;
    `held_out` names sets never trained on."""

    train: PairSource
    one_card: PairSource
    held_out: dict[str, PairSource]
    world: World | None

    def texts(self) -> Iterator[str]:
        """What a tokenizer must know: captions and, for the drawn world, every word they can hold."""
        for index in range(min(TOKENIZER_CAPTIONS, len(self.train))):
            yield self.train[index].caption
        if self.world is not None:
            for word in self.world.vocabulary():
                yield from [f"{word} {word}"] * 2
        yield "user assistant describe restore: system"


def open_sources(settings: Settings) -> Sources:
    """Opens the pairs that the settings name. Raises SettingsError with the remedy when they cannot be used."""
    if settings.data.pairs is None:
        world = World(settings.demo.world)
        held_out = {n: world.source(n, 2 * settings.evaluation.samples) for n in world.SPLITS if n != "train"}
        simple = World(replace(settings.demo.world, min_cards=1, max_cards=1))
        first = simple.source("train", settings.demo.size)
        return Sources(world.source("train", settings.demo.size), first, held_out, world)
    try:
        pairs = open_pairs(settings.data.pairs)
    except (OSError, ValueError) as error:
        raise SettingsError(f"data.pairs: {error}") from error
    kept = len(pairs) - settings.data.held_out
    if kept < 1 or settings.data.held_out < 2:
        raise SettingsError(
            f"data.held_out is {settings.data.held_out} of {len(pairs)} pairs: expected at least 2 to evaluate on and "
            "at least 1 left to train on; change data.held_out or bring more pairs."
        )
    train = _Part(pairs, 0, kept)
    return Sources(train, train, {"held_out": _Part(pairs, kept, len(pairs))}, None)


@dataclass(frozen=True)
class _Part:
    """Pairs [start, stop) of another source."""

    pairs: PairSource
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.pairs[self.start + index]

    def image(self, example_id: str) -> Image.Image:
        return self.pairs.image(example_id)
