"""The measured numbers of a run, each under a path-like name, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmrpt.report.markdown import duration, percent, points
from mmrpt.report.read import CONDITIONS, Row, Run, Scored
from mmrpt.report.statistics import (
    Interval,
    auc_interval,
    paired_difference_interval,
    paired_ratio_interval,
    roc_auc,
    wilson_interval,
)
from mmrpt.report.tally import ALL_SETS, SEEN_ART, Key, Tally, never_right_blanked, only, tally_of

CONTROLS = {  # by phase, of `settings.CONTROL_PHASES`
    "control": "control",
    "captions_seconds": "captions for RL's seconds",
    "supervised_masks": "supervised masks",
    "rl_blanked": "RL with blanked images",
    "rl_random_masks": "RL on random masks",
    "grpo": "GRPO",
}
MODELS = {"warmup": "warm start", "rl": "RL", **CONTROLS}
CONTROL = "the warm start trained for as many more steps on captions"
# What each has and lacks beside RL. RL samples answers and is told by a reward which are right.
ABOUT_CONTROLS = {
    "control": f"{CONTROL}, of which words are hidden, of each class as often and otherwise at random. It has RL's "
    "steps and the captions' text as its teacher; it has `warmup.batch_size` rows a step and only the seconds that "
    "they take, no chosen masks, no reward.",
    "captions_seconds": "the same captions for as many seconds of training as RL's steps took, so more steps and rows; "
    "no chosen masks, no reward.",
    "supervised_masks": "RL's own masked samples with the hidden words as its teacher, for as many seconds of training "
    "as RL's steps took. It is shown each answer, which RL never is; it samples nothing and mixes in no captions.",
    "rl_blanked": "RL with a grey picture in the place of every training image, those of mixed captions too. It has "
    "RL's steps, questions and rewards, and can learn nothing but guessing from text.",
    "rl_random_masks": "RL on as many hidden spans of the same captions, drawn at random. It has RL's steps, images "
    "and rewards; its spans are not chosen by dependency, class or `masking.max_blind`.",
    "grpo": "RL with `perception.enabled=false`. It has RL's steps, questions, images and rewards; no filter of "
    "tokens, no weights of responses, nor the seconds of the pass that measures perception.",
}
SETS = {
    "new_scenes": "new scenes",
    "new_combinations": "new combinations",
    "new_style": "new art style",
    "held_out": "held-out pairs",
}
POOLS = (ALL_SETS, SEEN_ART)
COLUMNS = CONDITIONS | {"gap": "gap (with image − another's)"}  # of every table of accuracies
COMPARISONS = {("rl", name): f"RL − {label}" for name, label in MODELS.items() if name != "rl"}  # first minus second

CONDITIONS_AND_GAP = {one: {one: 1} for one in CONDITIONS} | {"gap": {"image": 1, "swapped": -1}}  # signed terms


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
    Promise("accuracy with image", f"accuracy/rl/{ALL_SETS}/image", percent, 0.58, True),
    Promise("gap (points)", f"accuracy/rl/{ALL_SETS}/gap", points, 0.42, True),
    Promise("gap over the warm start (points)", f"change/rl - warmup/{ALL_SETS}/gap", points, 0.08, True),
    Promise("gap over the control (points)", f"change/rl - control/{ALL_SETS}/gap", points, 0.04, True),
    Promise(
        "change over the warm start, blanked (points)", f"change/rl - warmup/{ALL_SETS}/blanked", points, 0.02, False
    ),
    Promise("time of the whole run, on two cores", "seconds/whole run", duration, 360.0, False),
)
MAY_DIFFER = ("name", "output", "seed", "threads", "track")  # settings that leave a run the default run


def numbers_of(run: Run, comparisons: Iterable[tuple[str, str]] = tuple(COMPARISONS)) -> dict[str, Estimate]:
    """Rates and their differences as fractions, ratios, seconds, AUCs; a number that was not measured is absent.

    "accuracy/<model>/<set>/<column>", "accuracy/<model>/<set>/<condition>/<kind>", "change/<model> - <other>/<set>/
    <column>" of each of `comparisons`; both also as "sampled/..." (avg@k) and as "b_clean/..." (over the questions that
    no model answers rightly with the image blanked, whose share is "b_clean_share/<set>"); "mirage/<model>/<set>" (the
    accuracy with the image blanked over that with it); "dependency_auc", "token_auc"; "seconds/<phase>", "seconds/whole
    run". <set> is also one of `POOLS`; the column "gap" is accuracy with the image minus that with another's image:
    what a model gets from looking at its own.
    """
    sets, models = in_order(SETS, run.evaluation, "set"), in_order(MODELS, run.evaluation, "model")
    subjects = {f"accuracy/{model}": {model: 1} for model in models}
    subjects |= {f"change/{one} - {other}": {one: 1, other: -1} for one, other in comparisons}
    greedy, sampled = (tally_of(run, sets, models, prefix) for prefix in ("", "sampled_"))
    clean = never_right_blanked(greedy, models)
    found = _aucs(run) | _by_kind(run.evaluation) | _mirage(greedy)
    for prefix, tally in (("", greedy), ("sampled/", sampled), ("b_clean/", only(greedy, clean))):
        for name in (*sets, *POOLS):
            for subject, of_models in subjects.items():
                for column, of_conditions in CONDITIONS_AND_GAP.items():
                    terms = {(m, name, c): s * t for m, s in of_models.items() for c, t in of_conditions.items()}
                    if terms.keys() <= tally.counts.keys():
                        found[f"{prefix}{subject}/{name}/{column}"] = _estimate(terms, tally)
    for name, questions in clean.items():
        left, asked = len(questions), len(greedy.right[models[0], name, "blanked"])
        found[f"b_clean_share/{name}"] = Estimate(left / asked, wilson_interval(left, asked), asked)
    seconds = run.seconds | ({"whole run": sum(run.seconds.values())} if run.seconds else {})
    return found | {f"seconds/{phase}": Estimate(value) for phase, value in seconds.items()}


def _estimate(terms: Mapping[Key, int], tally: Tally) -> Estimate:
    """A sum of signed rates over the same questions; a difference is paired question by question.

    Wilson's interval takes several answers to a question for one, which is never too short for their mean.
    """
    correct, count = tally.counts[next(iter(terms))].tolist()
    if len(terms) == 1:
        return Estimate(correct / tally.answers / count, wilson_interval(correct / tally.answers, count), count)
    value = sum(sign * tally.counts[key][0] / tally.counts[key][1] for key, sign in terms.items()) / tally.answers
    answers = [(tally.right.get(key, {}), sign) for key, sign in terms.items()]
    questions = answers[0][0].keys()
    if not questions or any(one.keys() != questions for one, _ in answers):
        return Estimate(float(value), None, count)
    differences = [sum(sign * one[question] for one, sign in answers) / tally.answers for question in questions]
    return Estimate(float(value), paired_difference_interval(differences, bound=len(terms) / 2), count)


def _mirage(tally: Tally) -> dict[str, Estimate]:
    """Accuracy with the image blanked over that with it, where the latter is not zero."""
    found = {}
    for (model, name, condition), (correct, count) in tally.counts.items():
        blanked = model, name, "blanked"
        if condition != "image" or correct == 0 or blanked not in tally.counts:
            continue
        one, other = (tally.right.get(key, {}) for key in (blanked, (model, name, "image")))
        paired = bool(other) and one.keys() == other.keys()
        interval = paired_ratio_interval([one[key] for key in other], list(other.values())) if paired else None
        value = tally.counts[blanked][0] / tally.counts[blanked][1] / (correct / count)
        found[f"mirage/{model}/{name}"] = Estimate(float(value), interval, int(count))
    return found


def _by_kind(rows: Iterable[Row]) -> dict[str, Estimate]:
    """Rates by kind of the hidden word, of each set and of all."""
    hits: dict[str, Any] = {}
    for row in rows:
        for kind, (rate, count) in (row.get("by_kind") or {}).items():
            for place in (row["set"], ALL_SETS):
                path = f"accuracy/{row['model']}/{place}/{row['condition']}/{kind}"
                hits[path] = hits.get(path, 0) + np.array([round(rate * count), count])
    return {path: Estimate(n / of, wilson_interval(n, of), of) for path, (n, of) in hits.items()}


def _aucs(run: Run) -> dict[str, Estimate]:
    """The AUCs that evaluation.json states, else those of scores.jsonl, which also gives their intervals."""
    known = run.sentence_scores.of(np.isfinite(run.sentence_scores.needs_image))
    stated = {"dependency_auc": (run.dependency_auc, known), "token_auc": (run.token_auc, run.token_scores)}
    return {name: found for name, (auc, scores) in stated.items() if (found := _auc(auc, scores))}


def _auc(stated: float, rows: Scored) -> Estimate | None:
    auc = stated if math.isfinite(stated) else roc_auc(rows.needs_image, rows.scores)
    if math.isnan(auc):
        return None
    interval = auc_interval(auc, rows.needs_image, rows.scores, rows.captions)
    return Estimate(auc, interval if math.isfinite(interval.low) else None, rows.scores.size)


def in_order(known: Iterable[str], rows: Iterable[Row], key: str) -> list[str]:
    """Names that rows have under `key`, each once: the known ones in their order, then the others."""
    found = {row[key] for row in rows}
    return [name for name in known if name in found] + sorted(found - set(known))
