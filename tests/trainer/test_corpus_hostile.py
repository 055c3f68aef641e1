"""A corpus with a bad row of every kind is read to its end: each bad row is named once, and twice the same."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrpt.corpus import (
    BadRow,
    CorpusError,
    GoodRows,
    ImageCache,
    Limits,
    RejectedRows,
    hold_to_corpus,
    items_at,
    open_corpus,
    read_jsonl,
    split_held_out,
)

GOOD_ROWS = 40


def noise(width: int = 32, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def large_png(side: int = 12_000) -> bytes:
    """144 megapixels in a few hundred bytes: one bit a pixel, all the same."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(side // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def broken_png(image: Image.Image) -> bytes:
    data = bytearray(encoded(image))
    middle = data.index(b"IDAT") + 200
    data[middle : middle + 64] = bytes(64)
    return bytes(data)


PICTURES = {
    "truncated.jpg": (lambda: encoded(noise(), "JPEG")[:-300], "image_broken"),
    "truncated.png": (lambda: encoded(noise())[:-300], "image_broken"),
    "broken.png": (lambda: broken_png(noise()), "image_broken"),
    "header.jpg": (lambda: encoded(noise(), "JPEG")[:200], "image_broken"),
    "empty.png": (lambda: b"", "image_format"),
    "strip.png": (lambda: encoded(noise(1, 5000)), "image_shape"),
    "eps.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "image_format"),
    "ppm.png": (lambda: encoded(noise(), "PPM"), "image_format"),
    "page.png": (lambda: b"<html>404</html>", "image_format"),
    "large.png": (large_png, "image_too_large"),
    "bomb.png": (lambda: large_png(20_000), "image_too_large"),  # which Pillow refuses by itself
}


def deep(depth: int = 100_000) -> bytes:
    return b'{"image": "good.png", "caption": ' + b"[" * depth + b"]" * depth + b"}"


def row(image: object, caption: object = "a page of noise.", **more: object) -> bytes:
    return json.dumps({"image": image, "caption": caption, **more}).encode()


LINES: dict[bytes, str] = {
    row("missing.png"): "image_missing",
    row("folder"): "image_missing",
    row("pipe.png"): "image_missing",
    row("x" * 5000): "image_missing",
    row("nul\0.png"): "image_missing",
    row("half\ud800.png"): "image_missing",
    row("circle.png"): "image_missing",
    row("https://example.org/a.png"): "image_missing",
    row("../outside/secret.png"): "outside_root",
    row("/etc/hostname"): "outside_root",
    row("link.png"): "outside_root",
    row("linked/secret.png"): "outside_root",
    row(None): "image_not_named",
    row(7): "image_not_named",
    row([]): "image_not_named",
    row([{"bytes": "x"}]): "image_not_named",
    b'{"caption": "a page."}': "image_not_named",
    b'{"image": "good.png"}': "caption_missing",
    b'{"image": "good.png", "conversations": {"from": "gpt"}}': "caption_missing",
    b'{"image": "good.png", "conversations": [{"from": "human", "value": "?"}]}': "caption_missing",
    row("good.png", ""): "caption_empty",
    row("good.png", " \u3000\n"): "caption_empty",
    row("good.png", None): "caption_empty",
    row("good.png", "... \u2014 !?"): "caption_empty",
    row("good.png", 7): "caption_not_text",
    row("good.png", ["a page."]): "caption_not_text",
    row("good.png", "half a pair \ud800"): "caption_not_text",
    row("good.png", "a nul \0 byte"): "caption_not_text",
    row("good.png", "word " * 20_000): "caption_too_long",
    deep(): "not_json",
    deep(900): "caption_not_text",
    b'{"image": "good.png", "caption": "a': "not_json",
    b'{"image": "good.png", "caption": "a raw nul \0"}': "not_json",
    b'{"image": "good.png", "caption": "a"} {}': "not_json",
    b'{"image": "good.png", "caption": "a", "n": ' + b"9" * 5000 + b"}": "not_json",
    b"[1, 2]": "not_json",
    b"\0" * 64: "not_json",
    b'{"image": "good.png", "caption": "caf\xe9"}': "not_utf8",
    row("good.png", "b", id=True): "id_not_text",
    row("good.png", "c", id=""): "id_not_text",
    row("good.png", "d", id={"a": 1}): "id_not_text",
    row("good.png", "e", id="two\nlines"): "id_not_text",
    row("good.png", "f", id="half \udfff"): "id_not_text",
    row("good.png", "g", id="x" * 201): "id_not_text",
    row("good.png", "g", id="\u00fc" * 101): "id_not_text",
    row("good.png", "h", id=float("nan")): "id_not_text",
    row("good-1.png", "caption 1 of the good ones.", id="0"): "duplicate_id",
    row("good-2.png", "caption 2 of the good ones."): "duplicate_id",  # a row that is there already
}


