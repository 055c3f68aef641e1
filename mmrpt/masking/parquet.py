"""masked.parquet: the masked samples with their pictures, for `datasets`, TRL and verl."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mmrpt.corpus import atomic_file, iter_jsonl
from mmrpt.masking.select import MASKED
from mmrpt.rollout.prompts import restore_text
from mmrpt.settings import PromptSettings
from mmrpt.types import MaskedSample, PairSource

PARQUET = "masked.parquet"
ROWS_AT_ONCE = 64
JPEG_QUALITY = 95


def write_parquet(folder: Path, source: PairSource, prompts: PromptSettings) -> Path:
    """Writes masked.parquet beside masked.jsonl, complete or not at all; a few rows are in memory at a time.

    Columns: `prompt` (one user turn, as TRL takes it) and `verl_prompt` (the same with verl's <image>), `images`
    (JPEG), `answer`, again as TRL's `solution` and in verl's `reward_model`, `data_source`, `ability`, and some of the
    sample's fields.
    """
    try:
        import datasets
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise ValueError("masked.parquet needs the package datasets: pip install 'mmrpt[data]'.") from None
    text = datasets.Value("string")
    turns = [{"role": text, "content": text}]
    features = datasets.Features(
        {
            "id": text,
            "example_id": text,
            "prompt": turns,
            "verl_prompt": turns,
            "images": [datasets.Image()],
            "answer": text,
            "solution": text,
            "masked_caption": text,
            "sentence_score": datasets.Value("float64"),
            "data_source": text,
            "ability": text,
            "reward_model": {"style": text, "ground_truth": text},
        }
    )
    rows = _rows(folder, source, prompts)
    with atomic_file(folder / PARQUET) as file, ParquetWriter(file, features.arrow_schema) as writer:
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(chunk, schema=features.arrow_schema))
    return folder / PARQUET


def _rows(folder: Path, source: PairSource, prompts: PromptSettings) -> Iterator[dict[str, Any]]:
    example_id, picture = None, b""
    for row in iter_jsonl(folder / MASKED):
        sample = MaskedSample(**row)
        if sample.example_id != example_id:
            example_id, picture = sample.example_id, _jpeg(source, sample.example_id)
        question = restore_text(sample, prompts)
        yield {
            "id": sample.id,
            "example_id": sample.example_id,
            "prompt": [{"role": "user", "content": question}],
            "verl_prompt": [{"role": "user", "content": f"<image>{question}"}],
            "images": [{"bytes": picture, "path": None}],
            "answer": sample.answer,
            "solution": sample.answer,
            "masked_caption": sample.masked_caption,
            "sentence_score": sample.sentence_score,
            "data_source": "mmrpt",
            "ability": "masked_caption",
            "reward_model": {"style": "rule", "ground_truth": sample.answer},
        }


def _jpeg(source: PairSource, example_id: str) -> bytes:
    buffer = io.BytesIO()
    source.image(example_id).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
