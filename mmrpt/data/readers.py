"""Readers of real image-caption pairs. Everything that can be wrong with the files is said when they are opened."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from mmrpt.data.jsonl import parse_row
from mmrpt.types import Example, PairSource

FORMATS = (
    'JSON lines of {"image": path, "caption": text}, LLaVA JSON (a list of {"image", "conversations"}), a folder of '
    "Dataset.save_to_disk, or a folder of images with metadata.jsonl or metadata.csv (columns file_name and text)"
)
CAPTION_COLUMNS = ("caption", "text")
_SHOWN = 5  # problems named before giving up


class PairsError(ValueError):
    """The pairs cannot be used: which file and line, what was expected, what to do."""


class _Row(NamedTuple):
    image: Any  # a path as written, or what a datasets folder holds
    caption: Any
    where: str  # "file:line"


def open_pairs(path: str | Path) -> PairSource:
    """Open real pairs: JSON lines, LLaVA JSON, or a `datasets` folder, told apart by content.

    Image paths are relative to the file that names them (LLaVA JSON also looks in `images/` beside it). Every row is
    checked now, image headers included; pixels are decoded on demand.
    Raises PairsError (a ValueError) naming file, line and remedy, and OSError where a file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise PairsError(f"{path}: there is no such file or folder. Give the path of one of: {FORMATS}.")
    if path.is_dir():
        return _open_folder(path)
    kind = _first_character(path)
    if kind == "[":
        return _from_files(path, _llava_rows(path), (path.parent, path.parent / "images"))
    if kind == "{" or path.suffix in (".jsonl", ".ndjson"):
        return _from_files(path, _jsonl_rows(path, "image"), (path.parent,))
    raise PairsError(f"{path}: this is no format of pairs. Expected one of: {FORMATS}.")


def _first_character(path: Path) -> str:
    """The first character that is not white space; "" for an empty or binary file."""
    with open(path, "rb") as file:
        head = file.read(4096)
    return head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")[:1]


@dataclass(frozen=True)
class _FilePairs(PairSource):
    name: str
    images: tuple[Path, ...]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self.captions):
            raise IndexError(f"index {index} of {len(self.captions)} pairs")
        return Example(f"{self.name}/{index:06d}", self.captions[index])

    def image(self, example_id: str) -> Image.Image:
        with Image.open(self.images[_index(example_id, self.name, len(self))]) as image:
            return _rgb(image)


@dataclass(frozen=True)
class _DatasetPairs(PairSource):
    name: str
    dataset: Any  # datasets.Dataset whose image column is not decoded
    captions: tuple[str, ...]
    image_column: str

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self.captions):
            raise IndexError(f"index {index} of {len(self.captions)} pairs")
        return Example(f"{self.name}/{index:06d}", self.captions[index])

    def image(self, example_id: str) -> Image.Image:
        cell = self.dataset[_index(example_id, self.name, len(self))][self.image_column]
        with Image.open(_stored_file(cell)) as image:
            return _rgb(image)


def _index(example_id: str, name: str, count: int) -> int:
    prefix, _, number = example_id.rpartition("/")
    if prefix != name or not number.isdecimal() or int(number) >= count:
        raise KeyError(f"{example_id!r} is no id of these {count} pairs: expected '{name}/<number>'.")
    return int(number)


