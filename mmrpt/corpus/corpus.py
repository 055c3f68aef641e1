"""A corpus: rows of any format, checked one by one when they are asked for, with ids that come from what they say."""

from __future__ import annotations

import hashlib
import posixpath
import threading
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mmrpt.corpus.images import decode
from mmrpt.corpus.rows import FORMATS, BadRow, CorpusError, Limits, Row, Table, caption_of, id_of, shown
from mmrpt.types import Example, PairSource

FIRST_ROWS = 32


@dataclass(frozen=True)
class _Survey:
    """What one sweep over all rows finds: 24 bytes a row."""

    ids: np.ndarray  # hashes of the ids, each once, sorted
    rows: np.ndarray  # of each of them the first row
    images: np.ndarray  # hash of each row's image name; 0 where the row is bad
    fingerprint: str
    notes: dict[str, int]

    def first_row(self, example_id: str) -> int | None:
        wanted = _hash(example_id)
        place = int(np.searchsorted(self.ids, wanted))
        return int(self.rows[place]) if place < len(self.ids) and self.ids[place] == wanted else None


class RandomAccess(PairSource, Protocol):
    """What a Corpus and the parts of it have in common."""

    name: str

    @property
    def fingerprint(self) -> str: ...

    def where(self, index: int) -> str: ...


class Corpus(PairSource):
    """Pairs of any format. `corpus[i]` is row i's Example, `image` decodes its picture; both raise BadRow.

    The first access sweeps over all rows once, without opening any image, for the ids: it takes seconds for half a
    million rows of JSON lines. Of two rows of one id the later one is bad.
    """

    def __init__(self, table: Table, limits: Limits) -> None:
        self.name, self.limits, self._table = table.name, limits, table
        self._known: _Survey | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row, caption, example_id = self._checked(index)
        first = self._survey().first_row(example_id)
        if first is None:
            raise _changed(row.where)
        if first != index:
            raise BadRow(
                row.where,
                "duplicate_id",
                f"the id {shown(example_id)} is that of {self.where(first)} already (without an id of its own a row is "
                "named by its image and caption). Remove the row, or give each row its own id.",
            )
        return Example(example_id, caption)

    def image(self, example_id: str) -> Image.Image:
        """The picture of an example in RGB, decoded in full. Raises BadRow, and KeyError for an unknown id."""
        index = self._survey().first_row(example_id)
        if index is None:
            raise KeyError(f"{example_id!r} is no id of the {len(self)} rows of {self.name}.")
        row, _, found = self._checked(index)
        if found != example_id:
            raise _changed(row.where)
        return self._decoded(index, row)

    def where(self, index: int) -> str:
        """ "file:line" of row `index`."""
        return self._table.where(index)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what the rows say, in their order: ids, captions and image names."""
        return self._survey().fingerprint

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen for the reader in reading the rows, with how many rows it concerns."""
        return tuple(f"{count} rows: {note}" for note, count in self._survey().notes.items())

    def image_hashes(self) -> np.ndarray:
        """(rows,) uint64, equal where two rows name the same image; 0 where a row is bad."""
        return self._survey().images

    def check_first_rows(self) -> None:
        """Raises CorpusError where none of the first rows, nor of as many from all over the file, is any good."""
        first = list(range(min(FIRST_ROWS, len(self))))
        spread = np.linspace(0, len(self) - 1, FIRST_ROWS).astype(int).tolist() if len(self) > FIRST_ROWS else []
        errors: list[BadRow] = []
        for index in first + spread:
            try:
                row, _, _ = self._checked(index)
                self._decoded(index, row)
                return
            except BadRow as error:
                errors.append(error)
        kinds = ", ".join(f"{kind} ({count})" for kind, count in Counter(e.kind for e in errors).most_common(3))
        examples = "\n".join(f"  {error}" for error in errors[:3])
        raise CorpusError(
            f"{self.name}: none of {len(errors)} rows that were tried can be used: {kinds}.\n{examples}\n"
            f"Expected one of: {FORMATS}."
            if errors
            else f"{self.name}: there are no pairs in it. Expected one of: {FORMATS}."
        )

    def _checked(self, index: int) -> tuple[Row, str, str]:
        row = self._table.row(index)
        caption = caption_of(row, self.limits)
        return row, caption, id_of(row, caption)

    def _decoded(self, index: int, row: Row) -> Image.Image:
        return decode(self._table.picture(index, row), row.image, row.where, self.limits)

    def _survey(self) -> _Survey:
        with self._lock:  # threads that come first wait for one sweep
            if self._known is None:
                self._known = _survey(self._table, self.limits)
        return self._known