def write_hostile(folder: Path) -> tuple[Path, dict[int, str]]:
    """A corpus of good rows and bad ones in a fixed order, and the kind of each bad row by its line."""
    root = folder / "corpus"
    (root / "folder").mkdir(parents=True)
    (folder / "outside").mkdir()
    noise().save(folder / "outside" / "secret.png")
    (root / "link.png").symlink_to(folder / "outside" / "secret.png")
    (root / "linked").symlink_to(folder / "outside")
    (root / "circle.png").symlink_to(root / "circle.png")
    import os

    os.mkfifo(root / "pipe.png")  # a reader that opens it waits for ever
    noise().save(root / "good.png")
    good = []
    for i in range(GOOD_ROWS):
        noise(20 + i).save(root / f"good-{i}.png")
        caption = f"caption {i} of the good ones."
        good.append(row(f"good-{i}.png", caption, id=i) if i % 5 == 0 else row(f"good-{i}.png", caption))
    bad = list(LINES.items())
    for name, (make, kind) in PICTURES.items():
        (root / name).write_bytes(make())
        bad.append((row(name, f"the picture {name}"), kind))
    later = [pair for pair in bad if pair[1] == "duplicate_id"]
    mixed = [(line, "") for line in good] + [pair for pair in bad if pair[1] != "duplicate_id"]
    random.Random(3).shuffle(mixed)
    mixed += later
    (root / "pairs.jsonl").write_bytes(b"\n".join(line for line, _ in mixed) + b"\n")
    return root / "pairs.jsonl", {number: kind for number, (_, kind) in enumerate(mixed, 1) if kind}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, dict[int, str]]:
    return write_hostile(tmp_path_factory.mktemp("hostile"))


def test_every_bad_row_is_named_once_and_twice_the_same(hostile, tmp_path: Path) -> None:
    path, bad = hostile
    seen = []
    for number in range(2):
        corpus = open_corpus(path, Limits())
        rejected = RejectedRows(tmp_path / f"rejected-{number}.jsonl", max_rejected=1.0)
        rows = GoodRows(corpus, rejected)
        order = items_at(0, 2 * len(rows), len(rows), "an", "order")
        examples = [rows[i] for i in order]
        for example in examples:
            assert rows.image(example.id).mode == "RGB"
        assert {e.caption for e in examples} == {f"caption {i} of the good ones." for i in range(GOOD_ROWS)}
        written = read_jsonl(tmp_path / f"rejected-{number}.jsonl")
        assert {int(r["where"].rpartition(":")[2]): r["kind"] for r in written} == bad and len(written) == len(bad)
        assert all(r["where"].startswith(f"{path}:") and r["message"].startswith(r["where"] + ": ") for r in written)
        assert all(len(r["message"]) < len(r["where"]) + 700 for r in written)
        assert rejected.counts == {k: list(bad.values()).count(k) for k in rejected.counts}
        assert set(rejected.counts) == set(bad.values())
        seen.append((examples, written))
    assert seen[0] == seen[1]


