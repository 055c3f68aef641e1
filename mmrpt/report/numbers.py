"""The measured numbers of a run, each under a path-like name, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmrpt.report.markdown import duration, points
from mmrpt.report.read import CONDITIONS, Row, Run
from mmrpt.report.statistics import Interval, auc_interval, paired_difference_interval, roc_auc, wilson_interval

MODELS = {"warmup": "warm start", "rl": "RL", "control": "control"}
CONTROL = "the warm start trained for as many more steps on captions"
SETS = {
    "new_scenes": "new scenes",
    "new_combinations": "new combinations",
    "new_style": "new art style",
    "held_out": "held-out pairs",
}
ALL_SETS = "all sets"
COLUMNS = CONDITIONS | {"gap": "gap (with image − another's)"}  # of every table of accuracies
COMPARISONS = {("rl", "warmup"): "RL − warm start", ("rl", "control"): "RL − control"}  # first minus second

Key = tuple[str, str, str]  # model, held-out set, condition


class Estimate(NamedTuple):
    """`interval` None: not known, as for a difference without the single answers behind it."""

    value: float
    interval: Interval | None = None
    count: int = 0


class Promise(NamedTuple):
    """A bound that the default run promises of one number of `numbers_of`: at least it, or below it."""

    name: str
    number: str
    show: Callable[[float], str]
    bound: float
    at_least: bool

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<'} {self.show(self.bound)}"

    def kept(self, value: float) -> bool:
        value = round(value, 9)  # 0.7 - 0.6 is a hair under 0.1, and a gain of ten points is ten points
        return value >= self.bound if self.at_least else value < self.bound


PROMISES = (
    Promise("dependency AUC", "dependency_auc", "{:.3f}".format, 0.85, True),
    Promise(
        "gain over the warm start, with image (points)", f"change/rl - warmup/{ALL_SETS}/image", points, 0.10, True
    ),
    Promise("gain over the control, with image (points)", f"change/rl - control/{ALL_SETS}/image", points, 0.05, True),
    Promise(
        "change over the warm start, blanked (points)", f"change/rl - warmup/{ALL_SETS}/blanked", points, 0.03, False
    ),
    Promise("time of the whole run, on two cores", "seconds/whole run", duration, 360.0, False),
)
MAY_DIFFER = ("name", "output", "seed", "threads", "track")  # settings that leave a run the default run


def numbers_of(run: Run, comparisons: Iterable[tuple[str, str]] = tuple(COMPARISONS)) -> dict[str, Estimate]:
    """Rates and their differences as fractions, seconds, and an AUC; a number that was not measured is absent.

    "accuracy/<model>/<set>/<column>", "accuracy/<model>/<set>/<condition>/<kind>", "dependency_auc", "seconds/<phase>",
    "change/<model> - <other>/<set>/<column>" of each of `comparisons`, "seconds/whole run". <set> is also "all sets";
    the column "gap" is accuracy with the image minus that with another's image: what a model gets from looking at its
    own.
    """
    sets, models = in_order(SETS, run.evaluation, "set"), in_order(MODELS, run.evaluation, "model")
    cells = {(row["model"], row["set"], row["condition"]): row for row in run.evaluation}
    counts = {key: np.array([round(row["accuracy"] * row["count"]), row["count"]], int) for key, row in cells.items()}
    right = _right_answers(run.answers, counts)
    for model in models:
        for condition in CONDITIONS:
            keys, pooled = [(model, name, condition) for name in sets], (model, ALL_SETS, condition)
            if all(key in counts for key in keys):
                counts[pooled] = sum(counts[key] for key in keys)
            if all(key in right for key in keys):
                right[pooled] = {(key[1], one): hit for key in keys for one, hit in right[key].items()}
    subjects = {f"accuracy/{model}": {model: 1} for model in models}
    subjects |= {f"change/{one} - {other}": {one: 1, other: -1} for one, other in comparisons}
    columns = {condition: {condition: 1} for condition in CONDITIONS} | {"gap": {"image": 1, "swapped": -1}}
    found = _auc(run) | _by_kind(cells)
    for name in (*sets, ALL_SETS):
        for subject, of_models in subjects.items():
            for column, of_conditions in columns.items():
                terms = {
                    (model, name, one): s * t for model, s in of_models.items() for one, t in of_conditions.items()
                }
                if terms.keys() <= counts.keys():
                    found[f"{subject}/{name}/{column}"] = _estimate(terms, counts, right)
    seconds = run.seconds | ({"whole run": sum(run.seconds.values())} if run.seconds else {})
    return found | {f"seconds/{phase}": Estimate(value) for phase, value in seconds.items()}


def _estimate(terms: Mapping[Key, int], counts: Mapping[Key, Any], right: Mapping[Key, dict]) -> Estimate:
    """A sum of signed rates over the same questions; a difference is paired question by question."""
    correct, count = counts[next(iter(terms))].tolist()
    if len(terms) == 1:
        return Estimate(correct / count, wilson_interval(correct, count), count)
    value = float(sum(sign * counts[key][0] / counts[key][1] for key, sign in terms.items()))
    answers = [(right.get(key, {}), sign) for key, sign in terms.items()]
    questions = answers[0][0].keys()
    if not questions or any(one.keys() != questions for one, _ in answers):
        return Estimate(value, None, count)
    differences = [sum(sign * one[question] for one, sign in answers) for question in questions]
    return Estimate(value, paired_difference_interval(differences, bound=len(terms) / 2), count)


def _right_answers(answers: Iterable[Row], counts: Mapping[Key, Any]) -> dict[Key, dict]:
    """Right or wrong by sample id, of the cells whose answers are all there and agree with evaluation.json."""
    right: dict[Key, dict] = {}
    for row in answers:
        key = (row.get("model"), row.get("set"), row.get("condition"))
        right.setdefault(key, {})[row.get("sample_id")] = bool(row.get("exact"))
    return {k: hits for k, hits in right.items() if k in counts and [*counts[k]] == [sum(hits.values()), len(hits)]}


def _by_kind(cells: Mapping[Key, Row]) -> dict[str, Estimate]:
    """Rates by kind of the hidden word, of each set and of all."""
    hits: dict[str, Any] = {}
    for (model, name, condition), row in cells.items():
        for kind, (rate, count) in (row.get("by_kind") or {}).items():
            for place in (name, ALL_SETS):
                path = f"accuracy/{model}/{place}/{condition}/{kind}"
                hits[path] = hits.get(path, 0) + np.array([round(rate * count), count])
    return {path: Estimate(n / of, wilson_interval(n, of), of) for path, (n, of) in hits.items()}


def _auc(run: Run) -> dict[str, Estimate]:
    """The AUC that evaluation.json states, else that of scores.jsonl; its interval by the counts of scores.jsonl."""
    known = np.isfinite(run.needs_image)
    truth = run.needs_image[known]
    auc = run.dependency_auc if math.isfinite(run.dependency_auc) else roc_auc(truth, run.scores[known])
    if math.isnan(auc):
        return {}
    interval = auc_interval(auc, int(truth.sum()), int((1 - truth).sum()))
    return {"dependency_auc": Estimate(auc, interval if math.isfinite(interval.low) else None, truth.size)}


def in_order(known: Iterable[str], rows: Iterable[Row], key: str) -> list[str]:
    """Names that rows have under `key`, each once: the known ones in their order, then the others."""
    found = {row[key] for row in rows}
    return [name for name in known if name in found] + sorted(found - set(known))
