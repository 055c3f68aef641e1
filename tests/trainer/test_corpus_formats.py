"""Every format gives the same pairs under the same ids; a file of another kind is refused when it is opened."""

from __future__ import annotations

import csv
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmrpt.corpus import BadRow, CorpusError, Limits, open_corpus, write_jsonl
from mmrpt.corpus import spans as byte_spans
from mmrpt.corpus.spans import index_lines, index_list

CAPTIONS = ("a red page. it is plain.", "a green page, «grün».", "a blue page, 3.5 cm wide.")
TINTS = ((200, 30, 30), (30, 160, 40), (30, 40, 220))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name, tint in zip("abc", TINTS, strict=True):
        Image.new("RGB", (8, 6), tint).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def rows() -> list[dict]:
    return [{"image": f"pictures/{n}.png", "caption": c} for n, c in zip("abc", CAPTIONS, strict=True)]


def as_jsonl(folder: Path) -> Path:
    (folder / "pairs.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows()))
    return folder / "pairs.jsonl"


def as_llava(folder: Path) -> Path:
    entries = [
        {
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe it."},
                {"from": "gpt", "value": ("<image>\n" if i == 1 else "") + row["caption"]},
                {"from": "human", "value": "More?"},
                {"from": "gpt", "value": "no."},
            ],
        }
        for i, row in enumerate(rows())
    ]
    (folder / "llava.json").write_text(json.dumps(entries, indent=1))
    return folder / "llava.json"


def as_list(folder: Path) -> Path:
    (folder / "list.json").write_text(json.dumps(rows()))
    return folder / "list.json"


def as_metadata_jsonl(folder: Path) -> Path:
    place = folder / "pictures"
    write_jsonl(place / "metadata.jsonl", [{"file_name": Path(r["image"]).name, "text": r["caption"]} for r in rows()])
    return place


def as_metadata_csv(folder: Path) -> Path:
    place = folder / "pictures"
    with open(place / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        writer.writerows((Path(r["image"]).name, r["caption"]) for r in rows())
    return place


def as_texts(folder: Path) -> Path:
    for name, caption in zip("abc", CAPTIONS, strict=True):
        (folder / "pictures" / f"{name}.txt").write_text(caption + "\n")
    return folder / "pictures"


def as_saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    data = {"image": [str(folder / r["image"]) for r in rows()], "text": list(CAPTIONS)}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(data, features=features).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_saved_splits(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    data = datasets.load_from_disk(str(as_saved(folder)))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(folder / "splits"))
    return folder / "splits"


def as_parquet_of_paths(folder: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows()), folder / "pairs.parquet", row_group_size=2)
    return folder / "pairs.parquet"


