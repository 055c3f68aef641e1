"""Does it look? Restored-span accuracy on held-out sets, beside the same with the image blanked and swapped."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmrpt.corpus import seed_of
from mmrpt.masking.build import random_masks, truth_masks
from mmrpt.perturbation import blank
from mmrpt.policy import Policy
from mmrpt.rewards.exact import is_exact
from mmrpt.rollout.generate import generate
from mmrpt.rollout.prompts import restore_prompts
from mmrpt.settings import Settings
from mmrpt.types import Example, MaskedSample, PairSource

Condition = Literal["image", "blanked", "swapped"]
CONDITIONS: tuple[Condition, ...] = ("image", "blanked", "swapped")


def held_out_samples(source: PairSource, count: int, *, mask: str, seed: int) -> list[MaskedSample]:
    """`count` masked samples, one from each of as many pairs where possible, kinds in turn.

    Where the truth is known, only words that need the image are hidden, the same for every model; without truth, a
    random content word of each caption.
    """
    rng = np.random.default_rng(seed_of("held-out", seed))
    chosen: list[MaskedSample] = []
    used: dict[str, int] = defaultdict(int)
    passes = math.ceil(count / len(source)) if len(source) else 0
    for _ in range(max(passes, 1)):
        for index in range(len(source)):
            if len(chosen) == count:
                return chosen
            options = _options(source[index], mask, rng)
            if not options:
                continue
            kinds = sorted({s.kind for s in options})
            kind = min(kinds, key=lambda k: (used[k], k))
            pick = [s for s in options if s.kind == kind]
            chosen.append(pick[rng.integers(len(pick))])
            used[kind] += 1
    return chosen


def _options(example: Example, mask: str, rng: np.random.Generator) -> list[MaskedSample]:
    return truth_masks(example, mask=mask) if example.words else random_masks(example, 1, mask=mask, rng=rng)


def shown_images(samples: Sequence[MaskedSample], source: PairSource, condition: Condition) -> list[Image.Image]:
    """The image each sample is shown: its own, a grey one, or that of the next sample with another image."""
    own = [source.image(s.example_id) for s in samples]
    if condition == "image":
        return own
    if condition == "blanked":
        return [blank(image) for image in own]
    ids = [s.example_id for s in samples]
    return [own[_next_other(ids, i)] for i in range(len(ids))]


def _next_other(ids: Sequence[str], i: int) -> int:
    for step in range(1, len(ids)):
        j = (i + step) % len(ids)
        if ids[j] != ids[i]:
            return j
    raise ValueError("swapped images need at least two different pairs in the held-out set; raise its size.")


def answer_samples(
    policy: Policy, samples: Sequence[MaskedSample], images: Sequence[Image.Image], settings: Settings
) -> list[str]:
    """Greedy completions, in the order of the samples."""
    texts: list[str] = []
    size = settings.evaluation.batch_size
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        pixels = policy.pixels(images[start : start + size])
        out = generate(
            policy,
            restore_prompts(policy, part, pixels, settings.prompts),
            pixels,
            range(len(part)),
            max_new_tokens=settings.rollout.max_new_tokens,
            temperature=0.0,
        )
        texts += [policy.tokenizer.decode([t for t in ids if t != policy.eos_token_id]) for ids in out.token_ids]
    return texts


def evaluate_policy(
    policy: Policy,
    name: str,
    sets: dict[str, tuple[PairSource, list[MaskedSample]]],
    settings: Settings,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, answers): accuracy and count per held-out set and condition, and every completion behind them."""
    rows, answers = [], []
    for set_name, (source, samples) in sets.items():
        for condition in CONDITIONS:
            texts = answer_samples(policy, samples, shown_images(samples, source, condition), settings)
            right = [is_exact(text, sample.answer) for text, sample in zip(texts, samples, strict=True)]
            where = {"model": name, "set": set_name, "condition": condition}
            rows.append({**where, **_summary(samples, right)})
            for sample, text, hit in zip(samples, texts, right, strict=True):
                own = {"sample_id": sample.id, "example_id": sample.example_id, "answer": sample.answer}
                masked = {"masked_caption": sample.masked_caption, "completion": text, "exact": hit}
                answers.append({**where, **own, **masked})
            progress()
    return rows, answers


def _summary(samples: Sequence[MaskedSample], right: Sequence[bool]) -> dict[str, Any]:
    kinds: dict[str, list[bool]] = defaultdict(list)
    for sample, hit in zip(samples, right, strict=True):
        kinds[sample.kind or "word"].append(hit)
    return {
        "accuracy": sum(right) / len(right),
        "count": len(right),
        "by_kind": {kind: [sum(hits) / len(hits), len(hits)] for kind, hits in sorted(kinds.items())},
    }
