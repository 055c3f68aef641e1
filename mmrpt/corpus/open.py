"""Which format a path is of, told by its content."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrpt.corpus.columns import ColumnTable
from mmrpt.corpus.corpus import Corpus
from mmrpt.corpus.files import write_json
from mmrpt.corpus.folder import FolderTable
from mmrpt.corpus.images import ImageFinder
from mmrpt.corpus.parquet import ParquetStore
from mmrpt.corpus.rows import FORMATS, CorpusError, Limits, Table, parse_row
from mmrpt.corpus.saved import DatasetStore
from mmrpt.corpus.spans import SpanTable, index_lines, index_list, open_csv
from mmrpt.corpus.tars import TarTable

HUB = "hf:"
_NO_FORMAT = f"this is no format of pairs. Expected one of: {FORMATS}."


def open_corpus(path: str | Path, limits: Limits | None = None) -> Corpus:
    """Opens pairs of images and captions: a file, a folder, a pattern of files ("shards/*.tar"), or hf:NAME[:SPLIT].

    Rows are found in one pass and parsed when they are asked for; of the images only a first good one is opened, so
    that a file of another kind fails here and not hours later. Paths in a file are relative to its folder.
    Raises CorpusError (a ValueError) with path, what was expected and remedy.
    """
    limits = limits or Limits()
    try:
        table = _table(str(path), limits)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror or error}). Give a path of: {FORMATS}.") from error
    corpus = Corpus(table, limits)
    corpus.check_first_rows()
    return corpus


def hold_to_corpus(path: str | Path, corpus: Corpus) -> None:
    """Writes into `path` (corpus.json of a run) which corpus the run is of; raises CorpusError where it was another."""
    path = Path(path)
    now = {"name": corpus.name, "rows": len(corpus), "fingerprint": corpus.fingerprint}
    if not path.exists():
        write_json(path, now)
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    if begun["fingerprint"] != now["fingerprint"]:
        raise CorpusError(
            f"{corpus.name} has other rows than the run began with ({_said(now)}, expected {_said(begun)} as in "
            f"{path}): rows were added, removed, edited or moved. Restore them, or start a new run."
        )


def _said(corpus: dict[str, Any]) -> str:
    return f"{corpus['rows']} rows of fingerprint {corpus['fingerprint']}"


def _table(name: str, limits: Limits) -> Table:
    if name.startswith(HUB):
        return _from_hub(name, limits)
    path = Path(name)
    if not path.exists() and glob.has_magic(name):
        return _from_shards(path.parent, [Path(found) for found in sorted(glob.glob(name))], limits, name)
    if not path.exists():
        raise CorpusError(f"{path}: there is no such file or folder. Give the path of one of: {FORMATS}.")
    if path.is_dir():
        return _from_folder(path, limits)
    if path.suffix in (".parquet", ".tar"):
        return _from_shards(path.parent, [path], limits, name)
    return _from_text(path, limits)


def _from_text(path: Path, limits: Limits) -> Table:
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CorpusError(f"{path}: the file is UTF-16. Save it as UTF-8.")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[" and path.suffix not in (".jsonl", ".ndjson"):
        finder = ImageFinder.of(path.parent, limits, path.parent / "images")
        return SpanTable(path, index_list(path), parse_row, finder)
    if first == b"{" or path.suffix in (".jsonl", ".ndjson"):
        finder = ImageFinder.of(path.parent, limits, path.parent / "images")
        return SpanTable(path, index_lines(path), parse_row, finder)
    if path.name == "metadata.csv":
        return open_csv(path, ImageFinder.of(path.parent, limits), path.parent.name)
    raise CorpusError(f"{path}: {_NO_FORMAT}")


def _from_folder(folder: Path, limits: Limits) -> Table:
    names = {entry.name for entry in folder.iterdir()}
    if "dataset_dict.json" in names or "state.json" in names:
        return _from_saved(folder, limits)
    for place in (folder, folder / "train"):
        finder = ImageFinder.of(place, limits)
        if (place / "metadata.jsonl").is_file():
            path = place / "metadata.jsonl"
            return SpanTable(path, index_lines(path), parse_row, finder, folder.name)
        if (place / "metadata.csv").is_file():
            return open_csv(place / "metadata.csv", finder, folder.name)
    for place in (folder, folder / "data"):
        for ending in ("parquet", "tar"):
            if shards := sorted(place.glob(f"*.{ending}")):
                return _from_shards(folder, shards, limits, str(folder))
    table = FolderTable(folder, ImageFinder.of(folder, limits))
    if not len(table):
        raise CorpusError(f"{folder}: no pairs are found in this folder. Expected one of: {FORMATS}.")
    return table


def _from_shards(base: Path, paths: list[Path], limits: Limits, place: str) -> Table:
    """Parquet files or tars. Of files of several splits those of "train" are taken, as the hub names them."""
    endings = {path.suffix for path in paths}
    name = paths[0].stem if len(paths) == 1 else base.name
    if len(endings) != 1 or not endings <= {".parquet", ".tar"}:
        raise CorpusError(
            f"{place}: got {len(paths)} files of endings {sorted(endings)}; expected .parquet or .tar alone."
        )
    if endings == {".tar"}:
        return TarTable(name, paths)
    splits = {path.name.partition("-")[0] for path in paths}
    if len(paths) > 1 and splits & {"test", "validation", "val"}:
        raise CorpusError(
            f"{place}: got the splits {sorted(splits)}. Name the files of one, as data.pairs='{base}/train-*.parquet'."
        )
    return ColumnTable(ParquetStore(name, paths), ImageFinder.of(base, limits))


def _from_saved(folder: Path, limits: Limits) -> Table:
    """A folder of Dataset.save_to_disk; of a DatasetDict the split "train", or its only one."""
    data = _with_datasets(str(folder), lambda datasets: datasets.load_from_disk(str(folder)))
    if isinstance(data, dict):
        split = "train" if "train" in data else next(iter(data)) if len(data) == 1 else None
        if split is None:
            raise CorpusError(f"{folder}: which of the splits {sorted(data)}? Give the path of one of its subfolders.")
        data = data[split]
    return ColumnTable(DatasetStore(data, folder.name, str(folder)), ImageFinder.of(folder, limits))


def _from_hub(name: str, limits: Limits) -> Table:
    """hf:NAME or hf:NAME:SPLIT, downloaded by `datasets` into its cache. Images are stored there, not in data.root."""
    hub_name, _, split = name.removeprefix(HUB).partition(":")
    if not hub_name:
        raise CorpusError(f"{name}: expected hf:NAME or hf:NAME:SPLIT, as hf:user/pairs:train.")
    split = split or "train"
    data = _with_datasets(name, lambda datasets: datasets.load_dataset(hub_name, split=split, streaming=False))
    import datasets

    base = Path(datasets.config.HF_CACHE_HOME)
    return ColumnTable(DatasetStore(data, hub_name.rpartition("/")[2], name), ImageFinder.of(base, limits))


def _with_datasets(place: str, load: Callable[[Any], Any]) -> Any:
    try:
        import datasets
    except ImportError:
        raise CorpusError(f"{place}: reading it needs the package datasets: pip install 'mmrpt[data]'.") from None
    try:
        return load(datasets)
    except Exception as error:  # pyarrow's, the hub's and datasets' errors share no base class
        got = f"{type(error).__name__}: {str(error)[:300]}"
        raise CorpusError(
            f"{place}: cannot be read ({got}). Save it again with Dataset.save_to_disk, or check its name."
        ) from error