def test_a_row_by_itself_says_what_is_wrong_with_it(hostile) -> None:
    path, bad = hostile
    corpus = open_corpus(path)
    for number, kind in bad.items():
        with pytest.raises(BadRow) as caught:
            corpus.image(corpus[number - 1].id)
        assert (caught.value.kind, caught.value.where) == (kind, f"{path}:{number}"), caught.value


def test_what_a_bad_row_gives_does_not_hang_on_what_was_visited(hostile, tmp_path: Path) -> None:
    path, bad = hostile
    whole = GoodRows(open_corpus(path), RejectedRows(tmp_path / "a.jsonl", 1.0))
    expected = [whole[i].id for i in range(len(whole))]
    good = [i for i in range(len(whole)) if i + 1 not in bad]
    assert expected == [whole[next((g for g in good if g >= i), good[0])].id for i in range(len(whole))]
    for start in (60, 20):
        rows = GoodRows(open_corpus(path), RejectedRows(tmp_path / f"{start}.jsonl", 1.0))
        got = [rows[i].id for i in (*range(start, len(rows)), *range(start))]
        assert got == expected[start:] + expected[:start]


def test_a_resumed_run_names_no_row_again(hostile, tmp_path: Path) -> None:
    path, bad = hostile
    for stop in (30, None):  # the first start is cut off
        rows = GoodRows(open_corpus(path), RejectedRows(tmp_path / "rejected.jsonl", 1.0))
        for index in range(len(rows))[:stop]:
            rows[index]
    written = [r["where"] for r in read_jsonl(tmp_path / "rejected.jsonl")]
    assert len(written) == len(set(written)) == len(bad)
    assert sum(RejectedRows(tmp_path / "rejected.jsonl", 1.0).counts.values()) == len(bad)


def test_too_many_bad_rows_stop_the_run_by_name(hostile, tmp_path: Path) -> None:
    path, bad = hostile
    rows = GoodRows(open_corpus(path), RejectedRows(tmp_path / "rejected.jsonl", 0.05))
    with pytest.raises(
        CorpusError, match=r"(?s)11 of \d+ rows cannot be used, more than data.max_rejected=0.05.*:\d+: "
    ):
        for index in range(len(rows)):
            rows[index]
    again = GoodRows(open_corpus(path), RejectedRows(tmp_path / "rejected.jsonl", 1.0))
    assert len([again[i] for i in range(len(again))]) == len(again)  # a raised limit lets the run go on
    sweep = GoodRows(open_corpus(path), RejectedRows(tmp_path / "rejected.jsonl", 1.0))
    assert [i for i in range(len(sweep)) if sweep.good(i) is None] == [line - 1 for line in sorted(bad)]
    few = RejectedRows(tmp_path / "few.jsonl", 0.05)
    for number in range(11):
        few.check(0)
        few.add(BadRow(f"x:{number}", "not_json", "broken"))
    few.check(220)
    with pytest.raises(CorpusError, match=r"(?s)11 of 219 rows.*not_json \(11\)"):
        few.check(219)


def test_a_corpus_whose_good_row_went_bad_says_so(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_bytes(row("a.png"))
    rows = GoodRows(open_corpus(tmp_path / "p.jsonl"), RejectedRows(tmp_path / "r.jsonl", 0.05))
    (tmp_path / "a.png").unlink()
    with pytest.raises(CorpusError, match=r"none of its 1 rows can be used; .*r.jsonl names them"):
        rows[0]


def test_a_row_that_changes_in_a_run_is_no_other_row(tmp_path: Path) -> None:
    for name in "ab":
        noise().save(tmp_path / f"{name}.png")
    (tmp_path / "p.jsonl").write_bytes(row("a.png") + b"\n")
    corpus = open_corpus(tmp_path / "p.jsonl")
    example = corpus[0]
    (tmp_path / "p.jsonl").write_bytes(row("b.png") + b"\n")
    for use in (lambda: corpus[0], lambda: corpus.image(example.id)):
        with pytest.raises(BadRow, match="p.jsonl:1: the row is another one"):
            use()


def test_threads_that_read_one_corpus_agree(hostile) -> None:
    path, bad = hostile
    corpus = open_corpus(path)

    def read(index: int) -> str:
        try:
            return corpus.image(corpus[index].id).mode
        except BadRow as error:
            return error.kind

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(len(corpus)))) == [bad.get(i + 1, "RGB") for i in range(len(corpus))]


