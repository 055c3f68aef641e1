"""The warm start that only the demo needs: the tiny model from scratch, its vision tower, and short lessons first.

A real model brings all of this along from its own pre-training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from torch import Tensor

from mmrpt.corpus import items_at, seed_of
from mmrpt.masking.sentences import sentence_spans
from mmrpt.policy import Policy
from mmrpt.settings import Settings
from mmrpt.sources import Sources
from mmrpt.types import Example, PairSource
from mmrpt.world.tiny_vlm import build_tiny_vlm
from mmrpt.world.vision_pretraining import label_weights, vision_loss

IMAGES_FOR_START = 128  # that the tiny model's vision tower starts from
CAPTIONS_FOR_WEIGHTS = 1_000


def build_start_policy(settings: Settings, sources: Sources) -> Policy:
    """The tiny model, random but for a patch embedding that starts from images of the training pairs."""
    source = sources.train
    images = [source.image(source[i].id) for i in range(min(IMAGES_FOR_START, len(source)))]
    return build_tiny_vlm(settings.demo.tiny, sources.texts(), seed=settings.seed, images=images)


class VisionPretraining:
    """The loss of each step of the vision tower's own training."""

    def __init__(self, policy: Policy, source: PairSource, settings: Settings) -> None:
        self.policy, self.source, self.settings = policy, source, settings

    @cached_property  # only where a step is left to do: a resumed run has often none
    def weights(self) -> Tensor:
        captions = (self.source[i].caption for i in range(min(CAPTIONS_FOR_WEIGHTS, len(self.source))))
        return label_weights(self.policy, captions)

    def loss(self, step: int) -> Tensor:
        size = self.settings.demo.vision_batch_size
        items = items_at(step * size, size, len(self.source), self.settings.seed, "vision_pretraining")
        examples = [self.source[i] for i in items]
        pixels = self.policy.pixels([self.source.image(e.id) for e in examples])
        return vision_loss(self.policy, pixels, [e.caption for e in examples], self.weights)


@dataclass(frozen=True)
class Lesson:
    """What a warm-up step trains on: `cut` shortens captions, None leaves them whole; `restore` hides words of some."""

    name: str
    source: PairSource
    batch_size: int
    cut: Callable[[Example, np.random.Generator], Example] | None = None
    restore: bool = True


def lesson_at(step: int, settings: Settings, sources: Sources) -> Lesson:
    """Facts first, which need the image in every sentence; then more and more whole captions.

    A sudden change to captions undoes what the first lessons taught, so after `demo.fact_steps` the share of captions
    rises from a quarter to three quarters, and facts and short captions of 1 to 3 sentences stay in between.
    """
    steps, fact_steps = settings.warmup.steps, settings.demo.fact_steps
    name = lesson_of(step, steps=steps, fact_steps=fact_steps, seed=settings.seed)
    if name == "captions":
        return Lesson(name, sources.train, settings.warmup.batch_size)
    if name == "facts":
        return Lesson(name, sources.facts, settings.demo.lesson_batch_size, restore=False)
    return Lesson(name, sources.train, settings.demo.lesson_batch_size, partial(sentence_example, most=3))


def lesson_of(step: int, *, steps: int, fact_steps: int, seed: int) -> str:
    """ "facts", "sentences" or "captions", drawn from the seed and the step alone."""
    if fact_steps == 0:
        return "captions"
    if step < fact_steps:
        return "facts"
    done = (step - fact_steps) / max(1, steps - fact_steps)
    draw = np.random.default_rng(seed_of(seed, "lesson", step)).random()
    captions = min(0.75, 0.25 + done)
    if draw < captions:
        return "captions"
    return "sentences" if draw < captions + 0.75 * (1 - captions) else "facts"


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
