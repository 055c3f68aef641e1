"""Rows of a column store: parquet files, and what the package `datasets` saved or loads from the hub.

Captions, ids and paths are read without the image bytes beside them. Needs `pip install 'mmrpt[data]'`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmrpt.corpus.images import ImageFinder
from mmrpt.corpus.rows import IMAGE_COLUMNS, BadRow, CorpusError, Row, caption_column, content_hash


@dataclass(frozen=True)
class Columns:
    """The columns read, by their names in a flattened table: "image.path" is the path inside column "image"."""

    caption: str
    image_path: str | None
    image_bytes: str | None
    id: str | None

    @property
    def texts(self) -> list[str]:
        return [name for name in (self.caption, self.image_path, self.id) if name is not None]


def choose_columns(schema: Any, place: str) -> Columns:
    """From an arrow schema. Raises CorpusError where no caption or no image is among its columns."""
    import pyarrow.types as types

    names = schema.names
    structs = {
        name: {schema.field(name).type.field(i).name for i in range(schema.field(name).type.num_fields)}
        for name in names
        if types.is_struct(schema.field(name).type)
    }
    pictures = [name for name in (*IMAGE_COLUMNS, *names) if "bytes" in structs.get(name, ())]
    plain = [name for name in IMAGE_COLUMNS if name in names]
    path = data = None
    if pictures:
        data = f"{pictures[0]}.bytes"
        path = f"{pictures[0]}.path" if "path" in structs[pictures[0]] else None
    elif plain:
        kind = schema.field(plain[0]).type
        path = plain[0] if types.is_string(kind) or types.is_large_string(kind) else None
        data = plain[0] if types.is_binary(kind) or types.is_large_binary(kind) else None
    caption = caption_column(names)
    if caption is None or (path is None and data is None):
        raise CorpusError(
            f"{place}: got the columns {', '.join(f'{field.name} ({field.type})' for field in schema)[:400]}; expected "
            "'image' (a path, bytes, or a struct of bytes and path) and 'caption' or 'text'. Rename or cast a column."
        )
    return Columns(caption, path, data, "id" if "id" in names else None)


class Store(Protocol):
    """Where columns are read from."""

    name: str
    columns: Columns

    def __len__(self) -> int: ...

    def where(self, index: int) -> str: ...

    def texts(self, index: int) -> tuple[Any, int]:
        """A flattened arrow table of the text columns, and the row's place in it."""
        ...

    def sweep(self) -> Iterator[tuple[int, Any]]:
        """(how many rows, their table or the error that keeps them from being read), in order."""
        ...

    def picture(self, index: int) -> bytes | None: ...


class ColumnTable:
    """A Table over a Store."""

    def __init__(self, store: Store, finder: ImageFinder) -> None:
        self.name, self._store, self._finder = store.name, store, finder

    def __len__(self) -> int:
        return len(self._store)

    def where(self, index: int) -> str:
        return self._store.where(index)

    def row(self, index: int) -> Row:
        try:
            table, place = self._store.texts(index)
        except arrow_errors() as error:
            raise self._unreadable(index, error) from None
        return self._made(table, place, index)

    def rows(self) -> Iterator[Row | BadRow]:
        index = 0
        for count, table in self._store.sweep():
            for place in range(count):
                try:
                    if isinstance(table, Exception):
                        raise self._unreadable(index, table)
                    row = self._made(table, place, index)
                except BadRow as error:
                    yield error
                else:
                    yield row
                index += 1

    def picture(self, index: int, row: Row) -> Path | bytes:
        data = self._picture(index)
        return data if data is not None else self._finder.find(row.image, row.where)

    def _picture(self, index: int) -> bytes | None:
        if self._store.columns.image_bytes is None:
            return None
        try:
            return self._store.picture(index)
        except arrow_errors() as error:
            raise self._unreadable(index, error) from None

    def _made(self, table: Any, place: int, index: int) -> Row:
        where, columns = self._store.where(index), self._store.columns
        try:
            cells = {name: table.column(name)[place].as_py() for name in columns.texts}
        except UnicodeDecodeError:
            raise BadRow(where, "not_utf8", "a text of the row is not UTF-8. Mend or remove the row.") from None
        image = cells.get(columns.image_path)
        if not image:
            data = self._picture(index)
            if data is None:
                raise BadRow(where, "image_not_named", "the image is missing (got None). Remove the row.")
            image = content_hash(data)
        return Row(where, image, cells[columns.caption], cells.get(columns.id))

    def _unreadable(self, index: int, error: Exception) -> BadRow:
        got = f"{type(error).__name__}: {str(error)[:120]}"
        reason = f"this part of the file cannot be read ({got}). Write the file again."
        return BadRow(self._store.where(index), "row_unreadable", reason)


def arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (OSError, pyarrow.ArrowException)
