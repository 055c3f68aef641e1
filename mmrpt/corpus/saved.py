"""What the package `datasets` saved to disk or loads from the hub, as a store of columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmrpt.corpus.columns import arrow_errors, choose_columns

SWEEP_ROWS = 1_000


class DatasetStore:
    """A datasets.Dataset, whose rows stay on disk."""

    def __init__(self, dataset: Any, name: str, place: str) -> None:
        import datasets

        pictures = [n for n, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        for column in pictures:
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.columns = choose_columns(dataset.features.arrow_schema, place)
        dataset = dataset.flatten()
        self.name, self._place, self._size = name, place, len(dataset)
        self._texts = dataset.select_columns(self.columns.texts).with_format("arrow")
        data = self.columns.image_bytes
        self._pictures = None if data is None else dataset.select_columns([data]).with_format("arrow")
        self._recent: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": None}

    def __len__(self) -> int:
        return self._size

    def where(self, index: int) -> str:
        return f"{self._place}:{index + 1}"

    def texts(self, index: int) -> tuple[Any, int]:
        block, place = divmod(index, SWEEP_ROWS)
        recent = self._recent  # two threads may each make a table; neither sees half of one
        if recent is None or recent[0] != block:
            recent = self._recent = (block, self._texts[block * SWEEP_ROWS : (block + 1) * SWEEP_ROWS])
        return recent[1], place

    def sweep(self) -> Iterator[tuple[int, Any]]:
        for start in range(0, self._size, SWEEP_ROWS):
            try:
                table = self._texts[start : start + SWEEP_ROWS]
                yield len(table), table
            except arrow_errors() as error:
                yield min(SWEEP_ROWS, self._size - start), error

    def picture(self, index: int) -> bytes | None:
        return self._pictures[index].column(0)[0].as_py()
