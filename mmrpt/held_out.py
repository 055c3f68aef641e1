"""Does it look? Restored-span accuracy on held-out sets, beside the same with the image blanked and swapped."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal

import numpy as np
import torch
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
Sets = Mapping[str, tuple[PairSource, Sequence[MaskedSample]]]  # pairs and questions of each held-out set


def held_out_questions(
    held_out: Mapping[str, PairSource], settings: Settings
) -> dict[str, tuple[PairSource, list[MaskedSample]]]:
    """What a model is asked: of each held-out set its pairs and `evaluation.samples` masked samples of them."""
    count, mask, seed = settings.evaluation.samples, settings.prompts.mask, settings.seed
    return {name: (pairs, held_out_samples(pairs, count, mask=mask, seed=seed)) for name, pairs in held_out.items()}


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
        asked: set[str] = set()
        for index in range(len(source)):
            if len(chosen) == count:
                return chosen
            example = source[index]
            if example.id in asked:  # it stands in for a row that cannot be used
                continue
            asked.add(example.id)
            options = _options(example, mask, rng)
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


def shown_images(
    samples: Sequence[MaskedSample], source: PairSource, condition: Condition, chosen: slice = slice(None)
) -> Iterator[Image.Image]:
    """The image each chosen sample is shown, decoded when it is its turn: its own, a grey one, or that of the next of
    all samples with another image."""
    ids = [s.example_id for s in samples]
    shown = [ids[_next_other(ids, i)] for i in range(len(ids))[chosen]] if condition == "swapped" else ids[chosen]
    images = map(source.image, shown)
    return map(blank, images) if condition == "blanked" else images


def _next_other(ids: Sequence[str], i: int) -> int:
    for step in range(1, len(ids)):
        j = (i + step) % len(ids)
        if ids[j] != ids[i]:
            return j
    raise ValueError("swapped images need at least two different pairs in the held-out set; raise its size.")


def answer_samples(
    policy: Policy, samples: Sequence[MaskedSample], images: Iterable[Image.Image], settings: Settings
) -> list[str]:
    """Greedy completions, in the order of the samples."""
    return [text for (text,) in _completions(policy, samples, images, settings, count=1, temperature=0.0)]


def sampled_answers(
    policy: Policy,
    samples: Sequence[MaskedSample],
    images: Iterable[Image.Image],
    settings: Settings,
    *,
    count: int,
    seed: int,
) -> list[list[str]]:
    """`count` completions of each sample at temperature 1, whatever rollout's temperature is (VPPO's protocol)."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    return _completions(policy, samples, images, settings, count=count, temperature=1.0, generator=generator)