def _rgb(image: Image.Image) -> Image.Image:
    """Upright, RGB, transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _checked(source: Path, rows: Iterator[_Row], check_image: Callable[[Any], Any]) -> tuple[list[Any], list[str]]:
    """Images and captions of all rows. Collects a few problems, so that one visit mends several."""
    images, captions, problems = [], [], []
    for row in rows:
        try:
            caption = row.caption
            if not isinstance(caption, str) or not caption.strip():
                raise PairsError(f"the caption is empty (got {caption!r}). Write a caption or remove the row.")
            images.append(check_image(row.image))
            captions.append(caption.strip())
        except PairsError as error:
            problems.append(f"{row.where}: {error}")
            if len(problems) == _SHOWN:
                break
    if problems:
        raise PairsError("\n".join(problems))
    if not captions:
        raise PairsError(f"{source}: there are no pairs in it. Expected one of: {FORMATS}.")
    return images, captions


def _from_files(source: Path, rows: Iterator[_Row], roots: tuple[Path, ...]) -> _FilePairs:
    images, captions = _checked(source, rows, lambda value: _image_path(value, roots))
    return _FilePairs(source.stem if source.is_file() else source.name, tuple(images), tuple(captions))


def _image_path(value: Any, roots: tuple[Path, ...]) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise PairsError(f"no image is named (got {value!r}). Name an image file or remove the row.")
    candidates = [root / value for root in roots]  # an absolute path stays as it is
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise PairsError(f"image {value!r} is missing (looked for {candidates[0]}). Restore it or remove the row.")
    _check_header(found, value)
    return found


def _check_header(file: Any, name: str) -> None:
    try:
        with Image.open(file):
            pass
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0]
        raise PairsError(f"image {name!r} cannot be read ({reason}). Replace the file or remove the row.") from None


def _jsonl_rows(path: Path, image_column: str) -> Iterator[_Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = parse_row(line.decode("utf-8-sig"), where)
            except ValueError as error:
                text = str(error) if str(error).startswith(where) else f"{where}: {error}. Save the file as UTF-8."
                raise PairsError(text) from None
            missing = [c for c in (image_column,) if c not in row] + _missing_caption(row)
            if missing:
                raise PairsError(
                    f"{where}: missing {' and '.join(missing)}; got the keys {sorted(row)}. Expected one of: {FORMATS}."
                )
            yield _Row(row[image_column], row[_caption_column(row)], where)


def _caption_column(row: Any) -> str:
    return next(name for name in CAPTION_COLUMNS if name in row)


def _missing_caption(row: Any) -> list[str]:
    return [] if any(name in row for name in CAPTION_COLUMNS) else [" or ".join(CAPTION_COLUMNS)]


def _llava_rows(path: Path) -> Iterator[_Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise PairsError(f"{path}:{error.lineno}: broken JSON ({error.msg}). Mend the line.") from None
    lines = _entry_lines(text, len(entries))
    for entry, line in zip(entries, lines, strict=True):
        where = f"{path}:{line}"
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise PairsError(f"{where}: expected an object with 'image' and 'conversations' (LLaVA JSON). Mend it.")
        turns = [turn for turn in entry["conversations"] if isinstance(turn, dict) and turn.get("from") == "gpt"]
        caption = turns[0].get("value") if turns else None
        if isinstance(caption, str):
            caption = " ".join(caption.replace("<image>", " ").split())
        yield _Row(entry.get("image"), caption, where)


def _entry_lines(text: str, count: int) -> list[int]:
    """The line on which each entry of a JSON list begins."""
    decoder = json.JSONDecoder()
    lines, place, line, seen = [], text.index("[") + 1, 1, 0
    for _ in range(count):
        while text[place] in " \t\r\n,":
            place += 1
        line += text.count("\n", seen, place)
        seen = place
        lines.append(line)
        _, place = decoder.raw_decode(text, place)
    return lines


def _open_folder(folder: Path) -> PairSource:
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise PairsError(f"{folder}: the folder cannot be read ({error.strerror}). Mend its permissions.") from None
    if "dataset_dict.json" in names or "state.json" in names:
        return _open_saved(folder)
    for place in (folder, folder / "train"):
        if (place / "metadata.jsonl").is_file():
            return _from_files(folder, _jsonl_rows(place / "metadata.jsonl", "file_name"), (place,))
        if (place / "metadata.csv").is_file():
            return _from_files(folder, _csv_rows(place / "metadata.csv"), (place,))
    raise PairsError(f"{folder}: no pairs are found in this folder. Expected one of: {FORMATS}.")


def _csv_rows(path: Path) -> Iterator[_Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [c for c in ("file_name",) if c not in columns] + _missing_caption(columns)
        if missing:
            raise PairsError(f"{path}:1: missing column {' and '.join(missing)}; got {list(columns)}. Rename a column.")
        for row in reader:
            yield _Row(row["file_name"], row[_caption_column(columns)], f"{path}:{reader.line_num}")


def _open_saved(folder: Path) -> _DatasetPairs:
    """A folder of Dataset.save_to_disk; of a DatasetDict the split "train", or its only one."""
    try:
        import datasets
    except ImportError:
        raise PairsError(f"{folder}: reading it needs the package datasets: pip install 'mmrpt[data]'.") from None
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow's and datasets' errors share no base class
        raise PairsError(f"{folder}: cannot be read ({error}). Save it again with Dataset.save_to_disk.") from error
    if isinstance(data, dict):
        split = "train" if "train" in data else next(iter(data)) if len(data) == 1 else None
        if split is None:
            raise PairsError(f"{folder}: which of the splits {sorted(data)}? Give the path of one of its subfolders.")
        data = data[split]
    image_column = next((n for n, f in data.features.items() if isinstance(f, datasets.Image)), None)
    if image_column is None or _missing_caption(data.features):
        raise PairsError(
            f"{folder}: got the columns {sorted(data.features)}; expected one of type datasets.Image and one named "
            f"{' or '.join(CAPTION_COLUMNS)}. Rename or cast a column."
        )
    data = data.cast_column(image_column, datasets.Image(decode=False))
    caption_column = _caption_column(data.features)
    rows = (_Row(row[image_column], row[caption_column], f"{folder}: row {i}") for i, row in enumerate(data))
    _, captions = _checked(folder, rows, _check_stored)
    return _DatasetPairs(folder.name, data, tuple(captions), image_column)


def _stored_file(cell: dict[str, Any]) -> Any:
    return io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]


def _check_stored(cell: dict[str, Any] | None) -> None:
    if cell is None:
        raise PairsError("the image is missing (got None). Remove the row.")
    _check_header(_stored_file(cell), str(cell.get("path") or "stored bytes"))