# ---------------------------------------------------------------- other formats


def hostile_tar(folder: Path) -> Path:
    noise().save(folder / "good.png")
    good, broken = encoded(noise()), encoded(noise(), "JPEG")[:-300]
    members = [
        ("a.png", good), ("a.txt", b"a page."),
        ("b.png", good),
        ("c.txt", b"a page without picture."),
        ("d.jpg", broken), ("d.txt", b"a broken page."),
        ("e.png", good), ("e.json", b'{"caption": 7}'),
        ("f.png", good), ("f.json", b"[" * 100_000),
        ("g.png", good), ("g.txt", b"caf\xe9"),
        ("../h.png", good), ("../h.txt", b"up and away, yet only bytes."),
        ("__index__.json", b"{}"),
        ("i.png", good), ("i.json", b'{"caption": "another page.", "id": "i"}'),
    ]  # fmt: skip
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return folder / "x.tar"


def kinds_of(path: Path, limits: Limits | None = None) -> list[str]:
    corpus = open_corpus(path, limits or Limits())
    kinds = []
    for index in range(len(corpus)):
        try:
            corpus.image(corpus[index].id)
            kinds.append("good")
        except BadRow as error:
            assert error.where == corpus.where(index)
            kinds.append(error.kind)
    return kinds


def test_bad_samples_of_a_tar(tmp_path: Path) -> None:
    expected = ["good", "caption_missing", "image_missing", "image_broken", "caption_not_text", "not_json", "not_utf8"]
    path = hostile_tar(tmp_path)
    assert kinds_of(path) == [*expected, "good", "good"]
    data = path.read_bytes()
    last = data.index(b"i.json")
    for cut in (last + 100, last + 512 + 10, last - 600, 6000):
        path.write_bytes(data[:cut])
        torn = kinds_of(path)
        assert torn[0] == "good" and "tar_broken" in torn, (cut, torn)
    header = data.index(b"b.png")
    path.write_bytes(data[:header] + b"\xff" * 300 + data[header + 300 :])
    assert kinds_of(path) == ["good", "tar_broken"]


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    noise().save(tmp_path / "good.png")
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [
        {"bytes": encoded(noise()), "path": None},
        {"bytes": encoded(noise(), "JPEG")[:-300], "path": "b.jpg"},
        None,
        {"bytes": None, "path": "/etc/hostname"},
        {"bytes": None, "path": "good.png"},
        {"bytes": b"", "path": None},
        {"bytes": encoded(noise()), "path": None},
        {"bytes": encoded(noise()), "path": None},
    ]
    captions = ["a page.", "b", "c", "d", "e", "f", None, "caf?"]
    expected = ["good", "image_broken", "image_not_named", "outside_root", "good", "image_broken"]
    expected += ["caption_empty", "not_utf8"]
    table = pa.table({"image": pa.array(images, struct_type), "text": captions})
    for size in (1, 3, 100):
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=size, compression="none", use_dictionary=False)
        data = (tmp_path / "x.parquet").read_bytes()
        (tmp_path / "x.parquet").write_bytes(data.replace(b"caf?", b"caf\xe9"))
        assert kinds_of(tmp_path / "x.parquet") == expected


