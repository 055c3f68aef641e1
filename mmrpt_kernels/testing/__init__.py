"""Hostile cases, heads of several distributions and the error rule, shared by tests and benchmarks."""

from mmrpt_kernels.testing.cases import (
    ATTENTION_CASES,
    HEAD_CASES,
    AttentionCase,
    HeadCase,
    attention_inputs,
    head_inputs,
    on_a_grid,
)
from mmrpt_kernels.testing.errors import assert_close_to_truth, poisoned_memory, sum_cap, sum_error
from mmrpt_kernels.testing.heads import HEADS, HeadDraw, draw_head, kept_words

__all__ = [
    "ATTENTION_CASES",
    "HEADS",
    "HEAD_CASES",
    "AttentionCase",
    "HeadCase",
    "HeadDraw",
    "assert_close_to_truth",
    "attention_inputs",
    "draw_head",
    "head_inputs",
    "kept_words",
    "on_a_grid",
    "poisoned_memory",
    "sum_cap",
    "sum_error",
]
