"""Batches of supervised rows: describe the image, or (a share of rows) restore a hidden word as `<think><answer>`.

The warm-up, supervised controls and the captions that reinforcement mixes in are made of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from mmrpt.masking.build import caption_of, random_masks, truth_masks
from mmrpt.masking.words import word_class
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

    `cut` shortens each example first; then words that need the image are hidden, where the truth is known. The hidden
    word is of the class that the batch has hidden least: of words drawn as they come most are names of things, and a
    model would hardly ever be asked for a relation or a number.
    """
    rng = np.random.default_rng(seed)
    examples = [source[i] for i in items]
    if cut is not None:
        examples = [cut(example, rng) for example in examples]
    used: Counter[str] = Counter()
    rows = [_row(example, prompts, restore_fraction, rng, used, visual=cut is not None) for example in examples]
    return _batch(policy, rows, [source.image(e.id) for e in examples])


def masked_batch(
    policy: Policy, samples: Sequence[MaskedSample], images: Sequence[Image.Image], prompts: PromptSettings
) -> Batch:
    """Rows that restore the hidden span of each sample, whose image is the one at its place in `images`."""
    captions = [caption_of(sample, prompts.mask) for sample in samples]
    rows = [(restore_text(s, prompts), restored_response(c, s)) for c, s in zip(captions, samples, strict=True)]
    return _batch(policy, rows, images)


def restored_response(caption: str, sample: MaskedSample) -> str:
    """The wanted completion of a masked sample: think by restoring the words up to the span, then give it alone."""
    thought = begun_thought(caption, sample)
    return f"{thought} {sample.answer}</think><answer> {sample.answer}</answer>"


def _row(
    example: Example,
    prompts: PromptSettings,
    restore_fraction: float,
    rng: np.random.Generator,
    used: Counter[str],
    *,
    visual: bool,
) -> tuple[str, str]:
    if rng.random() < restore_fraction:
        masked = truth_masks(example, mask=prompts.mask) if visual else []
        masked = masked or random_masks(example, len(example.caption), mask=prompts.mask, rng=rng)
        if masked:
            chosen = _of_rarest_class(masked, used, rng)
            return restore_text(chosen, prompts), restored_response(example.caption, chosen)
    return prompts.describe, example.caption


def _of_rarest_class(masked: Sequence[MaskedSample], used: Counter[str], rng: np.random.Generator) -> MaskedSample:
    """One of the samples, of the class of word that was hidden least so far; `used` counts it."""
    classes: dict[str, list[MaskedSample]] = defaultdict(list)
    for sample in masked:
        classes[word_class(sample.answer)].append(sample)
    name = min(classes, key=lambda one: (used[one], rng.random()))
    used[name] += 1
    return classes[name][rng.integers(len(classes[name]))]


def _batch(policy: Policy, rows: Sequence[tuple[str, str]], images: Sequence[Image.Image]) -> Batch:
    """Rows of a question and its wanted answer, each with its image."""
    prompts, pixels = policy.prompts([ask for ask, _ in rows], images)
    responses = [[*policy.encode_text(answer), policy.eos_token_id] for _, answer in rows]
    return policy.batch(prompts, responses, pixels, range(len(rows)))
