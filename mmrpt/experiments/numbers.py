"""The numbers of results.json: rates and their differences between arms, by seed and over all of them."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmrpt.report.numbers import CONDITIONS_AND_GAP
from mmrpt.report.statistics import Interval, paired_difference_interval
from mmrpt.report.tally import UNSEEN_ART

Results = dict[str, Any]


class Difference(NamedTuple):
    """`interval` None: the arms were asked other questions, which cannot be paired."""

    value: float  # mean over the seeds
    interval: Interval | None
    by_seed: dict[str, float]


def per_question(result: dict[str, Any], column: str) -> NDArray[np.float64]:
    """(N,) over all held-out sets: 1, 0 or, of the gap, also -1."""
    total = 0
    for condition, sign in CONDITIONS_AND_GAP[column].items():
        text = "".join(hits[condition] for hits in result["hits"].values())
        total = total + sign * (np.frombuffer(text.encode(), np.uint8).astype(np.float64) - ord("0"))
    return total


def seeds_of(results: Results, *arms: str) -> list[str]:
    """The seeds that have all of these arms."""
    return [seed for seed, found in results["seeds"].items() if all(arm in found for arm in arms)]


def rates(results: Results, arm: str, column: str) -> dict[str, float]:
    """A rate, or the gap of two, by seed."""
    return {seed: per_question(results["seeds"][seed][arm], column).mean() for seed in seeds_of(results, arm)}


def difference(results: Results, arm: str, other: str, column: str) -> Difference | None:
    """`arm` minus `other`, paired by question; the interval pools the questions of every seed that has both."""
    pairs = {seed: [results["seeds"][seed][name] for name in (arm, other)] for seed in seeds_of(results, arm, other)}
    if not pairs:
        return None
    if any(one["questions"] != two["questions"] for one, two in pairs.values()):
        one, two = rates(results, arm, column), rates(results, other, column)
        by_seed = {seed: one[seed] - two[seed] for seed in pairs}
        return Difference(fmean(by_seed.values()), None, by_seed)
    by_question = {seed: per_question(one, column) - per_question(two, column) for seed, (one, two) in pairs.items()}
    by_seed = {seed: float(values.mean()) for seed, values in by_question.items()}
    interval = paired_difference_interval(
        np.concatenate([*by_question.values()]), bound=len(CONDITIONS_AND_GAP[column])
    )
    return Difference(fmean(by_seed.values()), interval, by_seed)


def by_kind(results: Results, arm: str, condition: str) -> dict[str, tuple[float, int]]:
    """(rate, questions) of each kind of hidden word over all sets and seeds; unseen artwork is a kind of its own."""
    found: dict[str, NDArray[np.float64]] = {}
    for seed in seeds_of(results, arm):
        for row in results["seeds"][seed][arm]["rows"]:
            for kind, (rate, count) in row["by_kind"].items() if row["condition"] == condition else ():
                name = f"{kind}, unseen artwork" if (row["set"], kind) == UNSEEN_ART else kind
                found[name] = found.get(name, np.zeros(2)) + (rate * count, count)
    return {kind: (hits / count, int(count)) for kind, (hits, count) in sorted(found.items())}


def measured(results: Results, arm: str) -> dict[str, float | dict[str, float]]:
    """Means over the seeds of what `measure` gave."""
    given = [results["seeds"][seed][arm]["measured"] for seed in seeds_of(results, arm)]
    return _means(given)


def _means(given: Iterable[dict[str, Any]]) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {}
    for one in given:
        for name, value in one.items():
            if value is not None:
                columns.setdefault(name, []).append(value)
    return {name: _means(values) if isinstance(values[0], dict) else fmean(values) for name, values in columns.items()}


def seconds(results: Results, arm: str) -> float:
    """Wall time of the arm's own phase, mean over the seeds."""
    found = [results["seeds"][seed][arm] for seed in seeds_of(results, arm)]
    return fmean(one["seconds"][one["model"]] for one in found)