def _survey(table: Table, limits: Limits) -> _Survey:
    ids, images, good = array("Q"), array("Q"), array("q")
    notes: Counter[str] = Counter()
    digest = hashlib.blake2b(digest_size=8)
    for index, row in enumerate(table.rows()):
        try:
            if isinstance(row, BadRow):
                raise row
            caption = caption_of(row, limits)
            example_id = id_of(row, caption)
        except BadRow as error:
            digest.update(_joined(error.kind, error.reason))
            images.append(0)
            continue
        if row.note:
            notes[row.note] += 1
        digest.update(_joined(example_id, caption, row.image))
        images.append(_hash(posixpath.normpath(row.image)) or 1)
        ids.append(_hash(example_id))
        good.append(index)
    unique, first = np.unique(np.array(ids, dtype=np.uint64), return_index=True)
    rows = np.array(good, dtype=np.int64)[first]
    return _Survey(unique, rows, np.array(images, dtype=np.uint64), digest.hexdigest(), dict(notes))


def _joined(*parts: str) -> bytes:
    return "\x00".join((*parts, "\x01")).encode("utf-8", "surrogatepass")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _changed(where: str) -> BadRow:
    return BadRow(where, "changed", "the row is another one than when the file was opened. Leave it as it is in a run.")


@dataclass(frozen=True)
class CorpusPart:
    """Some rows of a corpus, in their order."""

    corpus: Corpus
    rows: np.ndarray  # int64
    label: str

    @property
    def name(self) -> str:
        return f"{self.corpus.name}/{self.label}"

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self.corpus.fingerprint}/{self.label}".encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.corpus[int(self.rows[index])]

    def image(self, example_id: str) -> Image.Image:
        return self.corpus.image(example_id)

    def where(self, index: int) -> str:
        return self.corpus.where(int(self.rows[index]))


def split_held_out(corpus: Corpus, count: int, validation: int = 0) -> tuple[CorpusPart, CorpusPart, CorpusPart]:
    """(train, held out, validation): at least `count` rows (2 or more) are held out, and at least `validation` others
    kept for validation, chosen by a hash of their image's name. What is held out does not depend on `validation`.

    All captions of one image are on one side, and rows that come or go leave most others where they are. Rows that
    are bad already without their image stay in train, where they are met and counted.
    """
    images = corpus.image_hashes()
    rows = np.flatnonzero(images)
    order = np.argsort(images[rows], kind="stable")
    ranks = images[rows][order]

    def end(wanted: int) -> int:
        """The first place behind `wanted` rows and the others of the last one's image."""
        return int(np.searchsorted(ranks, ranks[wanted - 1], side="right")) if 0 < wanted <= len(ranks) else len(ranks)

    held = end(count)
    last = end(held + validation) if validation and held < len(rows) else held
    if count < 2 or last >= len(rows):
        names = "data.held_out is {} and data.validation {}" if validation else "data.held_out is {}"
        raise CorpusError(
            f"{names.format(count, validation)} of {len(corpus)} rows of {corpus.name}, {len(rows)} of them with "
            "caption and image name: expected at least 2 to evaluate on and at least one other image to train on. "
            f"Change {'them' if validation else 'data.held_out'} or bring more pairs."
        )
    sides = np.zeros(len(corpus), np.int8)
    sides[rows[order[:held]]], sides[rows[order[held:last]]] = 1, 2
    train, kept, validated = (np.flatnonzero(sides == side) for side in range(3))
    return (
        CorpusPart(corpus, train, "train"),
        CorpusPart(corpus, kept, "held_out"),
        CorpusPart(corpus, validated, "validation"),
    )
