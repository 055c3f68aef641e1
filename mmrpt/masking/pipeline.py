"""Scoring of a corpus of any size: pictures are decoded ahead of the model, rows go through it in batches of about one
length, and each shard of the result is written once it is complete. Memory does not grow with the corpus."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from mmrpt.corpus import BadRow, CorpusError, too_many
from mmrpt.masking.forward import CaptionModel
from mmrpt.masking.score import CaptionRow, layer_indices, score_rows
from mmrpt.masking.shards import ScoredCaption, Shards
from mmrpt.perturbation import blank
from mmrpt.settings import Settings
from mmrpt.types import Example, PairSource, SentenceScore

WINDOW_ROWS = 256  # within which rows are sorted by length
WINDOW_BATCHES = 4  # the same in batches, for long rows
AHEAD_ROWS = 64  # decoded and processed before the model asks for them
ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

T = TypeVar("T")
R = TypeVar("R")


def score_corpus(
    model: CaptionModel, source: PairSource, shards: Shards, settings: Settings, part: int = 0, parts: int = 1
) -> None:
    """Scores the rows of every shard that is missing, of those with number `part` modulo `parts`.

    A row's scores do not depend on the rows beside it beyond rounding, nor on `parts` at all: shards are batched each
    by itself. A row that cannot be used is kept in its shard with the reason; too many of them raise CorpusError.
    """
    missing = shards.missing(part, parts)
    if not missing:
        return
    read = _Reader(model, source, settings)
    indices = (index for number in missing for index in shards.range(number))
    total = sum(len(shards.range(number)) for number in missing)
    visited = rejected = 0
    with ThreadPoolExecutor(max(1, settings.data.workers)) as pool, tqdm(total=total, desc="score", unit="row") as bar:
        rows = read_ahead(pool if settings.data.workers else None, read, indices)
        for number in missing:
            found = score_shard(model, islice(rows, len(shards.range(number))), settings, bar.update)
            visited, rejected = visited + len(found), rejected + sum(c.error is not None for c in found)
            check_rejected(found, visited, rejected, settings.data.max_rejected)
            shards.write(number, found)


def score_shard(
    model: CaptionModel,
    rows: Iterator[CaptionRow | ScoredCaption],
    settings: Settings,
    update: Callable[[int], Any],
) -> list[ScoredCaption]:
    """The rows with their scores, in their order."""
    options = settings.masking
    layers = layer_indices(options.layers, model.depth)
    found: list[ScoredCaption | None] = []
    for window in windows(rows, options.batch_tokens):
        good = [(len(found) + i, row) for i, row in enumerate(window) if isinstance(row, CaptionRow)]
        found += [row if isinstance(row, ScoredCaption) else None for row in window]
        update(len(window) - len(good))
        for batch in token_batches([len(row) for _, row in good], options.batch_tokens):
            chosen = [good[i] for i in batch]
            own_rows = [row for _, row in chosen]
            scores = score_rows(
                model, own_rows, layers=layers, attention_row=options.attention_row, signal=options.signal
            )
            for (place, row), own in zip(chosen, scores, strict=True):
                found[place] = _checked(row, own)
            update(len(batch))
    return [caption for caption in found if caption is not None]


def _checked(row: CaptionRow, scores: Sequence[SentenceScore]) -> ScoredCaption:
    """The row with its scores; rejected where the model gave none, so that it spoils no sum over the corpus."""
    if all(math.isfinite(score.score) and math.isfinite(score.mass or 0.0) for score in scores):
        return ScoredCaption(row.example, tuple(scores))
    reason = "the model's attention or prediction is not finite. Try model.dtype=float32, or remove the row."
    return ScoredCaption(None, (), BadRow(row.where, "not_finite", reason), row.example.id)


def windows(
    rows: Iterable[CaptionRow | ScoredCaption], batch_tokens: int
) -> Iterator[list[CaptionRow | ScoredCaption]]:
    """Runs of rows that are held at once: at most `WINDOW_ROWS`, and about `WINDOW_BATCHES` batches."""
    window: list[CaptionRow | ScoredCaption] = []
    tokens = 0
    for row in rows:
        window.append(row)
        tokens += len(row) if isinstance(row, CaptionRow) else 0
        if len(window) == WINDOW_ROWS or tokens >= WINDOW_BATCHES * batch_tokens:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def token_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of rows in batches of at most `batch_tokens` tokens, padding included; a longer row is alone.

    >>> token_batches([5, 1, 9, 2], 10)
    [[1, 3], [0], [2]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):  # stable, so the last is the widest
        if batches and lengths[index] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def read_ahead(pool: ThreadPoolExecutor | None, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function(item) of each item in order, `AHEAD_ROWS` of them computed before they are asked for; None: none."""
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    rest = iter(items)
    while True:
        waiting.extend(pool.submit(function, item) for item in islice(rest, AHEAD_ROWS - len(waiting)))
        if not waiting:
            return
        yield waiting.popleft().result()


def check_rejected(found: Sequence[ScoredCaption], visited: int, rejected: int, max_rejected: float) -> None:
    """Raises CorpusError where too many of the rows that were visited were rejected."""
    if too_many(rejected, visited, max_rejected):
        last = next(c.error for c in reversed(found) if c.error is not None)
        raise CorpusError(
            f"{rejected} of {visited} rows cannot be used, more than data.max_rejected={max_rejected:g} allows; the "
            f"last one: {last} Mend the rows, or raise data.max_rejected in a new run."
        )


class _Reader:
    """Row number -> a caption ready for the model, or why it is rejected. Called in threads."""

    def __init__(self, model: CaptionModel, source: PairSource, settings: Settings) -> None:
        self._model, self._source, self._options = model, source, settings.masking
        self._describe = settings.prompts.describe
        self._reserved = (settings.prompts.mask, *ANSWER_TAGS, *model.markers)

    def __call__(self, index: int) -> CaptionRow | ScoredCaption:
        example = None
        try:
            example = self._source[index]
            return self._row(index, example, self._source.image(example.id))
        except BadRow as error:
            return ScoredCaption(None, (), error, example.id if example else None)

    def _row(self, index: int, example: Example, image: Image.Image) -> CaptionRow:
        where, caption = self._where(index), example.caption
        for text in self._reserved:
            if text in caption:
                reason = f"the caption holds {text!r}, a mark of prompts and answers. Remove it from the caption."
                raise BadRow(where, "reserved_text", reason)
        ids, offsets = self._model.encode(caption)
        if not ids:
            raise BadRow(where, "empty_caption", "the caption has no token. Write one or remove the row.")
        try:
            prompt = self._model.prompt(self._describe, image)
            blanked = self._model.prompt(self._describe, blank(image)) if self._options.signal == "kl" else None
        except ValueError as error:
            reason = f"the model's image processor refuses the image of {image.width} x {image.height}: {error}"
            raise BadRow(where, "unprocessable_image", reason) from error
        return CaptionRow(example, prompt, ids, offsets, blanked, where)

    def _where(self, index: int) -> str:
        where = getattr(self._source, "where", None)
        return where(index) if where else f"row {index}"
