"""Pairs from files: readers of real data, JSON lines on disk, and the one rule of where sentences end."""

from mmrpt.data.jsonl import JsonlWriter, read_jsonl, write_jsonl
from mmrpt.data.readers import PairsError, open_pairs
from mmrpt.data.sentences import sentence_spans

__all__ = ["JsonlWriter", "PairsError", "open_pairs", "read_jsonl", "sentence_spans", "write_jsonl"]
