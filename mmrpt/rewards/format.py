"""The form of a completion: it thinks, then answers, and says nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmrpt.rewards.text import completion_text, is_well_formed


def format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 for `<think>...</think><answer>...</answer>` with a non-empty answer and nothing around it, else 0.0."""
    return [float(is_well_formed(completion_text(completion))) for completion in completions]
