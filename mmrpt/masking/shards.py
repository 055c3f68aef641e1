"""Scored captions on disk: files of a thousand rows of the corpus, each complete or absent, so that scoring may stop
anywhere, be done by several processes, and never be held in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrpt.corpus import BadRow, iter_jsonl, write_jsonl
from mmrpt.types import Example, SentenceScore, Word

SHARD_ROWS = 1000


@dataclass(frozen=True)
class ScoredCaption:
    """One row of the corpus: its caption with the raw scores of its sentences, or why it was rejected."""

    example: Example | None
    scores: tuple[SentenceScore, ...] = ()
    error: BadRow | None = None
    example_id: str | None = None  # of a rejected row, where it is known

    def to_json(self) -> dict[str, Any]:
        if self.error is not None:
            error = self.error
            return {"where": error.where, "kind": error.kind, "reason": error.reason, "id": self.example_id}
        example = self.example
        words = [[w.start, w.end, w.kind, w.needs_image] for w in example.words]
        rows = [score_to_json(s) for s in self.scores]
        for row in rows:
            del row["example_id"]
        return {"id": example.id, "caption": example.caption, "words": words, "sentences": rows}

    @staticmethod
    def from_json(row: dict[str, Any]) -> ScoredCaption:
        if "kind" in row:
            return ScoredCaption(None, (), BadRow(row["where"], row["kind"], row["reason"]), row["id"])
        example = Example(row["id"], row["caption"], tuple(Word(*word) for word in row["words"]))
        return ScoredCaption(example, tuple(score_from_json({"example_id": example.id, **s}) for s in row["sentences"]))


@dataclass(frozen=True)
class Shards:
    """The shard files of `rows` rows in `folder`."""

    folder: Path
    rows: int

    @property
    def count(self) -> int:
        return -(-self.rows // SHARD_ROWS)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.jsonl"

    def range(self, number: int) -> range:
        """The rows of the corpus that a shard holds."""
        return range(number * SHARD_ROWS, min((number + 1) * SHARD_ROWS, self.rows))

    def missing(self, part: int = 0, parts: int = 1) -> list[int]:
        """Shards still to be scored, of those whose number is `part` modulo `parts`."""
        return [number for number in range(part, self.count, parts) if not self.path(number).exists()]

    def write(self, number: int, captions: Iterable[ScoredCaption]) -> None:
        write_jsonl(self.path(number), (caption.to_json() for caption in captions))

    def captions(self) -> Iterator[ScoredCaption]:
        """All rows in the order of the corpus, one in memory at a time."""
        for number in range(self.count):
            rows = 0
            for row in iter_jsonl(self.path(number)):
                rows += 1
                yield ScoredCaption.from_json(row)
            if rows != len(self.range(number)):
                raise ValueError(
                    f"{self.path(number)} holds {rows} rows, expected {len(self.range(number))}: it is of another run "
                    "or was changed. Remove it and resume."
                )

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def score_to_json(score: SentenceScore) -> dict[str, Any]:
    return {name: value for name, value in vars(score).items() if name != "mass" or value is not None}


def score_from_json(row: dict[str, Any]) -> SentenceScore:
    """A row of scores.jsonl, which also holds the sentence's text and the truth of its tokens, or of a shard."""
    row = {name: value for name, value in row.items() if name not in ("text", "token_needs_image")}
    row["token_spans"] = tuple(tuple(span) for span in row["token_spans"])
    return SentenceScore(**{**row, "token_scores": tuple(row["token_scores"])})
