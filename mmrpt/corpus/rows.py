"""What a row of a corpus is, what it may hold, and how a bad one is named."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmrpt.corpus.files import parse_object

FORMATS = (
    'JSON lines of {"image": path, "caption" or "text", optional "id"}; LLaVA JSON (a list of {"image", '
    '"conversations"}); parquet (a file or a folder of them); webdataset tars (key.jpg beside key.txt or key.json); a '
    "folder of Dataset.save_to_disk; a folder of images with metadata.jsonl or metadata.csv (file_name, text) or with "
    "a .txt of the same name beside each; hf:NAME or hf:NAME:SPLIT of the Hugging Face hub"
)
CAPTION_COLUMNS = ("caption", "text")
IMAGE_COLUMNS = ("image", "file_name")
MAX_ID_BYTES = 200  # ids become names of files
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


class CorpusError(ValueError):
    """A corpus cannot be used: its path, what was expected, what to do."""


class BadRow(ValueError):
    """One row cannot be used. `where` is "file:line", `kind` a short word, `reason` got, expected and remedy."""

    def __init__(self, where: str, kind: str, reason: str) -> None:
        super().__init__(where, kind, reason)  # all three, so that workers can send it
        self.where, self.kind, self.reason = where, kind, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Limits:
    """What a row may hold; a row beyond it is bad. `root` None: images lie in the folder of the file naming them."""

    root: str | Path | None = None
    max_megapixels: float = 50
    max_aspect_ratio: float = 100
    max_caption_chars: int = 8000
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's names


@dataclass(frozen=True, slots=True)
class Row:
    """A row as written, unchecked. `image` names the picture: a path, a member of a tar, or a hash of its bytes."""

    where: str
    image: str
    caption: Any
    id: Any = None
    note: str = ""  # what was chosen for the reader, as "of several images the first is taken"


class Table(Protocol):
    """The rows of one format. Safe to use in threads and after a fork; sent to workers by pickle."""

    name: str

    def __len__(self) -> int: ...

    def where(self, index: int) -> str: ...

    def row(self, index: int) -> Row:
        """Raises BadRow."""
        ...

    def rows(self) -> Iterator[Row | BadRow]:
        """All rows in order. A format that is read faster in one sweep has its own."""
        for index in range(len(self)):
            try:
                yield self.row(index)
            except BadRow as error:
                yield error

    def picture(self, index: int, row: Row) -> Path | bytes:
        """The file or the bytes that hold the row's image, unopened. Raises BadRow."""
        ...


def shown(value: Any, length: int = 60) -> str:
    """`value` for a message, on one line and cut short."""
    try:
        text = repr(value[: 2 * length] if isinstance(value, str | bytes) else value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= length else text[: length - 3] + "..."


def parse_row(data: bytes, where: str) -> Row:
    """One JSON object as a row: {"image", "caption" or "text", optional "id"} or LLaVA's {"image", "conversations"}."""
    try:
        entry = parse_object(data)
    except UnicodeDecodeError as error:
        raise BadRow(
            where, "not_utf8", f"byte {error.start} of the row is not UTF-8. Save the file as UTF-8 or remove the row."
        ) from None
    except ValueError as error:
        raise BadRow(where, "not_json", str(error)) from None
    return row_of(entry, where)


def row_of(entry: dict[str, Any], where: str) -> Row:
    image = next((entry[name] for name in IMAGE_COLUMNS if name in entry), None)
    note = ""
    if isinstance(image, list) and image:
        note = "of several images the first is taken" if len(image) > 1 else ""
        image = image[0]
    if not isinstance(image, str) or not image.strip():
        got = f"got {shown(image)}" if image is not None else f"got the keys {shown(sorted(entry))}"
        raise BadRow(where, "image_not_named", f"no image is named ({got}). Name an image file or remove the row.")
    if "conversations" in entry:
        caption = _first_answer(entry["conversations"], where)
    else:
        column = caption_column(entry)
        if column is None:
            raise BadRow(where, "caption_missing", f"no caption or text; got the keys {shown(sorted(entry))}. Add one.")
        caption = entry[column]
    return Row(where, image, caption, entry.get("id"), note)


def caption_column(names: Any) -> str | None:
    return next((name for name in CAPTION_COLUMNS if name in names), None)


def _first_answer(turns: Any, where: str) -> Any:
    answers = (
        [turn for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
        if isinstance(turns, list)
        else []
    )
    if not answers:
        raise BadRow(
            where,
            "caption_missing",
            f"no turn of 'conversations' is from 'gpt' (got {shown(turns)}). Add the answer or remove the row.",
        )
    caption = answers[0].get("value")
    return " ".join(caption.replace("<image>", " ").split()) if isinstance(caption, str) else caption


def caption_of(row: Row, limits: Limits) -> str:
    """The row's caption without white space around it. Raises BadRow where it is no usable text."""
    caption = row.caption
    if not isinstance(caption, str):
        raise BadRow(
            row.where,
            "caption_empty" if caption is None else "caption_not_text",
            f"the caption is {shown(caption)}, expected text. Write one caption a row or remove the row.",
        )
    caption = caption.strip()
    if len(caption) > limits.max_caption_chars:
        raise BadRow(
            row.where,
            "caption_too_long",
            f"the caption has {len(caption)} characters, at most {limits.max_caption_chars} are allowed. Shorten it or "
            "raise data.max_caption_chars.",
        )
    if _CONTROL.search(caption) or not is_text(caption):
        raise BadRow(
            row.where,
            "caption_not_text",
            f"the caption holds control characters or half a surrogate pair ({shown(caption)}). Write plain text.",
        )
    if not any(map(str.isalnum, caption)):
        got = f"no letter or digit in {shown(caption)}" if caption else "it is blank"
        raise BadRow(row.where, "caption_empty", f"the caption is empty ({got}). Write a caption or remove the row.")
    return caption


def is_text(value: str) -> bool:
    """False for half a surrogate pair, which no file and no tokenizer can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def id_of(row: Row, caption: str) -> str:
    """The row's own id, or a hash of its image and caption; never its place, so that other rows may come and go."""
    value = row.id
    if value is None:
        return content_hash(row.image, caption)
    if isinstance(value, float) and not math.isfinite(value) or isinstance(value, bool):
        value = None
    if isinstance(value, int | float):
        value = json.dumps(value)
    if not isinstance(value, str) or not is_text(value) or _UNPRINTABLE.search(value):
        value = None
    if value is None or not 0 < len(value.encode()) <= MAX_ID_BYTES:
        raise BadRow(
            row.where,
            "id_not_text",
            f"the id is {shown(row.id)}, expected a number or a text of 1 to {MAX_ID_BYTES} bytes on one line. "
            "Mend or remove the id.",
        )
    return value


def content_hash(*parts: str | bytes) -> str:
    """16 hex digits of the parts and of where each ends."""
    data = [part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts]
    return hashlib.blake2b(b"%r" % [len(part) for part in data] + b"".join(data), digest_size=8).hexdigest()
