"""Scoring and masking of the training captions, each result read back where it is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from mmrpt.corpus import GoodRows, read_jsonl, write_json, write_jsonl
from mmrpt.engines.run import Run
from mmrpt.masking import build_masked_samples, choose_threshold, score_sentences, subtract_position_baseline
from mmrpt.types import Example, MaskedSample, SentenceScore

TOKENS_PER_CAPTION = 256  # that scoring reckons with


def score(run: Run) -> list[SentenceScore]:
    """Dependency scores of the training captions under the warm start; one line a sentence in scores.jsonl."""
    path, options = run.folder / "scores.jsonl", run.settings.masking
    if path.exists():
        return [_score_from_json(row) for row in read_jsonl(path)]
    captioned = _captioned(run)
    size = max(1, options.batch_tokens // TOKENS_PER_CAPTION)
    scores: list[SentenceScore] = []
    run.load("warmup")
    for start in tqdm(range(0, len(captioned), size), desc="score captions", unit="batch"):
        examples = captioned[start : start + size]
        scores += score_sentences(
            run.policy,
            examples,
            [run.images(e.id) for e in examples],
            instruction=run.settings.prompts.describe,
            layers=options.layers,
            attention_row=options.attention_row,
        )
    if options.baseline == "position":
        scores = subtract_position_baseline(scores)
    captions = {example.id: example.caption for example in captioned}
    write_jsonl(path, ({**asdict(s), "text": captions[s.example_id][s.start : s.end]} for s in scores))
    return scores


def _captioned(run: Run) -> list[Example]:
    """The examples that are scored and masked; a bad row is left out, not replaced by the next one."""
    source = run.sources.train
    read = source.good if isinstance(source, GoodRows) else source.__getitem__
    examples = (read(i) for i in range(run.settings.captions_to_score(len(source))))
    return [example for example in examples if example is not None]


def mask(run: Run, scores: list[SentenceScore]) -> list[MaskedSample]:
    """Masked samples of the captions whose sentences pass the threshold; one line each in masked.jsonl."""
    path, options = run.folder / "masked.jsonl", run.settings.masking
    if path.exists():
        return [MaskedSample(**row) for row in read_jsonl(path)]
    threshold = choose_threshold([s.score for s in scores], options.threshold)
    by_example: dict[str, list[SentenceScore]] = {}
    for score in scores:
        by_example.setdefault(score.example_id, []).append(score)
    samples: list[MaskedSample] = []
    used: Counter[str] | None = Counter() if options.balance_word_classes else None
    for example in _captioned(run):
        samples += build_masked_samples(
            example,
            by_example.get(example.id, []),
            threshold,
            mask=run.settings.prompts.mask,
            spans_per_caption=options.spans_per_caption,
            max_span_words=options.max_span_words,
            used=used,
        )
    if not samples:
        raise RuntimeError(
            f"no sentence of {len(by_example)} captions passed the threshold {threshold:.3f}: look at "
            "scores.jsonl, and set masking.threshold=quantile:0.5 or raise masking.captions."
        )
    write_json(run.folder / "masking.json", _masking_summary(scores, samples, threshold, options.threshold))
    write_jsonl(path, (s.to_json() for s in samples))
    return samples


def _score_from_json(row: dict[str, Any]) -> SentenceScore:
    row = {k: v for k, v in row.items() if k != "text"}
    row["token_spans"] = tuple(tuple(span) for span in row["token_spans"])
    return SentenceScore(**{**row, "token_masses": tuple(row["token_masses"])})


def _masking_summary(
    scores: list[SentenceScore], samples: list[MaskedSample], threshold: float, method: str
) -> dict[str, Any]:
    known = [s for s in samples if s.needs_image is not None]
    return {
        "threshold": threshold,
        "method": method,
        "sentences": len(scores),
        "dependent": sum(s.score >= threshold for s in scores),
        "samples": len(samples),
        "samples_needing_image": sum(bool(s.needs_image) for s in known) / len(known) if known else None,
    }
