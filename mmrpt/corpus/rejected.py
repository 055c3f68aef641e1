"""Bad rows on the way of a run: each is written down once with its reason and passed over, up to a limit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from mmrpt.corpus.cache import ImageCache
from mmrpt.corpus.corpus import RandomAccess
from mmrpt.corpus.files import JsonlWriter, iter_jsonl
from mmrpt.corpus.rows import BadRow, CorpusError
from mmrpt.types import Example, PairSource

ALWAYS_ALLOWED = 10
_GOOD, _BAD = 1, 2  # 0: not visited


def too_many(rejected: int, visited: int, max_rejected: float) -> bool:
    """Whether so many bad rows among those visited end a run."""
    return rejected > max(ALWAYS_ALLOWED, max_rejected * visited)


class _Tally:
    """How many rows were bad, by kind, and the first three of them."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.examples: list[BadRow] = []

    def add(self, error: BadRow) -> None:
        self.kinds[error.kind] += 1
        if len(self.examples) < 3:
            self.examples.append(error)


class RejectedRows:
    """The rows that a run cannot use, in `path` (rejected.jsonl): {"where", "kind", "message", "id"}, each once.

    A resumed run goes on in the same file. `check` looks at what this process has met, so that it means the same
    however often a run was interrupted.
    """

    def __init__(self, path: str | Path, max_rejected: float) -> None:
        self.path, self.max_rejected = Path(path), max_rejected
        rows = iter_jsonl(self.path) if self.path.exists() else ()
        self._written: dict[str, str] = {row["where"]: row["kind"] for row in rows}
        self._met: set[str] = set()
        self._tally = _Tally()

    @property
    def counts(self) -> dict[str, int]:
        """Rejected rows by kind, the commonest first; those of earlier starts of the run included."""
        return dict(Counter(self._written.values()).most_common())

    def add(self, error: BadRow, example_id: str | None = None) -> None:
        self.write(error, example_id)
        if error.where not in self._met:
            self._met.add(error.where)
            self._tally.add(error)

    def check(self, visited: int) -> None:
        """Raises CorpusError where more than max(10, max_rejected * visited) rows were added."""
        self.refuse(self._tally, visited)

    def write(self, error: BadRow, example_id: str | None = None) -> None:
        """Names a row in the file without counting it for `check`: for a reader that counts its own."""
        if error.where not in self._written:
            with JsonlWriter(self.path) as writer:
                writer.write({"where": error.where, "kind": error.kind, "message": str(error), "id": example_id})
            self._written[error.where] = error.kind

    def refuse(self, tally: _Tally, visited: int) -> None:
        count = tally.kinds.total()
        if not too_many(count, visited, self.max_rejected):
            return
        kinds = ", ".join(f"{kind} ({number})" for kind, number in tally.kinds.most_common(3))
        examples = "\n".join(f"  {error}" for error in tally.examples)
        raise CorpusError(
            f"{count} of {visited} rows cannot be used, more than data.max_rejected={self.max_rejected:g} allows: "
            f"{kinds}.\n{examples}\nAll are named in {self.path}. Mend them, or raise data.max_rejected."
        )


class GoodRows(PairSource):
    """A corpus without its bad rows, for random access: item i is row i, or where that is bad the next good one.

    Which that is depends on the corpus alone, not on what was visited before. A row is good once its picture has been
    decoded in full; pictures just decoded are kept, for they are asked for next. To go through all rows once, use
    `good`, or `corpus`, which is the rows as they are. Several readers may share one `rejected`; each holds its own bad
    rows against what it visited itself.
    """

    def __init__(self, corpus: RandomAccess, rejected: RejectedRows, max_bytes: int = 64 << 20) -> None:
        self.name, self.corpus, self._rejected = corpus.name, corpus, rejected
        self._state = np.zeros(len(corpus), np.uint8)
        self._visited, self._tally = 0, _Tally()
        self._images = ImageCache(corpus, max_bytes)

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int) -> Example:
        size = len(self)
        if not 0 <= index < size:
            raise IndexError(f"row {index} of {size}")
        for step in range(size):
            example = self.good((index + step) % size)
            if example is not None:
                return example
        raise CorpusError(f"{self.name}: none of its {size} rows can be used; {self._rejected.path} names them.")

    def image(self, example_id: str) -> Image.Image:
        return self._images(example_id)

    def good(self, index: int) -> Example | None:
        """Row `index` itself, or None where it is bad; a bad row is written down and counted the first time."""
        if self._state[index] == _BAD:
            return None
        example = None
        known = self._state[index] == _GOOD
        self._visited += not known
        try:
            example = self.corpus[index]
            if not known:
                self._images(example.id)
        except BadRow as error:
            self._state[index] = _BAD
            self._rejected.write(error, None if example is None else example.id)
            self._tally.add(error)
            self._rejected.refuse(self._tally, self._visited)
            return None
        self._state[index] = _GOOD
        return example