def _completions(
    policy: Policy,
    samples: Sequence[MaskedSample],
    images: Iterable[Image.Image],
    settings: Settings,
    *,
    count: int,
    temperature: float,
    generator: torch.Generator | None = None,
) -> list[list[str]]:
    """`count` completions of each sample; at most `evaluation.batch_size` of all at once, with the images of those."""
    size, images = max(1, settings.evaluation.batch_size // count), iter(images)
    texts: list[str] = []
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        prompts, pixels = restore_prompts(policy, part, list(islice(images, len(part))), settings.prompts)
        out = generate(
            policy,
            prompts,
            pixels,
            range(len(part)),
            group_size=count,
            max_new_tokens=settings.rollout.max_new_tokens,
            temperature=temperature,
            generator=generator,
            keep_hidden=False,
        )
        texts += [policy.tokenizer.decode([t for t in ids if t != policy.eos_token_id]) for ids in out.token_ids]
    return [texts[first : first + count] for first in range(0, len(texts), count)]


@dataclass(frozen=True)
class Batch:
    """Questions that are answered together: what is answered to them depends on no others and on no process."""

    set_name: str
    condition: Condition
    chosen: slice  # of the set's samples


def question_batches(sets: Sets, settings: Settings) -> list[Batch]:
    """All questions, `evaluation.batch_size` of one set and condition in each batch or what is left of them."""
    size = settings.evaluation.batch_size
    return [
        Batch(name, condition, slice(first, first + size))
        for name, (_, samples) in sets.items()
        for condition in CONDITIONS
        for first in range(0, len(samples), size)
    ]


def answer_batch(policy: Policy, sets: Sets, batch: Batch, settings: Settings, sampled: int) -> list[list[str]]:
    """Of each question of a batch the greedy completion, and behind it `sampled` others."""
    source, samples = sets[batch.set_name]
    own = samples[batch.chosen]
    images = list(shown_images(samples, source, batch.condition, batch.chosen))
    texts = [[text] for text in answer_samples(policy, own, images, settings)]
    if sampled:
        seed = seed_of(settings.seed, batch.set_name, batch.condition, batch.chosen.start)
        drawn = sampled_answers(policy, own, images, settings, count=sampled, seed=seed)
        texts = [one + several for one, several in zip(texts, drawn, strict=True)]
    return texts


def evaluate_policy(
    policy: Policy,
    name: str,
    sets: Sets,
    settings: Settings,
    progress: Callable[[], Any] = lambda: None,
    *,
    sampled: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, answers): accuracy and count per held-out set and condition, and every completion behind them.

    With `sampled`, rows also hold the accuracy of so many sampled answers to each question (avg@k), in all and by kind.
    Several processes share the work by `mmrpt.sharded_evaluation`.
    """
    texts = []
    for _, batches in groupby(question_batches(sets, settings), lambda batch: (batch.set_name, batch.condition)):
        texts += [answer_batch(policy, sets, batch, settings, sampled) for batch in batches]
        progress()
    return judged_answers(name, sets, settings, texts, sampled)


def judged_answers(
    name: str, sets: Sets, settings: Settings, texts: Sequence[list[list[str]]], sampled: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What `evaluate_policy` returns, of what `answer_batch` gave for each batch of all questions."""
    completions: dict[tuple[str, Condition], list[list[str]]] = defaultdict(list)
    for batch, own in zip(question_batches(sets, settings), texts, strict=True):
        completions[batch.set_name, batch.condition] += own
    rows, answers = [], []
    for set_name, (_, samples) in sets.items():
        for condition in CONDITIONS:
            where = {"model": name, "set": set_name, "condition": condition}
            judged = []
            for sample, (text, *drawn) in zip(samples, completions[set_name, condition], strict=True):
                judged.append(_judged(sample, text))
                if sampled:
                    right = [is_exact(one, sample.answer) for one in drawn]
                    judged[-1].update(sampled=drawn, sampled_exact=right)
            rows.append({**where, **_summary(samples, [answer["exact"] for answer in judged])})
            if sampled:
                found = _summary(samples, [sum(answer["sampled_exact"]) / sampled for answer in judged])
                rows[-1] |= {"sampled": sampled, **{f"sampled_{key}": found[key] for key in ("accuracy", "by_kind")}}
            answers += [where | answer for answer in judged]
    return rows, answers


def _judged(sample: MaskedSample, text: str) -> dict[str, Any]:
    return {
        "sample_id": sample.id,
        "example_id": sample.example_id,
        "kind": sample.kind,
        "answer": sample.answer,
        "masked_caption": sample.masked_caption,
        "completion": text,
        "exact": is_exact(text, sample.answer),
    }


def _summary(samples: Sequence[MaskedSample], right: Sequence[float]) -> dict[str, Any]:
    kinds: dict[str, list[float]] = defaultdict(list)
    for sample, hit in zip(samples, right, strict=True):
        kinds[sample.kind or "word"].append(hit)
    return {
        "accuracy": sum(right) / len(right),
        "count": len(right),
        "by_kind": {kind: [sum(hits) / len(hits), len(hits)] for kind, hits in sorted(kinds.items())},
    }
