"""The supervised phase: captions, with a share of rows that restore random words in the answer's form.

Used twice: for the warm-up, and for the control that trains the warm start on in the same way for as many steps as
reinforcement gets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from mmrpt.data.images import seed_of
from mmrpt.data.sentences import sentence_spans
from mmrpt.masking.build import random_masks, truth_masks
from mmrpt.policy import Policy
from mmrpt.rollout.prompts import restore_text
from mmrpt.settings import PromptSettings
from mmrpt.types import Batch, Example, MaskedSample, PairSource

THINK_WORDS = 3  # of the span's sentence, before the span: long enough to say which thing is meant


def epoch_order(size: int, *seed: object) -> np.ndarray:
    """The order in which an epoch visits its items: a permutation that depends on the seed's parts alone."""
    return np.random.default_rng(seed_of(*seed)).permutation(size)


def items_at(first: int, count: int, size: int, *seed: object) -> list[int]:
    """Items `first` to `first + count` of an endless stream over `size` items, each epoch in its own order."""
    orders: dict[int, np.ndarray] = {}
    items = []
    for position in range(first, first + count):
        epoch, offset = divmod(position, size)
        if epoch not in orders:
            orders[epoch] = epoch_order(size, *seed, epoch)
        items.append(int(orders[epoch][offset]))
    return items


Lesson = Literal["first sentences", "sentences", "captions"]


def lesson_of(step: int, *, steps: int, sentence_steps: int, seed: int) -> Lesson:
    """What a warm-up step trains on: single sentences of simple scenes first, then more and more whole captions.

    A sudden change from sentences to captions undoes what the sentences taught, so after `sentence_steps` the share of
    captions rises from a quarter to three quarters, and single sentences of all scenes stay in between.
    """
    if step < sentence_steps:
        return "first sentences"
    if sentence_steps == 0:
        return "captions"
    done = (step - sentence_steps) / max(1, steps - sentence_steps)
    draw = np.random.default_rng(seed_of(seed, "lesson", step)).random()
    captions = min(0.75, 0.25 + done)
    return (
        "captions" if draw < captions else "sentences" if draw < captions + 0.75 * (1 - captions) else "first sentences"
    )


def supervised_batch(
    policy: Policy,
    source: PairSource,
    items: list[int],
    prompts: PromptSettings,
    *,
    restore_fraction: float,
    seed: int,
    sentences: int = 0,
) -> Batch:
    """Rows of prompt and wanted response, one per item; which rows restore a word is drawn from `seed`.

    `sentences` above 0 cuts each caption down to at most so many of its sentences and, where the truth is known, hides
    words that need the image: short rows about the image teach a model from scratch to look before whole captions do.
    """
    rng = np.random.default_rng(seed)
    examples = [source[i] for i in items]
    if sentences:
        examples = [sentence_example(example, rng, sentences) for example in examples]
    pixels = policy.pixels([source.image(e.id) for e in examples])
    counts = pixels.tokens_per_image(policy.merge_size).tolist()
    rows = [_row(example, prompts, restore_fraction, rng, visual=sentences > 0) for example in examples]
    encoded_prompts = [policy.encode_prompt(ask, count) for (ask, _), count in zip(rows, counts, strict=True)]
    responses = [[*policy.encode_text(answer), policy.eos_token_id] for _, answer in rows]
    return policy.batch(encoded_prompts, responses, pixels, range(len(examples)))


def sentence_example(example: Example, rng: np.random.Generator, most: int = 1) -> Example:
    """The example with 1 to `most` sentences as its caption, one of which needs the image where the truth is known."""
    spans = sentence_spans(example.caption)
    needing = [i for i, s in enumerate(spans) if any(w.needs_image and s[0] <= w.start < s[1] for w in example.words)]
    options = needing or range(len(spans))
    chosen = options[rng.integers(len(options))]
    count = min(len(spans), 1 + int(rng.integers(most)))
    first = rng.integers(max(0, chosen - count + 1), min(chosen, len(spans) - count) + 1)
    start, end = spans[first][0], spans[first + count - 1][1]
    words = tuple(replace(w, start=w.start - start, end=w.end - start) for w in example.words if start <= w.start < end)
    return Example(example.id, example.caption[start:end], words)


def restored_response(example: Example, sample: MaskedSample) -> str:
    """The wanted completion of a masked sample: think by restoring the words up to the span, then give it alone."""
    start = next((a for a, b in sentence_spans(example.caption) if a <= sample.start < b), 0)
    before = example.caption[start : sample.start].split()[-THINK_WORDS:]
    return f"<think> {' '.join([*before, sample.answer])}</think><answer> {sample.answer}</answer>"


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
