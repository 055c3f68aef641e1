"""The supervised phase: captions, with a share of rows that restore random words in the answer's form.

Used twice: for the warm-up, and for the control that trains the warm start on with plain captions for as many steps as
reinforcement gets.
"""

from __future__ import annotations

import numpy as np

from mmrpt.config import PromptSettings
from mmrpt.data.images import seed_of
from mmrpt.data.sentences import sentence_spans
from mmrpt.masking.build import random_masks
from mmrpt.models import Policy
from mmrpt.types import Batch, Example, MaskedSample, PairSource


def epoch_order(size: int, *seed: object) -> np.ndarray:
    """The order in which an epoch visits its items: a permutation that depends on the seed's parts alone."""
    return np.random.default_rng(seed_of(*seed)).permutation(size)


def items_at(first: int, count: int, size: int, *seed: object) -> list[int]:
    """Items `first` to `first + count` of an endless stream over `size` items: epoch after epoch, each in its own order."""
    orders: dict[int, np.ndarray] = {}
    items = []
    for position in range(first, first + count):
        epoch, offset = divmod(position, size)
        if epoch not in orders:
            orders[epoch] = epoch_order(size, *seed, epoch)
        items.append(int(orders[epoch][offset]))
    return items


def supervised_batch(
    policy: Policy,
    source: PairSource,
    items: list[int],
    prompts: PromptSettings,
    *,
    restore_fraction: float,
    seed: int,
) -> Batch:
    """Rows of prompt and wanted response, one per item; which rows restore a word is drawn from `seed`."""
    rng = np.random.default_rng(seed)
    examples = [source[i] for i in items]
    pixels = policy.pixels([source.image(e.id) for e in examples])
    counts = pixels.tokens_per_image(policy.merge_size).tolist()
    rows = [_row(example, prompts, restore_fraction, rng) for example in examples]
    encoded_prompts = [policy.encode_prompt(ask, count) for (ask, _), count in zip(rows, counts, strict=True)]
    responses = [[*policy.encode_text(answer), policy.eos_token_id] for _, answer in rows]
    return policy.batch(encoded_prompts, responses, pixels, range(len(examples)))


def restored_response(example: Example, sample: MaskedSample) -> str:
    """The wanted completion of a masked sample: think by restoring the sentence, then answer with the span alone."""
    sentence = next(
        (example.caption[a:b] for a, b in sentence_spans(example.caption) if a <= sample.start < b), example.caption
    )
    return f"<think> {sentence}</think><answer> {sample.answer}</answer>"


def _row(example: Example, prompts: PromptSettings, restore_fraction: float, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < restore_fraction:
        masked = random_masks(example, 1, mask=prompts.mask, rng=rng)
        if masked:
            ask = prompts.restore.format(masked_caption=masked[0].masked_caption)
            return ask, restored_response(example, masked[0])
    return prompts.describe, example.caption
