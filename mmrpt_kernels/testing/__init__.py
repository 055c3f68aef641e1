"""Hostile cases and the error rule, shared by tests and benchmarks."""

from mmrpt_kernels.testing.cases import (
    ATTENTION_CASES,
    HEAD_CASES,
    AttentionCase,
    HeadCase,
    attention_inputs,
    head_inputs,
)
from mmrpt_kernels.testing.errors import ErrorReport, assert_close_to_truth, poisoned_memory

__all__ = [
    "ATTENTION_CASES",
    "HEAD_CASES",
    "AttentionCase",
    "ErrorReport",
    "HeadCase",
    "assert_close_to_truth",
    "attention_inputs",
    "head_inputs",
    "poisoned_memory",
]
