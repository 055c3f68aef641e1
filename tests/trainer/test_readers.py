"""Readers of real pairs: the same pairs in every format, every fault refused with file, line and remedy; JSON lines
that survive a crash; sentences that end where a person would end them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrpt.data import JsonlWriter, PairsError, open_pairs, read_jsonl, sentence_spans, write_jsonl

CAPTIONS = ("a red page. it is plain.", "a green page.", "a blue page, 3.5 cm wide.")
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
    write_jsonl(folder / "pairs.jsonl", rows())
    return folder / "pairs.jsonl"


def as_llava(folder: Path) -> Path:
    entries = [
        {
            "id": str(i),
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


FORMATS = [as_jsonl, as_llava, as_metadata_jsonl, as_metadata_csv, as_saved, as_saved_splits]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_pairs(folder: Path, write) -> None:
    path = write(folder)
    for pairs in (open_pairs(path), open_pairs(str(path))):
        assert len(pairs) == 3
        examples = [pairs[i] for i in range(3)]
        assert tuple(e.caption for e in examples) == CAPTIONS
        assert len({e.id for e in examples}) == 3 and all(e.words == () for e in examples)
        for example, tint in zip(examples, TINTS, strict=True):
            image = pairs.image(example.id)
            assert image.mode == "RGB" and image.size == (8, 6) and image.getpixel((3, 3)) == tint
        with pytest.raises(IndexError):
            pairs[3]
        for wrong in ("elsewhere/000000", f"{examples[0].id.rpartition('/')[0]}/000003", "x"):
            with pytest.raises(KeyError, match="is no id of these 3 pairs"):
                pairs.image(wrong)


def test_images_come_upright_in_rgb_with_clear_parts_on_white(folder: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.save(folder / "clear.png")
    Image.new("L", (4, 4), 90).save(folder / "grey.png")
    turned = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    turned.save(folder / "turned.png", exif=exif)
    names = ("clear.png", "grey.png", "turned.png")
    write_jsonl(folder / "p.jsonl", [{"image": str(folder / n), "caption": n} for n in names])
    pairs = open_pairs(folder / "p.jsonl")
    images = [pairs.image(pairs[i].id) for i in range(3)]
    assert [i.mode for i in images] == ["RGB"] * 3
    assert images[0].getpixel((0, 0)) == (255, 0, 0) and images[0].getpixel((2, 2)) == (255, 255, 255)
    assert images[1].getpixel((1, 1)) == (90, 90, 90) and images[2].size == (2, 4)


def test_llava_images_are_also_looked_for_in_the_images_folder(folder: Path) -> None:
    (folder / "pictures").rename(folder / "images")
    entry = {"image": "a.png", "conversations": [{"from": "gpt", "value": "a page."}]}
    (folder / "x.json").write_text(json.dumps([entry]))
    pairs = open_pairs(folder / "x.json")
    assert pairs.image(pairs[0].id).size == (8, 6)


def lines(folder: Path, *extra: str, name: str = "bad.jsonl") -> Path:
    good = [json.dumps(row) for row in rows()[:2]]
    (folder / name).write_text("\n".join([*good, *extra]) + "\n")
    return folder / name


def llava(folder: Path, *entries: object) -> Path:
    (folder / "bad.json").write_text("[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]")
    return folder / "bad.json"


GOOD = {"image": "pictures/a.png", "conversations": [{"from": "gpt", "value": "a page."}]}
FAULTS = {
    "no such path": (lambda f: f / "nowhere.jsonl", r"nowhere.jsonl: there is no such file.*JSON lines"),
    "empty file": (lambda f: lines_of(f, "empty.jsonl", ""), r"empty.jsonl: there are no pairs"),
    "blank lines only": (lambda f: lines_of(f, "blank.jsonl", "\n\n"), r"there are no pairs"),
    "empty list": (lambda f: lines_of(f, "empty.json", "[]"), r"there are no pairs"),
    "plain text": (lambda f: lines_of(f, "notes.txt", "hello"), r"notes.txt: this is no format of pairs.*Expected"),
    "an image": (lambda f: f / "pictures" / "a.png", r"a.png: this is no format of pairs"),
    "missing image": (
        lambda f: lines(f, '{"image": "pictures/z.png", "caption": "a page."}'),
        r"bad.jsonl:3: image 'pictures/z.png' is missing.*Restore it or remove the row",
    ),
    "no image named": (lambda f: lines(f, '{"image": null, "caption": "a page."}'), r"bad.jsonl:3: no image is named"),
    "unreadable image": (
        lambda f: lines(f, '{"image": "bad.jsonl", "caption": "a page."}'),
        r"bad.jsonl:3: image 'bad.jsonl' cannot be read.*Replace the file",
    ),
    "a folder as image": (
        lambda f: lines(f, '{"image": "pictures", "caption": "a."}'),
        r"bad.jsonl:3: image 'pictures'",
    ),
    "empty caption": (
        lambda f: lines(f, '{"image": "pictures/c.png", "caption": "  "}'),
        r"bad.jsonl:3: the caption is empty.*Write a caption",
    ),
    "caption no text": (
        lambda f: lines(f, '{"image": "pictures/c.png", "caption": 7}'),
        r"bad.jsonl:3: the caption is",
    ),
    "broken JSON": (lambda f: lines(f, '{"image": '), r"bad.jsonl:3:.*broken JSON.*Mend"),
    "no object": (lambda f: lines(f, "[1]"), r"bad.jsonl:3:.*expected a JSON object, got list"),
    "other keys": (
        lambda f: lines(f, '{"img": "pictures/c.png", "caption": "a page."}'),
        r"bad.jsonl:3: missing image; got the keys \['caption', 'img'\]",
    ),
    "no caption key": (lambda f: lines(f, '{"image": "pictures/c.png"}'), r"bad.jsonl:3: missing caption or text"),
    "broken LLaVA": (lambda f: lines_of(f, "bad.json", '[\n{"image": "a"},\n{'), r"bad.json:3: broken JSON"),
    "LLaVA without turns": (lambda f: llava(f, GOOD, {"image": "pictures/a.png"}), r"bad.json:3: expected an object"),
    "LLaVA of text alone": (
        lambda f: llava(f, GOOD, {"conversations": GOOD["conversations"]}),
        r"bad.json:3: no image is named",
    ),
    "LLaVA without answer": (
        lambda f: llava(f, GOOD, GOOD, {"image": "pictures/a.png", "conversations": [{"from": "human", "value": "?"}]}),
        r"bad.json:4: the caption is empty",
    ),
    "a folder of pictures": (lambda f: f / "pictures", r"pictures: no pairs are found in this folder. Expected"),
    "csv columns": (lambda f: csv_of(f, "name,text\na.png,hi\n"), r"metadata.csv:1: missing column file_name"),
    "csv row": (lambda f: csv_of(f, "file_name,text\na.png,hi\nb.png,\n"), r"metadata.csv:3: the caption is empty"),
}


def lines_of(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def csv_of(folder: Path, text: str) -> Path:
    lines_of(folder / "pictures", "metadata.csv", text)
    return folder / "pictures"


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_with_place_and_remedy(folder: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(PairsError, match=f"(?s){message}"):
        open_pairs(make(folder))


def test_several_faults_are_named_at_once(folder: Path) -> None:
    bad = ['{"image": "pictures/z.png", "caption": "a."}', '{"image": "pictures/a.png", "caption": ""}']
    with pytest.raises(PairsError, match=r"(?s)bad.jsonl:3: image.*missing.*\n.*bad.jsonl:4: the caption is empty"):
        open_pairs(lines(folder, *bad))


def test_faults_of_a_datasets_folder_are_refused(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})

    def save(name: str, data: dict, features: object = None) -> Path:
        datasets.Dataset.from_dict(data, features=features).save_to_disk(str(folder / name))
        return folder / name

    image = str(folder / "pictures/a.png")
    with pytest.raises(PairsError, match=r"got the columns \['name', 'text'\].*Rename or cast"):
        open_pairs(save("columns", {"name": ["x"], "text": ["a page."]}))
    with pytest.raises(PairsError, match="row 1: the caption is empty"):
        open_pairs(save("empty", {"image": [image, image], "text": ["a page.", ""]}, features))
    with pytest.raises(PairsError, match="row 1: the image is missing"):
        open_pairs(save("none", {"image": [image, None], "text": ["a page.", "b."]}, features))
    with pytest.raises(PairsError, match="row 0: image .* cannot be read"):
        open_pairs(save("bytes", {"image": [{"bytes": b"no image", "path": None}], "text": ["a."]}, features))
    part = datasets.load_from_disk(str(save("part", {"image": [image], "text": ["a page."]}, features)))
    datasets.DatasetDict({"a": part, "b": part}).save_to_disk(str(folder / "two"))
    with pytest.raises(PairsError, match=r"which of the splits \['a', 'b'\]"):
        open_pairs(folder / "two")
    broken = folder / "broken"
    broken.mkdir()
    (broken / "state.json").write_text("{}")
    with pytest.raises(PairsError, match="broken: cannot be read.*Save it again"):
        open_pairs(broken)


def test_json_lines_round_trip_and_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    data = [{"a": 1, "text": "grün\n\u2028 line"}, {"b": [1.5, None]}]
    assert write_jsonl(path, data) == 2 and read_jsonl(path) == data
    assert len(path.read_bytes().splitlines()) == 2 and "grün" in path.read_text(encoding="utf-8")

    def failing():
        yield {"c": 1}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_jsonl(path, failing())
    assert read_jsonl(path) == data and [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_writer_survives_a_torn_last_line_at_every_byte(tmp_path: Path) -> None:
    first, second = {"step": 1, "text": "é"}, {"step": 2}
    whole = tmp_path / "whole.jsonl"
    write_jsonl(whole, [first, second])
    data = whole.read_bytes()
    end_of_first = data.index(b"\n")
    for cut in range(len(data) + 1):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(data[:cut])
        kept = [first] * (cut >= end_of_first) + [second] * (cut >= len(data) - 1)
        assert read_jsonl(path) == kept, cut
        with JsonlWriter(path) as writer:
            writer.write({"step": 3})
            assert read_jsonl(path) == [*kept, {"step": 3}], f"{cut}: not flushed, or a torn line is left"
        with JsonlWriter(path) as writer:
            writer.write({"step": 4})
        assert read_jsonl(path) == [*kept, {"step": 3}, {"step": 4}], cut


def test_a_broken_line_that_is_not_the_last_is_an_error(tmp_path: Path) -> None:
    path = lines_of(tmp_path, "rows.jsonl", '{"a": 1}\n{"b"\n{"c": 1}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*broken JSON.*Mend"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("the card is red. a dog eats.", ["the card is red.", "a dog eats."]),
        ("one! two? three.", ["one!", "two?", "three."]),
        ("it is 3.5 cm wide. ok", ["it is 3.5 cm wide.", "ok"]),
        ("Dr. Smith and Mrs. Jones met. They left.", ["Dr. Smith and Mrs. Jones met.", "They left."]),
        ("fruit, e.g. apples, etc. and more. end.", ["fruit, e.g. apples, etc. and more.", "end."]),
        ("at 5 p.m. The dog slept.", ["at 5 p.m.", "The dog slept."]),
        ("at 5 p.m. the dog slept.", ["at 5 p.m. the dog slept."]),
        ("J. S. Bach wrote it. So did I. Yes.", ["J. S. Bach wrote it.", "So did I.", "Yes."]),
        ("the answer is no. the dog left.", ["the answer is no.", "the dog left."]),
        ("see no. 5 and fig. 2 there. ok.", ["see no. 5 and fig. 2 there.", "ok."]),
        ('he said "stop." then he left...  and came back', ['he said "stop."', "then he left...", "and came back"]),
        ("  spaces   around.\n\nnew line ", ["spaces   around.", "new line"]),
        ("no stop at all", ["no stop at all"]),
        ("what?! yes.", ["what?!", "yes."]),
        ("", []),
        (" \n", []),
    ],
)
def test_sentences_end_where_a_person_ends_them(caption: str, expected: list[str]) -> None:
    spans = sentence_spans(caption)
    assert [caption[a:b] for a, b in spans] == expected
    covered = {i for a, b in spans for i in range(a, b)}
    assert all(i in covered or c.isspace() for i, c in enumerate(caption))
