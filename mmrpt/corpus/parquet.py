"""Parquet files as a store of columns: row groups are read one at a time, pictures a few rows at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrpt.corpus.columns import arrow_errors, choose_columns
from mmrpt.corpus.rows import CorpusError

PICTURE_ROWS = 16  # decoded together


class _Recent:
    """The last few values that were made, by key."""

    def __init__(self, size: int = 4) -> None:
        self._size, self._values = size, OrderedDict[Any, Any]()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._values:
            self._values[key] = make()
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


class ParquetStore:
    """Parquet files as one store. Small row groups make random access fast."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name, self.paths = name, list(paths)
        sizes, owners, schema = [], [], None
        for number, path in enumerate(self.paths):
            file = self._open(path)
            schema = schema or file.schema_arrow
            if file.schema_arrow.names != schema.names:
                raise CorpusError(
                    f"{path}: got the columns {file.schema_arrow.names}, {self.paths[0]} has {schema.names}. Keep "
                    "files of one kind in a folder."
                )
            for group in range(file.metadata.num_row_groups):
                sizes.append(file.metadata.row_group(group).num_rows)
                owners.append((number, group))
        self.columns = choose_columns(schema, str(self.paths[0]))
        self._starts = np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))])
        self._owners = np.array(owners, dtype=np.int64).reshape(-1, 2)
        first = np.full(len(self.paths), len(self))  # the first row of each file
        np.minimum.at(first, self._owners[:, 0], self._starts[:-1])
        self._first = first
        self._reset()

    def _reset(self) -> None:
        self._lock, self._files, self._groups = threading.Lock(), _Recent(), _Recent()
        self._reading: tuple[int, int, Any, Any] | None = None  # group, first row of its batch, batch, batches to come

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_lock", "_files", "_groups", "_reading")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, index: int) -> str:
        file = int(self._owners[self._group(index), 0])
        return f"{self.paths[file]}:{index - int(self._first[file]) + 1}"

    def texts(self, index: int) -> tuple[Any, int]:
        group = self._group(index)
        with self._lock:
            return self._groups.get(group, lambda: self._texts(group)), index - int(self._starts[group])

    def sweep(self) -> Iterator[tuple[int, Any]]:
        for group, size in enumerate(np.diff(self._starts).tolist()):
            try:
                yield size, self._texts(group)
            except arrow_errors() as error:
                yield size, error

    def picture(self, index: int) -> bytes | None:
        group = self._group(index)
        place = index - int(self._starts[group])
        with self._lock:
            if self._reading is None or self._reading[0] != group or self._reading[1] > place:
                file, number = self._file(group)
                batches = file.iter_batches(PICTURE_ROWS, row_groups=[number], columns=[self.columns.image_bytes])
                self._reading = (group, 0, next(batches), batches)
            _, first, batch, batches = self._reading
            while place >= first + len(batch):
                first, batch = first + len(batch), next(batches)
            self._reading = (group, first, batch, batches)
        column = batch.column(0)
        return (column.field("bytes") if "." in self.columns.image_bytes else column)[place - first].as_py()

    def _texts(self, group: int) -> Any:
        file, number = self._file(group)
        return file.read_row_group(number, columns=self.columns.texts).flatten()

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _file(self, group: int) -> tuple[Any, int]:
        number, within = map(int, self._owners[group])
        return self._files.get(number, lambda: self._open(self.paths[number])), within

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            import pyarrow.parquet
        except ImportError:
            raise CorpusError(f"{path}: parquet needs the package pyarrow: pip install 'mmrpt[data]'.") from None
        try:
            return pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (OSError, pyarrow.ArrowException) as error:
            raise CorpusError(f"{path}: cannot be read as parquet ({str(error)[:200]}). Write it again.") from None
