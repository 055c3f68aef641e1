"""Which pairs a run trains on, which it keeps for evaluation, and the texts its tokenizer learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mmrpt.corpus import (
    Corpus,
    CorpusError,
    GoodRows,
    Limits,
    RejectedRows,
    hold_to_corpus,
    open_corpus,
    split_held_out,
)
from mmrpt.settings import Settings, SettingsError
from mmrpt.types import PairSource
from mmrpt.world import RenderedWorld, World, open_world

TOKENIZER_CAPTIONS = 1_000


@dataclass(frozen=True)
class Sources:
    """`train` is sampled from, `facts` (in the demo's worlds its scenes, with captions of facts alone) by the first
    lessons; `held_out` names sets never trained on, and `validation` is neither trained nor evaluated on."""

    train: PairSource
    facts: PairSource
    held_out: dict[str, PairSource]
    world: World | RenderedWorld | None
    rejected: RejectedRows | None = None  # where the bad rows of a corpus are named
    validation: PairSource | None = None  # None where `evaluation.every` is 0

    @property
    def rows(self) -> PairSource:
        """The training rows as they are: a bad one raises BadRow, where `train` gives the next good one instead."""
        return self.train.corpus if isinstance(self.train, GoodRows) else self.train

    def texts(self) -> Iterator[str]:
        """What a tokenizer must know: captions and, for the demo's worlds, every word they can hold."""
        for index in range(min(TOKENIZER_CAPTIONS, len(self.train))):
            yield self.train[index].caption
        if self.world is not None:
            for word in self.world.vocabulary():
                yield from [f"{word} {word}"] * 2
        yield "user assistant describe restore: system"


def open_sources(settings: Settings) -> Sources:
    """Opens the pairs that the settings name. Raises SettingsError with the remedy when they cannot be used."""
    count = settings.data.validation if settings.evaluation.every else 0
    if settings.data.pairs is None:
        world = open_world(settings.demo.world)
        held_out = {name: world.source(name, 2 * settings.evaluation.samples) for name in world.HELD_OUT}
        facts = world.source("train", settings.demo.size, facts_only=True)
        validation = world.source("validation", count, held_out.values()) if count else None
        return Sources(world.source("train", settings.demo.size), facts, held_out, world, validation=validation)
    corpus = open_given(settings)
    try:
        parts = split_held_out(corpus, settings.data.held_out, count)
    except CorpusError as error:
        raise SettingsError(f"data.pairs: {error}") from error
    rejected = RejectedRows(settings.run_dir / "rejected.jsonl", settings.data.max_rejected)
    train, held_out, validation = (GoodRows(part, rejected) if len(part) else None for part in parts)
    return Sources(train, train, {"held_out": held_out}, None, rejected, validation)


def open_given(settings: Settings, *, hold: bool = True) -> Corpus:
    """All rows of data.pairs. Raises SettingsError where they cannot be used or are not those the run began with.

    Unless `hold`, which leaves a note of them in the run's folder, nothing is compared or written.
    """
    data = settings.data
    limits = Limits(
        root=data.root,
        max_megapixels=data.max_megapixels,
        max_aspect_ratio=data.max_aspect_ratio,
        max_caption_chars=data.max_caption_chars,
    )
    try:
        corpus = open_corpus(data.pairs, limits)
        if hold:
            hold_to_corpus(settings.run_dir / "corpus.json", corpus)
    except CorpusError as error:
        raise SettingsError(f"data.pairs: {error}") from error
    for note in corpus.notes:
        print(f"{data.pairs}: {note}")
    return corpus
