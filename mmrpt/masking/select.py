"""From the scores of a corpus to its masked samples: baseline, threshold, spans and leak filter, shard by shard.

Writes scores.jsonl, rejected.jsonl, masked.jsonl and last masking.json, whose presence says that all is there. Held in
memory are 8 bytes a sentence.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmrpt.corpus import RejectedRows, write_json, write_jsonl
from mmrpt.masking.baseline import PositionBaseline
from mmrpt.masking.build import build_masked_samples, truth_of
from mmrpt.masking.forward import CaptionModel
from mmrpt.masking.leaks import answer_probabilities
from mmrpt.masking.pipeline import token_batches
from mmrpt.masking.shards import ScoredCaption, Shards, score_to_json
from mmrpt.masking.threshold import Threshold, choose_threshold
from mmrpt.masking.words import has_letters
from mmrpt.perturbation import blank
from mmrpt.rollout.prompts import begun_thought, restore_text
from mmrpt.settings import Settings
from mmrpt.types import Example, MaskedSample, PairSource, SentenceScore, Word

MASKED, SCORES, SUMMARY, REJECTED = "masked.jsonl", "scores.jsonl", "masking.json", "rejected.jsonl"
BLIND_WINDOW = 256  # samples whose pictures are held at once
BINS = 40


def select_masks(
    model: CaptionModel | None,
    source: PairSource,
    shards: Shards,
    settings: Settings,
    folder: Path,
    rejected: RejectedRows | None = None,
) -> dict[str, Any]:
    """Writes the result of a corpus that is scored in full, and returns what masking.json says.

    The model is needed for `masking.max_blind` alone. `rejected`: that of the run's other readers, which would else
    name a row again that is written here. Raises ValueError where no sentence passes the threshold.
    """
    if (folder / SUMMARY).exists():
        return json.loads((folder / SUMMARY).read_text())
    baseline = _baseline(shards, settings)
    found = _Statistics()
    write_jsonl(folder / SCORES, _score_rows(shards, baseline, found))
    rejected = rejected or RejectedRows(folder / REJECTED, settings.data.max_rejected)
    _write_rejected(shards, rejected, found)
    if not found.scores:
        raise ValueError(
            f"{shards.rows} rows hold no sentence with a letter in it ({sum(found.rejected.values())} rows were "
            f"rejected, see {folder / REJECTED}): bring captions."
        )
    threshold = choose_threshold(np.frombuffer(found.scores), settings.masking.threshold)
    samples = _samples(shards, baseline, threshold, found, settings)
    if settings.masking.max_blind is not None:
        samples = _not_blind(model, source, samples, found, settings)
    write_jsonl(folder / MASKED, (_counted(sample, found).to_json() for sample, _ in samples))
    if not found.samples:
        raise ValueError(
            f"none of {found.dependent} sentences that pass the threshold {threshold.method} gives a masked sample "
            f"(dropped: {dict(found.dropped)}): look at {folder / SCORES}, and start a new run with another "
            "masking.threshold (quantile:0.5) or more captions."
        )
    summary = found.summary(threshold)
    write_json(folder / SUMMARY, summary)
    return summary


class _Statistics:
    """What is counted on the way."""

    def __init__(self) -> None:
        self.scores, self.masses = array("d"), array("d")  # of sentences with letters
        self.captions = self.sentences = self.dependent = self.samples = self.needing = self.known = 0
        self.rejected: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def summary(self, threshold: Threshold) -> dict[str, Any]:
        scores = np.frombuffer(self.scores)
        counts, edges = np.histogram(scores, BINS)
        return {
            "threshold": threshold.value,
            "method": threshold.method,
            "between_class_share": threshold.between_share,
            "warning": threshold.warning,
            "captions": self.captions,
            "rejected": dict(self.rejected.most_common()),
            "sentences": self.sentences,
            "without_letters": self.sentences - len(scores),
            "dependent": self.dependent,
            "samples": self.samples,
            "samples_needing_image": self.needing / self.known if self.known else None,
            "dropped": {kind: self.dropped[kind] for kind in ("repeated", "blind")},
            "mass_rank_correlation": rank_correlation(scores, np.frombuffer(self.masses)) if self.masses else None,
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's: the correlation of the ranks, ties at their mean rank; None where one of them does not vary."""
    ranks = []
    for values in (a, b):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    if len(a) < 2 or any(r.min() == r.max() for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _lettered(caption: ScoredCaption) -> list[bool]:
    """Of each sentence, whether it counts in the corpus's statistics."""
    text = caption.example.caption
    return [has_letters(text[s.start : s.end]) for s in caption.scores]


def _baseline(shards: Shards, settings: Settings) -> PositionBaseline | None:
    if settings.masking.baseline == "none" or settings.masking.signal == "truth":  # truth has no effect of place
        return None
    baseline = PositionBaseline()
    for caption in shards.captions():
        if caption.error is None:
            baseline.add(caption.scores, _lettered(caption))
    return baseline


def _corrected(
    shards: Shards, baseline: PositionBaseline | None
) -> Iterator[tuple[ScoredCaption, list[SentenceScore]]]:
    for caption in shards.captions():
        if caption.error is None:
            yield caption, list(caption.scores) if baseline is None else baseline.subtract(caption.scores)


def _score_rows(shards: Shards, baseline: PositionBaseline | None, found: _Statistics) -> Iterator[dict[str, Any]]:
    for caption, scores in _corrected(shards, baseline):
        found.captions += 1
        for score, lettered in zip(scores, _lettered(caption), strict=True):
            found.sentences += 1
            if lettered:
                found.scores.append(score.score)
                if score.mass is not None:
                    found.masses.append(score.mass)
            row = {**score_to_json(score), "text": caption.example.caption[score.start : score.end]}
            if words := caption.example.words:
                row["token_needs_image"] = _token_truth(score, words)
            yield row


def _token_truth(score: SentenceScore, words: Sequence[Word]) -> list[bool | None]:
    """Whether the word of each token needs the image; None of tokens that stand in no word, as punctuation."""
    near = [word for word in words if word.start < score.end and score.start < word.end]
    found = [truth_of(near, start, end) for start, end in score.token_spans]
    return [word.needs_image if word else None for word in found]


def _write_rejected(shards: Shards, rejected: RejectedRows, found: _Statistics) -> None:
    rejected.path.touch()
    for caption in shards.captions():
        if caption.error is not None:
            found.rejected[caption.error.kind] += 1
            rejected.write(caption.error, caption.example_id)


def _samples(
    shards: Shards, baseline: PositionBaseline | None, threshold: Threshold, found: _Statistics, settings: Settings
) -> Iterator[tuple[MaskedSample, Example]]:
    options = settings.masking
    used: Counter[str] | None = Counter() if options.balance_word_classes else None
    for caption, scores in _corrected(shards, baseline):
        lettered = [score for score, letters in zip(scores, _lettered(caption), strict=True) if letters]
        tau = threshold.of_caption([score.score for score in lettered])
        found.dependent += sum(score.score >= tau for score in lettered)
        for sample in build_masked_samples(
            caption.example,
            lettered,
            tau,
            mask=settings.prompts.mask,
            spans_per_caption=options.spans_per_caption,
            max_span_words=options.max_span_words,
            min_span_score=1.0 if options.signal == "truth" else -math.inf,
            used=used,
            dropped=found.dropped if options.drop_repeated else None,
        ):
            yield sample, caption.example


def _not_blind(
    model: CaptionModel,
    source: PairSource,
    samples: Iterator[tuple[MaskedSample, Example]],
    found: _Statistics,
    settings: Settings,
) -> Iterator[tuple[MaskedSample, Example]]:
    """The samples whose answer the model does not give with the image blanked."""
    while window := list(islice(samples, BLIND_WINDOW)):
        prompts, thoughts = [], []
        for sample, example in window:
            prompts.append(model.prompt(restore_text(sample, settings.prompts), blank(source.image(example.id))))
            thoughts.append(begun_thought(example.caption, sample))
        probabilities = [math.nan] * len(window)
        answers = [len(model.encode(f"{t} {s.answer}")[0]) for t, (s, _) in zip(thoughts, window, strict=True)]
        lengths = [len(prompt.ids) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        for batch in token_batches(lengths, settings.masking.batch_tokens):
            chosen = answer_probabilities(
                model, [window[i][0] for i in batch], [prompts[i] for i in batch], [thoughts[i] for i in batch]
            )
            for i, probability in zip(batch, chosen, strict=True):
                probabilities[i] = probability
        for pair, probability in zip(window, probabilities, strict=True):
            if probability > settings.masking.max_blind:
                found.dropped["blind"] += 1
            else:
                yield pair


def _counted(sample: MaskedSample, found: _Statistics) -> MaskedSample:
    found.samples += 1
    if sample.needs_image is not None:
        found.known += 1
        found.needing += sample.needs_image
    return sample
