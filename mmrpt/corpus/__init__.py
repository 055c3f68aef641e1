"""Pairs of images and captions from files of any origin. Imports no torch.

A row that cannot be used raises BadRow when it is asked for; it never ends a run that reads through GoodRows, which
passes it over, and never passes in silence: RejectedRows writes each one down with place and reason.
"""

from mmrpt.corpus.cache import ImageCache
from mmrpt.corpus.corpus import Corpus, CorpusPart, split_held_out
from mmrpt.corpus.files import (
    JsonlWriter,
    atomic_file,
    iter_jsonl,
    read_jsonl,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)
from mmrpt.corpus.open import hold_to_corpus, open_corpus
from mmrpt.corpus.order import epoch_order, items_at, seed_of
from mmrpt.corpus.rejected import GoodRows, RejectedRows, too_many
from mmrpt.corpus.rows import BadRow, CorpusError, Limits

__all__ = [
    "BadRow",
    "Corpus",
    "CorpusError",
    "CorpusPart",
    "GoodRows",
    "ImageCache",
    "JsonlWriter",
    "Limits",
    "RejectedRows",
    "atomic_file",
    "epoch_order",
    "hold_to_corpus",
    "items_at",
    "iter_jsonl",
    "open_corpus",
    "read_jsonl",
    "seed_of",
    "split_held_out",
    "too_many",
    "write_bytes",
    "write_json",
    "write_jsonl",
    "write_text",
]
