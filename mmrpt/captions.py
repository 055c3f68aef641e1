"""Batches of supervised rows: describe the image, or (a share of rows) restore a hidden word as `<think><answer>`.

The warm-up, the control and the captions that reinforcement mixes in are made of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmrpt.masking.build import random_masks, truth_masks
from mmrpt.policy import Policy
from mmrpt.rollout.prompts import begun_thought, restore_text
from mmrpt.settings import PromptSettings
from mmrpt.types import Batch, Example, MaskedSample, PairSource


def caption_batch(
    policy: Policy,
    source: PairSource,
    items: list[int],
    prompts: PromptSettings,
    *,
    restore_fraction: float,
    seed: int,
    cut: Callable[[Example, np.random.Generator], Example] | None = None,
) -> Batch:
    """Rows of prompt and wanted response, one per item; which rows restore a word is drawn from `seed`.

    `cut` shortens each example first; then words that need the image are hidden, where the truth is known.
    """
    rng = np.random.default_rng(seed)
    examples = [source[i] for i in items]
    if cut is not None:
        examples = [cut(example, rng) for example in examples]
    rows = [_row(example, prompts, restore_fraction, rng, visual=cut is not None) for example in examples]
    encoded_prompts, pixels = policy.prompts([ask for ask, _ in rows], [source.image(e.id) for e in examples])
    responses = [[*policy.encode_text(answer), policy.eos_token_id] for _, answer in rows]
    return policy.batch(encoded_prompts, responses, pixels, range(len(examples)))


def restored_response(example: Example, sample: MaskedSample) -> str:
    """The wanted completion of a masked sample: think by restoring the words up to the span, then give it alone."""
    thought = begun_thought(example.caption, sample)
    return f"{thought} {sample.answer}</think><answer> {sample.answer}</answer>"


def _row(
    example: Example, prompts: PromptSettings, restore_fraction: float, rng: np.random.Generator, *, visual: bool
) -> tuple[str, str]:
    if rng.random() < restore_fraction:
        masked = truth_masks(example, mask=prompts.mask) if visual else []
        masked = masked or random_masks(example, 1, mask=prompts.mask, rng=rng)
        if masked:
            chosen = masked[rng.integers(len(masked))]
            return restore_text(chosen, prompts), restored_response(example, chosen)
    return prompts.describe, example.caption
