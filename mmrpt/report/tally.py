"""Right answers of an evaluation by model, held-out set and condition, and by question where every answer is there."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmrpt.report.read import CONDITIONS, Row, Run, number

ALL_SETS = "all sets"
SEEN_ART = "all sets, unseen artwork left out"
UNSEEN_ART = ("new_style", "object")  # set and kind of word: no training image shows the artwork that is asked for

Key = tuple[str, str, str]  # model, held-out set, condition
Hits = dict[Hashable, float]  # right answers to each question


class Tally(NamedTuple):
    """`counts`: [right answers, questions]. `right` has the cells whose single answers are all there and agree."""

    counts: dict[Key, NDArray[np.int64]]
    right: dict[Key, Hits]
    answers: int = 1  # to each question


def tally_of(run: Run, sets: Sequence[str], models: Iterable[str], prefix: str = "") -> Tally:
    """The greedy answers, or those at temperature 1 with the prefix "sampled_"; each model's sets are also pooled as
    `ALL_SETS` and, where the new art style asks for objects, as `SEEN_ART` without those questions."""
    rows = [row for row in run.evaluation if f"{prefix}accuracy" in row]
    answers = rows[0]["sampled"] if prefix and rows else 1
    cells = {(row["model"], row["set"], row["condition"]): row for row in rows}
    counts = {key: _count(row[f"{prefix}accuracy"], row["count"], answers) for key, row in cells.items()}
    given, kinds = _answers(run.answers, prefix)
    right = {key: hits for key, hits in given.items() if key in counts and _agree(hits, counts[key])}
    for model in models:
        for condition in CONDITIONS:
            keys = [(model, name, condition) for name in sets]
            pooled, seen = ((model, name, condition) for name in (ALL_SETS, SEEN_ART))
            if not all(key in counts for key in keys):
                continue
            counts[pooled] = sum(counts[key] for key in keys)
            if all(key in right for key in keys):
                right[pooled] = {(key[1], one): hit for key in keys for one, hit in right[key].items()}
            unseen = cells.get((model, UNSEEN_ART[0], condition), {}).get(f"{prefix}by_kind", {}).get(UNSEEN_ART[1])
            if unseen is None or counts[pooled][1] == unseen[1]:
                continue
            counts[seen] = counts[pooled] - _count(*unseen, answers)
            hits = {one: hit for one, hit in right.get(pooled, {}).items() if (one[0], kinds[one]) != UNSEEN_ART}
            if _agree(hits, counts[seen]):
                right[seen] = hits
    return Tally(counts, right, answers)


def never_right_blanked(tally: Tally, models: Sequence[str]) -> dict[str, list[Hashable]]:
    """B-Clean: of each set the questions that none of the models answers rightly with the image blanked. A set without
    all single answers of every model is left out."""
    found = {}
    for name in dict.fromkeys(name for _, name, _ in tally.right):
        blanked = [tally.right.get((model, name, "blanked"), {}) for model in models]
        if blanked[0] and all(hits.keys() == blanked[0].keys() for hits in blanked):
            found[name] = [one for one in blanked[0] if not any(hits[one] for hits in blanked)]
    return found


def only(tally: Tally, questions: Mapping[str, Sequence[Hashable]]) -> Tally:
    """Those `questions` of each set alone, with the image and with another's, of the cells that have them all."""
    right: dict[Key, Hits] = {}
    for (model, name, condition), hits in tally.right.items():
        chosen = questions.get(name)
        if chosen and condition != "blanked" and all(one in hits for one in chosen):
            right[model, name, condition] = {one: hits[one] for one in chosen}
    counts = {key: np.array([sum(hits.values()), len(hits)], int) for key, hits in right.items()}
    return Tally(counts, right, tally.answers)


def _count(rate: float, questions: int, answers: int) -> NDArray[np.int64]:
    return np.array([round(rate * questions * answers), questions], int)


def _answers(rows: Iterable[Row], prefix: str) -> tuple[dict[Key, Hits], dict[Hashable, str]]:
    """Right answers to each question by model, set and condition, and the kind of word by set and question."""
    found: dict[Key, Hits] = {}
    kinds: dict[Hashable, str] = {}
    for row in rows:
        name, question, hits = row.get("set"), row.get("sample_id"), row.get(f"{prefix}exact")
        hits = sum(hits) if isinstance(hits, list) else number(row, f"{prefix}exact")
        found.setdefault((row.get("model"), name, row.get("condition")), {})[question] = hits
        kinds[name, question] = row.get("kind")
    return found, kinds


def _agree(hits: Mapping[Hashable, float], count: NDArray[np.int64]) -> bool:
    """Whether the single answers are all there and are those of evaluation.json."""
    return [sum(hits.values()), len(hits)] == count.tolist()