def as_parquet_of_structs(folder: Path) -> Path:
    """Two files, as the hub writes them: the second's images have no path."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "shards").mkdir()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number, part in enumerate((rows()[:2], rows()[2:])):
        images = [
            {"bytes": (folder / r["image"]).read_bytes(), "path": None if number else Path(r["image"]).name}
            for r in part
        ]
        table = pa.table({"image": pa.array(images, struct), "text": [r["caption"] for r in part]})
        pq.write_table(table, folder / "shards" / f"train-{number}.parquet", row_group_size=1)
    return folder / "shards"


def as_parquet_of_bytes(folder: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [(folder / r["image"]).read_bytes() for r in rows()], "caption": list(CAPTIONS)})
    pq.write_table(table, folder / "bytes.parquet")
    return folder / "bytes.parquet"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def as_tars(folder: Path) -> str:
    for number, part in enumerate((rows()[:2], rows()[2:])):
        with tarfile.open(folder / f"shard-{number}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for row in part:
                key = f"deep/{'x' * 120}-{Path(row['image']).stem}"  # too long a name for a header of one block
                add(tar, f"{key}.png", (folder / row["image"]).read_bytes())
                if number:
                    add(tar, f"{key}.json", json.dumps({"caption": row["caption"]}).encode())
                else:
                    add(tar, f"{key}.cls", b"7")
                    add(tar, f"{key}.txt", row["caption"].encode())
    return str(folder / "shard-*.tar")


FORMATS = [
    as_jsonl,
    as_llava,
    as_list,
    as_metadata_jsonl,
    as_metadata_csv,
    as_texts,
    as_saved,
    as_saved_splits,
    as_parquet_of_paths,
    as_parquet_of_structs,
    as_parquet_of_bytes,
    as_tars,
]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_pairs(folder: Path, write) -> None:
    path = write(folder)
    first = open_corpus(path, Limits())
    for corpus in (first, open_corpus(str(path)), pickle.loads(pickle.dumps(first))):
        assert len(corpus) == 3
        examples = [corpus[i] for i in range(3)]
        assert tuple(e.caption for e in examples) == CAPTIONS
        assert len({e.id for e in examples}) == 3 and all(len(e.id) == 16 and e.words == () for e in examples)
        assert [e.id for e in examples] == [first[i].id for i in range(3)]
        assert corpus.fingerprint == first.fingerprint and corpus.name == first.name
        for example, tint in reversed(list(zip(examples, TINTS, strict=True))):
            image = corpus.image(example.id)
            assert image.mode == "RGB" and image.size == (8, 6) and image.getpixel((3, 3)) == tint
        for wrong in (3, -1):
            with pytest.raises(IndexError):
                corpus[wrong]
        with pytest.raises(KeyError, match="is no id of the 3 rows"):
            corpus.image("x")
        file, _, place = corpus.where(2).rpartition(":")
        assert Path(file).exists() and place


def test_the_place_of_a_row_is_its_line(folder: Path) -> None:
    assert open_corpus(as_jsonl(folder)).where(1) == f"{folder}/pairs.jsonl:3"
    text = as_llava(folder).read_text().splitlines()
    lines = [number for number, line in enumerate(text, 1) if line == " {"]
    corpus = open_corpus(folder / "llava.json")
    assert [corpus.where(i) for i in range(3)] == [f"{folder}/llava.json:{line}" for line in lines]


@pytest.mark.parametrize("write", [as_jsonl, as_list, as_metadata_csv, as_parquet_of_paths])
def test_ids_do_not_hang_on_the_place_of_a_row(folder: Path, write, monkeypatch) -> None:
    before = open_corpus(write(folder))
    ids = [before[i].id for i in range(3)]
    kept, others = rows()[::-1][:2], []
    monkeypatch.setitem(globals(), "rows", lambda: kept)
    monkeypatch.setitem(globals(), "CAPTIONS", tuple(r["caption"] for r in kept))
    after = open_corpus(write(folder))
    assert [after[i].id for i in range(2)] == [ids[2], ids[1]]
    assert after.image(ids[1]).getpixel((0, 0)) == TINTS[1]
    others = [after.fingerprint, before.fingerprint]
    named = {**kept[1], "id": 4}
    for changed in (
        kept[::-1],
        [kept[0]],
        [kept[0], {**kept[1], "caption": "x"}],
        [kept[0], named],
        [kept[0], {**named, "caption": "x"}],
        [kept[0], {**named, "image": kept[0]["image"]}],
        [kept[0], named, {"image": "pictures/a.png"}],
        [kept[0], named, {"caption": "x"}],
    ):
        write_jsonl(folder / "other.jsonl", changed)
        others.append(open_corpus(folder / "other.jsonl").fingerprint)
    assert len(set(others)) == len(others)


def test_a_rows_own_id_is_taken(folder: Path) -> None:
    named = [{**row, "id": name} for row, name in zip(rows(), ("x/1", 7, 2.5), strict=True)]
    write_jsonl(folder / "p.jsonl", named)
    corpus = open_corpus(folder / "p.jsonl")
    assert [corpus[i].id for i in range(3)] == ["x/1", "7", "2.5"]
    assert corpus.image("7").getpixel((0, 0)) == TINTS[1]


def test_ids_of_the_same_pair_are_the_same_in_formats_that_name_files(folder: Path) -> None:
    corpora = [open_corpus(write(folder)) for write in (as_jsonl, as_llava, as_list, as_parquet_of_paths)]
    assert len({tuple(c[i].id for i in range(3)) for c in corpora}) == 1
    assert len({c.fingerprint for c in corpora}) == 1


def test_of_several_images_the_first_is_taken_and_it_is_said(folder: Path) -> None:
    turns = [{"from": "gpt", "value": "two pages."}]
    entries = [{"image": ["pictures/b.png", "pictures/a.png"], "conversations": turns}, rows()[0]]
    (folder / "several.json").write_text(json.dumps(entries))
    corpus = open_corpus(folder / "several.json")
    assert corpus.image(corpus[0].id).getpixel((0, 0)) == TINTS[1]
    assert corpus.notes == ("1 rows: of several images the first is taken",)


def test_images_beside_a_file_are_also_looked_for_in_its_images_folder(folder: Path) -> None:
    (folder / "pictures").rename(folder / "images")
    entry = {"image": "a.png", "conversations": [{"from": "gpt", "value": "a page."}]}
    (folder / "x.json").write_text(json.dumps([entry]))
    pairs = open_corpus(folder / "x.json")
    assert pairs.image(pairs[0].id).size == (8, 6)


def test_a_root_widens_where_images_may_lie(folder: Path) -> None:
    (folder / "lists").mkdir()
    shutil.move(as_jsonl(folder), folder / "lists" / "pairs.jsonl")
    with pytest.raises(CorpusError, match=r"(?s)none of 3 rows.*image_missing \(3\).*Restore it"):
        open_corpus(folder / "lists" / "pairs.jsonl")
    pairs = open_corpus(folder / "lists" / "pairs.jsonl", Limits(root=folder))
    assert pairs.image(pairs[2].id).getpixel((0, 0)) == TINTS[2]
    write_jsonl(folder / "lists" / "up.jsonl", [{**row, "image": f"../{row['image']}"} for row in rows()])
    with pytest.raises(CorpusError, match="(?s)outside_root.*set data.root"):
        open_corpus(folder / "lists" / "up.jsonl")
    assert len(open_corpus(folder / "lists" / "up.jsonl", Limits(root=folder))) == 3


def test_pictures_of_a_parquet_file_come_in_any_order(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def page(tint: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("L", (4, 4), tint).save(buffer, "PNG")
        return buffer.getvalue()

    table = pa.table({"image": [page(3 * i) for i in range(70)], "text": [f"page {i}" for i in range(70)]})
    pq.write_table(table, tmp_path / "pages.parquet", row_group_size=50)
    corpus = open_corpus(tmp_path / "pages.parquet")
    for index in np.random.default_rng(0).permutation(70).tolist() + [49, 0, 17, 16, 15, 69, 50]:
        example = corpus[index]
        assert example.caption == f"page {index}"
        assert corpus.image(example.id).getpixel((0, 0)) == (3 * index,) * 3


def test_a_hub_name_is_loaded_by_datasets(folder: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.load_from_disk(str(as_saved(folder)))
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return saved

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_corpus("hf:someone/pages:test")
    assert corpus[1].caption == CAPTIONS[1] and corpus.name == "pages" and corpus.where(1) == "hf:someone/pages:test:2"
    open_corpus("hf:pages")
    assert asked == [
        ("someone/pages", {"split": "test", "streaming": False}),
        ("pages", {"split": "train", "streaming": False}),
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    for name, message in (("hf:", "expected hf:NAME"), ("hf:x", "cannot be read .ZeroDivisionError.*check its name")):
        with pytest.raises(CorpusError, match=message):
            open_corpus(name)


# ---------------------------------------------------------------- what is refused when it is opened


def text(name: str, content: str):
    def write(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return write


def csv_of(content: str):
    return lambda folder: text("metadata.csv", content)(folder / "pictures").parent


def parquet_of(**columns: list):
    def write(folder: Path) -> Path:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table(columns), folder / "x.parquet")
        return folder / "x.parquet"

    return write


FAULTS = {
    "no such path": (lambda f: f / "nowhere.jsonl", r"nowhere.jsonl: there is no such file.*JSON lines"),
    "no such shards": (lambda f: str(f / "no-*.tar"), r"no-\*.tar: .*0 files|there is no such file"),
    "empty file": (text("empty.jsonl", ""), r"empty: there are no pairs in it.*JSON lines"),
    "blank lines only": (text("blank.jsonl", "\n \n"), r"there are no pairs"),
    "empty list": (text("empty.json", " [ \n] "), r"there are no pairs"),
    "plain text": (text("notes.txt", "hello"), r"notes.txt: this is no format of pairs.*Expected"),
    "an image": (lambda f: f / "pictures" / "a.png", r"a.png: this is no format of pairs"),
    "other keys": (
        text("x.jsonl", '{"img": "a.png", "caption": "a page."}\n' * 40),
        r"none of 64 rows.*image_not_named.*x.jsonl:1: no image is named \(got the keys \['caption', 'img'\]\)",
    ),
    "no caption": (text("x.jsonl", '{"image": "pictures/a.png"}'), r"none of 1 rows.*no caption or text; got the keys"),
    "no images": (text("x.jsonl", '{"image": "z.png", "caption": "a page."}'), r"image 'z.png' is missing.*Restore"),
    "one object over lines": (text("x.json", '{\n"images": []\n}'), r"x.json:1: broken JSON.*Expected one of"),
    "LLaVA without answers": (text("x.json", '[{"image": "a.png", "conversations": 3}]'), r"no turn .*from 'gpt'"),
    "a folder of pictures": (lambda f: f / "pictures", r"caption_missing \(3\).*there is no a.txt beside it"),
    "an empty folder": (lambda f: (f / "none").mkdir() or f / "none", r"none: no pairs are found in this folder"),
    "csv columns": (csv_of("name,text\na.png,hi\n"), r"metadata.csv:1: got the columns \['name', 'text'\]; expected"),
    "empty csv": (csv_of(""), r"metadata.csv: the file is empty"),
    "parquet columns": (parquet_of(url=["a"], caption=["b"]), r"x.parquet: got the columns url \(string\), caption"),
    "no parquet": (text("x.parquet", "hello"), r"x.parquet: cannot be read as parquet.*Write it again"),
    "no tar": (text("x.tar", "hello"), r"x.tar: cannot be read as a tar"),
    "UTF-16": (lambda f: (f / "x.jsonl").write_bytes("{}".encode("utf-16")) and f / "x.jsonl", "UTF-16. Save it as"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_of_another_kind_is_refused_when_it_is_opened(folder: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(CorpusError, match=f"(?s){message}"):
        open_corpus(make(folder), Limits())


def test_bad_rows_at_the_front_do_not_condemn_a_file(folder: Path) -> None:
    (folder / "x.jsonl").write_text("{}\n" * 100 + "\n".join(json.dumps(row) for row in rows() * 20))
    assert len(open_corpus(folder / "x.jsonl")) == 160


def test_faults_of_a_datasets_folder_are_refused(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"name": ["x"], "text": ["a page."]}).save_to_disk(str(folder / "columns"))
    with pytest.raises(CorpusError, match=r"columns: got the columns name \(string\), text .*Rename or cast"):
        open_corpus(folder / "columns")
    part = datasets.load_from_disk(str(as_saved(folder)))
    datasets.DatasetDict({"a": part, "b": part}).save_to_disk(str(folder / "two"))
    with pytest.raises(CorpusError, match=r"which of the splits \['a', 'b'\]"):
        open_corpus(folder / "two")
    (folder / "broken").mkdir()
    (folder / "broken" / "state.json").write_text("{}")
    with pytest.raises(CorpusError, match="broken: cannot be read.*Save it again"):
        open_corpus(folder / "broken")


def test_parquet_of_several_splits_or_kinds_is_refused(folder: Path) -> None:
    shards = as_parquet_of_structs(folder)
    shutil.copy(shards / "train-0.parquet", shards / "test-0.parquet")
    with pytest.raises(CorpusError, match=r"got the splits \['test', 'train'\].*train-\*.parquet"):
        open_corpus(shards)
    assert len(open_corpus(str(shards / "train-*.parquet"))) == 3
    (shards / "test-0.parquet").unlink()
    shutil.copy(as_parquet_of_paths(folder), shards / "train-9.parquet")
    with pytest.raises(CorpusError, match=r"train-9.parquet: got the columns \['image', 'caption'\]"):
        open_corpus(shards)


# ---------------------------------------------------------------- where rows begin and end

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('a"\\,[]{}\n \ud7ff', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\,[', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=6), st.sampled_from([None, 0, 3]), st.integers(1, 17), st.booleans())
def test_the_entries_of_any_json_list_are_found_in_blocks_of_any_size(tmp_path_factory, entries, indent, block, ascii):
    path = tmp_path_factory.mktemp("list") / "x.json"
    path.write_text(json.dumps(entries, indent=indent, ensure_ascii=ascii) + "\n")
    data = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_spans, "BLOCK", block)
        index = index_list(path)
    found = [json.loads(data[s:e].decode()) for s, e in zip(index.starts, index.ends, strict=True)]
    assert found == entries
    for start, line in zip(index.starts, index.lines, strict=True):
        assert data[:start].count(b"\n") + 1 == line


@given(st.lists(st.text("ab \r\t", max_size=9), max_size=9), st.integers(1, 7), st.booleans())
def test_the_lines_of_any_file_are_found_in_blocks_of_any_size(tmp_path_factory, lines, block, ended):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(("\n".join(lines) + "\n" * ended).encode())
    data = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_spans, "BLOCK", block)
        index = index_lines(path)
    found = [(data[s:e].strip().decode(), n) for s, e, n in zip(index.starts, index.ends, index.lines, strict=True)]
    assert found == [(line.strip(), n) for n, line in enumerate(lines, 1) if line.strip()]


@pytest.mark.parametrize(
    ("content", "good", "bad"),
    [
        ('[{"image": "a", "caption": "x"}, {"image": "b", ', 1, 2),  # torn within an entry
        ('[{"image": "a", "caption": "x"},\n', 1, 2),
        ('[{"image": "a", "caption": "x"}', 1, 1),
        ('[{"image": "a", "caption": "x"}] {"more": 1}', 1, 1),
        ('[{"image": "a", "caption": "x"}]]][{},{}]}', 1, 1),
        ('[1, {"image": "a", "caption": "x"}, null, [], "[", {"image": "b" "caption"}]', 1, 5),
        ('[{"image": "a", "caption": "x"},]', 1, 1),
        (
            '[{"image": "a", "caption": "x" }, {"a": [}, {"image": "b", "caption": "y"}]',
            1,
            2,
        ),  # a bracket that never closes
    ],
)
def test_a_broken_list_gives_its_good_entries_and_names_the_rest(folder: Path, content, good, bad) -> None:
    path = text("x.json", content.replace('"a",', '"pictures/a.png",').replace('"b",', '"pictures/b.png",'))(folder)
    corpus = open_corpus(path)
    kinds = []
    for index in range(len(corpus)):
        try:
            assert np.asarray(corpus.image(corpus[index].id)).shape == (6, 8, 3)
            kinds.append("good")
        except BadRow as error:
            assert error.where.startswith(f"{path}:") and str(error) == f"{error.where}: {error.reason}"
            kinds.append(error.kind)
    assert kinds.count("good") == good and len(kinds) == good + bad, kinds
    assert set(kinds) <= {"good", "not_json", "image_not_named"}, kinds
