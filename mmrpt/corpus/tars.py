"""WebDataset tars: samples are neighbouring members of one key, as 000017.jpg beside 000017.txt or 000017.json."""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mmrpt.corpus.files import parse_object
from mmrpt.corpus.rows import BadRow, CorpusError, Row, Table, caption_column
from mmrpt.corpus.spans import MAX_ROW_BYTES, ByteFile

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXT_ENDINGS = ("txt", "caption", "text")
_PARTS = ("image", "text", "json")
MAX_IMAGE_BYTES = 1 << 30


class TarTable(Table):
    """A Table over tars that are not compressed. Opening reads their headers; nothing is unpacked."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name, self.paths = name, list(paths)
        self._files = [ByteFile(path) for path in self.paths]
        owners, places, keys, ends = array("q"), array("q"), bytearray(), array("q")
        for number, path in enumerate(self.paths):
            for key, parts in _samples(path):
                owners.append(number)
                for part in _PARTS:
                    places.extend(parts.get(part, (-1, 0)))
                keys += key.encode("utf-8", "surrogateescape")
                ends.append(len(keys))
        self._owners = np.array(owners, dtype=np.int64)
        self._places = np.array(places, dtype=np.int64).reshape(-1, len(_PARTS), 2)  # (samples, parts, offset and size)
        self._keys, self._ends = bytes(keys), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._owners)

    def where(self, index: int) -> str:
        return f"{self.paths[self._owners[index]]}:{self._key(index)}"

    def row(self, index: int) -> Row:
        where, key = self.where(index), self._key(index)
        if key == _TORN:
            reason = "the tar breaks off or is damaged here; what follows is lost. Write it again."
            raise BadRow(where, "tar_broken", reason)
        if self._places[index, 0, 0] < 0:
            endings = ", ".join(IMAGE_ENDINGS)
            raise BadRow(where, "image_missing", f"the sample has no image. Expected a member of ending {endings}.")
        entry: dict[str, Any] = {}
        if self._places[index, 2, 0] >= 0:
            entry = self._json(index, where)
        if self._places[index, 1, 0] >= 0:
            entry["caption"] = self._text(index, where)
        column = caption_column(entry)
        if column is None:
            raise BadRow(where, "caption_missing", f"the sample has no caption. Expected {key}.txt or {key}.json.")
        image = f"{self.paths[self._owners[index]].name}/{key}"
        return Row(where, image, entry[column], entry.get("id"))

    def picture(self, index: int, row: Row) -> bytes:
        return self._read(index, 0, row.where, MAX_IMAGE_BYTES)

    def _key(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._keys[start : int(self._ends[index])].decode("utf-8", "backslashreplace")

    def _json(self, index: int, where: str) -> dict[str, Any]:
        try:
            return parse_object(self._read(index, 2, where, MAX_ROW_BYTES))
        except BadRow:
            raise
        except ValueError as error:
            kind = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_json"
            raise BadRow(where, kind, f"its .json: {error}") from None

    def _text(self, index: int, where: str) -> str:
        try:
            return self._read(index, 1, where, MAX_ROW_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadRow(where, "not_utf8", "its caption is not UTF-8. Save it as UTF-8 or remove the row.") from None

    def _read(self, index: int, part: int, where: str, most: int) -> bytes:
        start, size = map(int, self._places[index, part])
        if size > most:
            raise BadRow(where, "row_too_long", f"its {_PARTS[part]} has {size} bytes, at most {most} are read.")
        data = self._files[self._owners[index]].read(start, start + size)
        if len(data) < size:
            raise BadRow(where, "tar_broken", f"its {_PARTS[part]} breaks off. Write the tar again.")
        return data


_TORN = "(end)"


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {part: (offset, size)}) of each run of members of one key; a damaged end is a sample of its own."""
    key, parts = None, {}
    for name, ending, place in _members(path):
        if name != key or ending is None:
            if key is not None:
                yield key, parts
            key, parts = name, {}
        part = next(
            (p for p, e in zip(_PARTS, (IMAGE_ENDINGS, TEXT_ENDINGS, ("json",)), strict=True) if ending in e), None
        )
        if part is not None:
            parts.setdefault(part, place)
    if key is not None:
        yield key, parts


def _more_than_padding(path: Path, offset: int) -> bool:
    """Whether a tar that `tarfile` takes to end at `offset` has a broken header there."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    return bool(block.strip(b"\0")) or 0 < len(block) < tarfile.BLOCKSIZE


def _members(path: Path) -> Iterator[tuple[str, str | None, tuple[int, int]]]:
    """(key, ending, (offset, size)) of the regular files of a tar, in order."""
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115  closed below
    except (tarfile.TarError, OSError) as error:
        raise CorpusError(
            f"{path}: cannot be read as a tar that is not compressed ({error}). Unpack .gz first, or write it again."
        ) from None
    with tar:
        while True:
            try:
                member = tar.next()
            except (tarfile.TarError, OSError, ValueError, EOFError):
                yield _TORN, None, (0, 0)
                return
            tar.members = []  # a tar of a million members would keep them all
            if member is None:
                if _more_than_padding(path, tar.offset):
                    yield _TORN, None, (0, 0)
                return
            path_in_tar = PurePosixPath(member.name)
            stem, _, ending = path_in_tar.name.partition(".")
            if member.isreg() and not path_in_tar.name.startswith(("__", ".")):  # "__index__" and the like: no samples
                yield str(path_in_tar.parent / stem), ending.lower(), (member.offset_data, member.size)
