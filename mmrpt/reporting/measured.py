"""The measured numbers of a run: accuracies with their intervals, differences between models, AUC, perception."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmrpt.metrics import (
    Interval,
    auc_interval,
    difference_interval,
    paired_difference_interval,
    roc_auc,
    wilson_interval,
)
from mmrpt.reporting.runfiles import RunFiles, column, number

MODELS = {"warm": "warm start", "reinforced": "reinforced", "caption": "caption-trained control"}
SETS = {
    "new_scenes": "new scenes",
    "new_combinations": "new combinations",
    "new_style": "new art style",
    "held_out": "held-out pairs",
}
CONDITIONS = {"image": "with image", "blanked": "image blanked", "swapped": "another's image"}
ALL_SETS = "all sets"


@dataclass(frozen=True)
class Cell:
    """Right answers of one model on one set under one condition."""

    correct: int
    count: int

    @property
    def rate(self) -> float:
        return self.correct / self.count if self.count else math.nan

    @property
    def interval(self) -> Interval:
        return wilson_interval(self.correct, self.count)

    def __add__(self, other: Cell) -> Cell:
        return Cell(self.correct + other.correct, self.count + other.count)


@dataclass
class Evaluation:
    """evaluation.json as cells, and the answers behind them. `refused` names rows without usable accuracy and count."""

    cells: dict[tuple[str, str, str], Cell] = field(default_factory=dict)  # (model, set, condition)
    kinds: dict[tuple[str, str, str, str], Cell] = field(default_factory=dict)  # (model, set, condition, kind)
    right: dict[tuple[str, str, str], dict[str, bool]] = field(default_factory=dict)  # by sample id, of answers.jsonl
    refused: list[str] = field(default_factory=list)

    def models(self) -> list[str]:
        return _known_first(MODELS, [key[0] for key in self.cells])

    def sets(self) -> list[str]:
        return _known_first(SETS, [key[1] for key in self.cells])

    def conditions(self) -> list[str]:
        return _known_first(CONDITIONS, [key[2] for key in self.cells])

    def pooled(self, model: str, condition: str, sets: Sequence[str]) -> Cell | None:
        """All questions of several sets as one; None unless every one of them was measured."""
        found = [self.cells.get((model, name, condition)) for name in sets]
        known = [cell for cell in found if cell is not None]
        return sum(known, Cell(0, 0)) if found and len(known) == len(found) else None

    def pooled_kind(self, model: str, condition: str, kind: str) -> Cell:
        """All questions of one kind over the sets; a count of 0 when there are none."""
        matching = [cell for key, cell in self.kinds.items() if (key[0], key[2], key[3]) == (model, condition, kind)]
        return sum(matching, Cell(0, 0))

    def kind_names(self) -> list[str]:
        return sorted({key[3] for key in self.kinds})


@dataclass(frozen=True)
class Difference:
    """A rate minus another, as a fraction (0.1 is ten points); `paired`: the interval knows answer by answer."""

    value: float
    interval: Interval
    paired: bool


@dataclass(frozen=True)
class Dependency:
    """Scores of sentences whose class is known. scores (N,) float64, needs_image (N,) bool; `unlabelled` other rows."""

    scores: NDArray[np.float64]
    needs_image: NDArray[np.bool_]
    unlabelled: NDArray[np.float64]

    @property
    def auc(self) -> float:
        return roc_auc(self.needs_image, self.scores)

    @property
    def interval(self) -> Interval:
        positives = int(self.needs_image.sum())
        return auc_interval(self.auc, positives, self.scores.size - positives)


def read_evaluation(files: RunFiles) -> Evaluation:
    """evaluation.json as cells; a row written twice counts once, the later one."""
    evaluation = Evaluation()
    rows = files.document("evaluation.json").get("rows", [])
    for row in rows if isinstance(rows, list) else []:
        name = (str(row.get("model")), str(row.get("set")), str(row.get("condition")))
        cell = _cell(number(row, "accuracy"), number(row, "count"))
        if cell is None or "None" in name:
            evaluation.refused.append(f"`evaluation.json` row {' / '.join(name)} has no usable accuracy and count")
            continue
        evaluation.cells[name] = cell
        for kind, pair in (row.get("by_kind") or {}).items():
            if (part := _cell(float(pair[0]), float(pair[1]))) is not None:
                evaluation.kinds[(*name, str(kind))] = part
    for row in files.rows("answers.jsonl"):
        name = (str(row.get("model")), str(row.get("set")), str(row.get("condition")))
        evaluation.right.setdefault(name, {})[str(row.get("sample_id"))] = bool(row.get("exact"))
    return evaluation


def difference(
    evaluation: Evaluation, model: str, minus: str, condition: str, sets: Sequence[str] | None = None
) -> Difference | None:
    """Rate of `model` minus rate of `minus` over the given sets (all of them: None), or None if either is missing."""
    names = list(sets) if sets is not None else evaluation.sets()
    one, other = evaluation.pooled(model, condition, names), evaluation.pooled(minus, condition, names)
    if one is None or other is None:
        return None
    value = one.rate - other.rate
    pairs = [_pairs(evaluation, (model, name, condition), (minus, name, condition)) for name in names]
    if None in pairs:
        interval = difference_interval(one.correct, one.count, other.correct, other.count)
        return Difference(value, interval, paired=False)
    only_one, only_other = (sum(pair[side] for pair in pairs) for side in (0, 1))
    return Difference(value, paired_difference_interval(only_one, only_other, one.count), paired=True)


def _pairs(evaluation: Evaluation, one: tuple[str, str, str], other: tuple[str, str, str]) -> tuple[int, int] | None:
    """Questions that only the one and only the other got right; None unless every answer of both cells is known."""
    for key in (one, other):
        known = evaluation.right.get(key, {})
        if len(known) != evaluation.cells[key].count or sum(known.values()) != evaluation.cells[key].correct:
            return None
    left, right = evaluation.right[one], evaluation.right[other]
    if left.keys() != right.keys():
        return None
    return sum(hit and not right[name] for name, hit in left.items()), sum(
        hit and not left[name] for name, hit in right.items()
    )


def read_dependency(files: RunFiles) -> Dependency:
    """scores.jsonl by true class; rows without a finite score are left out."""
    rows = [row for row in files.rows("scores.jsonl") if math.isfinite(number(row, "score"))]
    known = [row for row in rows if isinstance(row.get("needs_image"), bool)]
    return Dependency(
        column(known, "score"),
        np.array([row["needs_image"] for row in known], dtype=bool),
        column([row for row in rows if not isinstance(row.get("needs_image"), bool)], "score"),
    )


def read_perception(files: RunFiles) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """perception.jsonl of all steps: finite token scores (N,) and trajectory scores (M,), rounding below 0 set to 0."""
    rows = files.replayed("perception.jsonl")

    def gather(key: str) -> NDArray[np.float64]:
        parts = [np.asarray(row.get(key) or [], dtype=np.float64) for row in rows]
        joined = np.concatenate(parts) if parts else np.zeros(0)
        return np.maximum(joined[np.isfinite(joined)], 0.0)

    return gather("token_scores"), gather("trajectory_scores")


def measured_auc(files: RunFiles) -> tuple[float, Interval]:
    """The AUC evaluation.json states, else that of scores.jsonl; its interval by the counts of scores.jsonl."""
    own = number(files.document("evaluation.json"), "dependency_auc")
    dependency = read_dependency(files)
    auc = own if math.isfinite(own) else dependency.auc
    positives = int(dependency.needs_image.sum())
    return auc, auc_interval(auc, positives, dependency.scores.size - positives)


def points(value: float) -> str:
    """A difference of rates in percentage points, signed."""
    return f"{100 * value:+.1f} points" if math.isfinite(value) else "–"


def _cell(accuracy: float, count: float) -> Cell | None:
    if not (math.isfinite(accuracy) and math.isfinite(count)) or count < 1 or not -1e-9 <= accuracy <= 1 + 1e-9:
        return None
    return Cell(round(accuracy * count), int(count))


def _known_first(known: dict[str, str], seen: Sequence[str]) -> list[str]:
    return [name for name in known if name in seen] + sorted(set(seen) - set(known))