def test_a_damaged_part_of_a_parquet_file_spoils_its_rows_alone(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    noise().save(tmp_path / "good.png")
    captions = [f"this is caption {i} of a page." for i in range(6)]
    pq.write_table(
        pa.table({"image": ["good.png"] * 6, "caption": captions}),
        tmp_path / "x.parquet",
        row_group_size=2,
        compression="snappy",
        use_dictionary=False,
        write_statistics=False,
    )
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    place = data.index(b"caption 2")
    data[place - 40 : place + 30] = b"\xff" * 70
    (tmp_path / "x.parquet").write_bytes(data)
    assert kinds_of(tmp_path / "x.parquet") == ["good", "good", "row_unreadable", "row_unreadable", "good", "good"]


def test_bad_rows_of_csv_and_of_a_folder_with_texts(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    body = (
        'file_name,text,id\na.png,"a, page\nof two lines",\nz.png,b,2\na.png,x\na.png,,3\n\na.png,"say ""it""",1\n'
        + f'a.png,"{"x" * 200_000}",9\n'
    )
    (tmp_path / "metadata.csv").write_bytes(body.encode() + b"a.png,caf\xe9,4\na.png,last one,5\n")
    kinds = kinds_of(tmp_path)
    assert kinds[:5] == ["good", "image_missing", "not_csv", "caption_empty", "good"]
    assert "not_csv" in kinds[5:-2] and kinds[-2:] == ["not_utf8", "good"]
    corpus = open_corpus(tmp_path)
    assert [corpus[i].caption for i in (0, 4, len(corpus) - 1)] == ["a, page\nof two lines", 'say "it"', "last one"]
    assert corpus.where(1) == f"{tmp_path / 'metadata.csv'}:4"

    folder, outside = tmp_path / "texts", tmp_path / "secret.txt"
    folder.mkdir()
    outside.write_text("a secret.")
    for name in ("a", "b", "c", "d"):
        noise().save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a page.")
    (folder / "b.txt").symlink_to(outside)
    (folder / "c.txt").write_bytes(b"caf\xe9")
    (folder / "e.txt").write_text("a page that is gone.")
    assert kinds_of(folder) == ["good", "outside_root", "not_utf8", "caption_missing", "image_missing"]


# ---------------------------------------------------------------- pictures


def picture(tmp_path: Path, data: bytes, limits: Limits | None = None) -> Image.Image:
    (tmp_path / "it.png").write_bytes(data)
    (tmp_path / "p.jsonl").write_bytes(row("it.png"))
    corpus = open_corpus(tmp_path / "p.jsonl", limits or Limits())
    return corpus.image(corpus[0].id)


def test_pictures_come_upright_in_rgb_with_clear_parts_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    for image in (clear, clear.convert("PA"), clear.quantize(4)):
        shown = picture(
            tmp_path, encoded(image, "TIFF" if image.mode == "PA" else "PNG") if image.mode != "PA" else encoded(clear)
        )
        assert shown.getpixel((0, 0)) == (255, 0, 0) and shown.getpixel((2, 2)) == (255, 255, 255)
    assert picture(tmp_path, encoded(Image.new("L", (4, 4), 90))).getpixel((1, 1)) == (90, 90, 90)
    assert picture(tmp_path, encoded(Image.new("CMYK", (4, 4)), "JPEG")).getpixel((1, 1)) == (255, 255, 255)
    upright = noise(4, 6)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera turned it, as Pillow's transpose
    for orientation, turn in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
        assert picture(tmp_path, encoded(stored, exif=exif)).tobytes() == upright.tobytes(), orientation


def test_more_than_eight_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    expected = np.rint(ramp / 257)
    sixteen = Image.fromarray(ramp.astype(np.uint16))
    cases = {
        "I;16": (encoded(sixteen), expected),
        "I;16 TIFF": (encoded(sixteen, "TIFF"), expected),
        "I": (encoded(Image.fromarray(ramp.astype(np.int32)), "TIFF"), expected),
        "I of 8 bits": (encoded(Image.fromarray(expected.astype(np.int32)), "TIFF"), expected),
        "F of 0 to 1": (encoded(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"), expected),
        "F of -1 to 1": (encoded(Image.fromarray((ramp / 32767.5 - 1).astype(np.float32)), "TIFF"), expected),
    }
    for name, (data, wanted) in cases.items():
        grey = np.asarray(picture(tmp_path, data)).astype(int)
        assert (grey[..., 0] == grey[..., 2]).all() and np.abs(grey[..., 0] - wanted).max() <= 1, name


def test_limits_are_settings(tmp_path: Path) -> None:
    strip = encoded(noise(1, 150))
    with pytest.raises(CorpusError, match="(?s)image_shape.*1 x 150 pixels.*at most 100 times.*data.max_aspect_ratio"):
        picture(tmp_path, strip)
    assert picture(tmp_path, strip, Limits(max_aspect_ratio=150)).size == (1, 150)
    with pytest.raises(CorpusError, match="(?s)image_too_large.*data.max_megapixels"):
        picture(tmp_path, encoded(noise(40, 30)), Limits(max_megapixels=0.001))
    assert picture(tmp_path, encoded(noise(), "PPM"), Limits(formats=("PPM",))).size == (32, 24)
    (tmp_path / "p.jsonl").write_bytes(row("it.png", "x" * 11))
    with pytest.raises(CorpusError, match="(?s)caption_too_long.*11 characters, at most 10.*data.max_caption_chars"):
        open_corpus(tmp_path / "p.jsonl", Limits(max_caption_chars=10))


def test_a_picture_over_the_limit_takes_no_memory(tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorpusError, match="12000 x 12000 pixels"):
        picture(tmp_path, large_png())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB; decoded it takes 144 MB


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError("too little")])
def test_what_the_machine_lacks_is_no_fault_of_a_row(tmp_path: Path, monkeypatch, error: Exception) -> None:
    noise().save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_bytes(row("a.png"))
    corpus = open_corpus(tmp_path / "p.jsonl")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(type(error), match="too little|Too many"):
        corpus.image(corpus[0].id)


def test_the_cache_is_bounded_by_bytes_and_forgets_what_was_asked_for_longest_ago() -> None:
    asked = []

    class Source:
        def image(self, example_id: str) -> Image.Image:
            asked.append(example_id)
            return Image.new("RGB", (10, 10 * int(example_id)))

    cache = ImageCache(Source(), max_bytes=900)  # three of one unit
    for example_id in ("1", "1", "2", "1"):
        cache(example_id)
    assert asked == ["1", "2"]
    images = cache.many(["3", "1"])  # 3 fills it, 1 pushes it out
    assert {k: i.height for k, i in images.items()} == {"3": 30, "1": 10} and asked == ["1", "2", "3", "1"]
    cache("4"), cache("4")  # larger than the cache
    assert asked[4:] == ["4", "4"]
    cache("2"), cache("1"), cache("2"), cache("1")
    assert asked[6:] == ["2", "1"]


# ---------------------------------------------------------------- a part held out


def captions_of_images(folder: Path, images: int, each: int, name: str = "many.jsonl", skip: int = -1) -> Path:
    noise().save(folder / "0.png")
    lines = [row(f"{'./' * (k % 2)}{i}.png", f"caption {k} of image {i}") for i in range(images) for k in range(each)]
    if skip >= 0:
        del lines[skip]
    (folder / name).write_bytes(b"\n".join(lines))
    return folder / name


def test_all_captions_of_an_image_are_on_one_side(tmp_path: Path) -> None:
    corpus = open_corpus(captions_of_images(tmp_path, 200, 5))
    train, held_out, _ = split_held_out(corpus, 101)
    assert len(held_out) == 105 and len(train) == 895
    images = [{e.caption.split()[-1] for e in (part[i] for i in range(len(part)))} for part in (train, held_out)]
    assert not images[0] & images[1] and len(images[1]) == 21
    held = {held_out[i].id for i in range(len(held_out))}
    numbers = sorted(int(i) for i in images[1])
    assert numbers[0] < 60 and numbers[-1] > 140 and np.diff(numbers).min() < np.diff(numbers).max()  # from all over
    again = split_held_out(open_corpus(tmp_path / "many.jsonl"), 101)
    assert [p.fingerprint for p in again[:2]] == [train.fingerprint, held_out.fingerprint]
    assert {again[1][i].id for i in range(105)} == held and train.fingerprint != held_out.fingerprint
    fewer = split_held_out(open_corpus(captions_of_images(tmp_path, 200, 5, "fewer.jsonl", skip=7)), 101)[1]
    assert len({fewer[i].id for i in range(len(fewer))} & held) >= 100
    assert train.where(0).startswith(f"{tmp_path}/many.jsonl:") and train.name == "many/train"


def test_pairs_for_validation_are_neither_trained_on_nor_held_out(tmp_path: Path) -> None:
    corpus = open_corpus(captions_of_images(tmp_path, 200, 5))
    alone = split_held_out(corpus, 101)
    parts = split_held_out(corpus, 101, 32)
    assert len(alone[2]) == 0 and len(parts[2]) == 35 and sum(map(len, parts)) == len(corpus)
    assert [parts[1][i].id for i in range(105)] == [alone[1][i].id for i in range(105)]
    images = [{part[i].caption.split()[-1] for i in range(len(part))} for part in parts]
    assert [len(one) for one in images] == [200 - 21 - 7, 21, 7] and len(set().union(*images)) == 200
    assert len({part.fingerprint for part in parts}) == 3
    for validation in (895, 900):
        with pytest.raises(CorpusError, match=rf"data.held_out is 101 and data.validation {validation} of 1000 rows"):
            split_held_out(corpus, 101, validation)


@pytest.mark.parametrize("count", [0, 1, 10, 11])
def test_a_split_leaves_something_on_both_sides(tmp_path: Path, count: int) -> None:
    corpus = open_corpus(captions_of_images(tmp_path, 10, 1))
    with pytest.raises(CorpusError, match=rf"data.held_out is {count} of 10 rows of many.*bring more"):
        split_held_out(corpus, count)


def test_bad_rows_are_met_in_training(hostile, tmp_path: Path) -> None:
    path, bad = hostile
    train, held_out, _ = split_held_out(open_corpus(path), 6)
    rejected = RejectedRows(tmp_path / "rejected.jsonl", 1.0)
    for part in (train, held_out):
        rows = GoodRows(part, rejected)
        for index in range(len(rows)):
            assert rows[index].caption.endswith("of the good ones.")
    assert sum(rejected.counts.values()) == len(bad)


def test_a_run_keeps_to_its_corpus(tmp_path: Path) -> None:
    path = captions_of_images(tmp_path, 3, 1)
    for _ in range(2):
        hold_to_corpus(tmp_path / "run" / "corpus.json", open_corpus(path))
    before = (tmp_path / "run" / "corpus.json").read_bytes()
    other = open_corpus(captions_of_images(tmp_path, 3, 1, skip=1))
    with pytest.raises(CorpusError, match=r"other rows than .*2 rows of fingerprint .*expected 3 rows .*new run"):
        hold_to_corpus(tmp_path / "run" / "corpus.json", other)
    assert (tmp_path / "run" / "corpus.json").read_bytes() == before


# ---------------------------------------------------------------- size


def peak(path: Path) -> int:
    tracemalloc.start()
    corpus = open_corpus(path)
    for index in range(0, len(corpus), 20):
        corpus[index]
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held


def test_memory_is_that_of_the_index_alone(tmp_path: Path) -> None:
    noise().save(tmp_path / "0.png")
    sizes = []
    for rows in (1_000, 20_000):
        lines = (row("0.png", f"caption {i} " + "of some length " * 20) for i in range(rows))
        (tmp_path / f"{rows}.jsonl").write_bytes(b"\n".join(lines))
        sizes.append(peak(tmp_path / f"{rows}.jsonl"))
    index = 19_000 * 110  # offsets, ids, image names, and what sorting them takes; the captions are 330 bytes each
    assert sizes[1] - sizes[0] < index, sizes
