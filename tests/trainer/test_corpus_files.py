"""Files on disk: whole or not there at all, and JSON lines that survive a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmrpt.corpus import JsonlWriter, iter_jsonl, read_jsonl, write_json, write_jsonl, write_text


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
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b"\n{"c": 1}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*broken JSON.*Mend"):
        read_jsonl(path)


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"a": i} for i in range(3)])
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write("broken\n")
    rows = iter_jsonl(tmp_path / "rows.jsonl")
    assert [next(rows) for _ in range(3)] == [{"a": 0}, {"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=r"rows.jsonl:4: broken JSON"):
        next(rows)


@pytest.mark.parametrize("write", [write_text, write_json])
def test_an_old_file_outlives_a_write_that_fails(tmp_path: Path, write, monkeypatch) -> None:
    write(tmp_path / "a", "old")
    before = (tmp_path / "a").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_half_a_surrogate_pair_is_written_as_json_has_it(tmp_path: Path) -> None:
    row = {"message": "\ud800 grün"}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    with JsonlWriter(tmp_path / "rows.jsonl") as writer:
        writer.write(row)
    assert read_jsonl(tmp_path / "rows.jsonl") == [row, row]
    write_json(tmp_path / "it.json", row)
    assert json.loads((tmp_path / "it.json").read_bytes()) == row
