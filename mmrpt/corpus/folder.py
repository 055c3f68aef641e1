"""A folder of images, each with its caption in a .txt of the same name."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from mmrpt.corpus.images import ImageFinder
from mmrpt.corpus.rows import BadRow, Row, Table
from mmrpt.corpus.spans import MAX_ROW_BYTES
from mmrpt.corpus.tars import IMAGE_ENDINGS


class FolderTable(Table):
    """A Table of the images under a folder, in the order of their names, and of the texts that lack one."""

    def __init__(self, folder: Path, finder: ImageFinder) -> None:
        self.name, self._folder, self._finder = folder.name, folder, finder
        images, texts = [], []
        for place, _, names in os.walk(folder):
            inside = os.path.relpath(place, folder)
            for name in names:
                path = os.path.normpath(os.path.join(inside, name))
                ending = name.rpartition(".")[2].lower()
                if not name.startswith(".") and ending in (*IMAGE_ENDINGS, "txt"):
                    (texts if ending == "txt" else images).append(path)
        stems = {os.path.splitext(path)[0] for path in images}
        self._paths = sorted(images + [path for path in texts if os.path.splitext(path)[0] not in stems])

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        return f"{self._folder / self._paths[index]}:1"

    def row(self, index: int) -> Row:
        where, path = self.where(index), self._paths[index]
        if path.lower().endswith(".txt"):
            raise BadRow(where, "image_missing", "no image has the name of this text. Add one or remove the text.")
        text = str(PurePath(path).with_suffix(".txt"))
        try:
            with open(self._finder.find(text, where), "rb") as file:
                data = file.read(MAX_ROW_BYTES)
        except BadRow as error:
            if error.kind == "outside_root":
                raise
            raise BadRow(where, "caption_missing", f"there is no {text} beside it. Add its caption.") from None
        except OSError as error:
            raise BadRow(where, "caption_missing", f"{text} cannot be read ({error.strerror}). Mend it.") from None
        try:
            return Row(where, path, data.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise BadRow(where, "not_utf8", f"{text} is not UTF-8. Save it as UTF-8.") from None

    def picture(self, index: int, row: Row) -> Path:
        return self._finder.find(row.image, row.where)
