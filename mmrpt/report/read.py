"""Read a run folder into one `Run`, each file once; plots and report are made of that alone.

A run may have been killed at any moment: a file may not exist, its last line may be torn, a metric may be NaN. Whatever
is unusable is left out and named in `problems`. Of the files that grow with the corpus (scores.jsonl, masked.jsonl) a
few numbers a row are kept, and whole rows of the few examples that are shown.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from mmrpt.run_folder import PHASES
from mmrpt.settings import flatten

Row = dict[str, Any]
Floats = NDArray[np.float64]
CONDITIONS = {"image": "with image", "blanked": "image blanked", "swapped": "another's image"}
SIGNALS = {
    "mass": "visual share of attention",
    "text_mass": "text's share of attention",
    "kl": "KL with and without the image",
}
EXAMPLES = 3  # training examples that are shown


class Scored(NamedTuple):
    scores: Floats  # (N,)
    needs_image: Floats  # (N,) 1, 0, or NaN: not known
    captions: Floats  # (N,) the number of the caption

    def of(self, chosen: NDArray[np.bool_]) -> Scored:
        return Scored(*(values[chosen] for values in self))


@dataclass(frozen=True)
class Run:
    folder: Path
    problems: list[str]
    settings: dict[str, Any]  # flat: {"rl.steps": 170}
    environment: dict[str, Any]
    masking: Row
    seconds: dict[str, float]  # by phase
    metrics: dict[str, list[Row]]  # by phase, a row a step; of "validation" one each time
    samples: list[Row]
    token_perception: Floats  # (N,) >= 0, a part of all tokens
    trajectory_perception: Floats  # (M,) >= 0
    evaluation: list[Row]
    dependency_auc: float
    token_auc: float
    answers: list[Row]
    examples: list[str]  # ids of the training examples that are shown
    masked: dict[str, list[Row]]  # of those examples
    sentences: dict[str, list[Row]]  # of those examples
    sentence_scores: Scored  # of every sentence
    token_scores: Scored  # of the tokens whose truth is known

    def values(self, phase: str, key: str) -> Floats:
        """(N,) one key of a phase's rows, NaN where it is absent."""
        return np.array([number(row, key) for row in self.metrics.get(phase, [])], dtype=np.float64)


def read_run(folder: Path | str) -> Run:
    """Raises FileNotFoundError when `folder` is not a folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: pass a run folder, such as runs/demo")
    problems: list[str] = []
    metrics, samples, perception = (
        [row for row in _rows(folder / f"{name}.jsonl", problems) if isinstance(row.get("step"), int)]
        for name in ("metrics", "samples", "perception")
    )
    seconds, evaluation, masking = (
        _document(folder / f"{name}.json", problems) for name in ("seconds", "evaluation", "masking")
    )
    settings = flatten(_document(folder / "config.yaml", problems))
    by_phase = {phase: [row for row in metrics if row.get("phase") == phase] for phase in PHASES}
    if settings.get("evaluation.every"):
        numbers = ("step", "count", *CONDITIONS)
        rows = _rows(folder / "validation.jsonl", problems)
        by_phase["validation"] = [row for row in rows if all(math.isfinite(number(row, name)) for name in numbers)]
    examples = _choose_examples(folder, samples)
    masked = _of_examples(_rows(folder / "masked.jsonl", problems), examples)
    of_sentences, of_tokens = array("d"), array("d")
    sentences = _of_examples(_counted(_rows(folder / "scores.jsonl", problems), of_sentences, of_tokens), examples)
    return Run(
        folder=folder,
        problems=problems,
        settings=settings,
        environment=flatten(_document(folder / "environment.json", problems)),
        masking=masking,
        seconds={phase: number(seconds, phase) for phase in seconds},
        metrics={phase: rows for phase, rows in by_phase.items() if rows},
        samples=samples,
        token_perception=_gather(perception, "token_scores"),
        trajectory_perception=_gather(perception, "trajectory_scores"),
        evaluation=evaluation.get("rows", []),
        dependency_auc=number(evaluation, "dependency_auc"),
        token_auc=number(evaluation, "token_auc"),
        answers=list(_rows(folder / "answers.jsonl", problems)),
        examples=examples,
        masked=masked,
        sentences=sentences,
        sentence_scores=Scored(*np.array(of_sentences).reshape(-1, 3).T),
        token_scores=Scored(*np.array(of_tokens).reshape(-1, 3).T),
    )


def _rows(path: Path, problems: list[str]) -> Iterator[Row]:
    """The JSON lines of a file that are objects; the others are problems."""
    if not path.is_file():
        problems.append(f"`{path.name}` is not there")
        return
    with open(path, "rb") as file:
        for place, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:  # bad JSON or a cut UTF-8 character
                row = None
            if isinstance(row, dict):
                yield row
            else:
                problems.append(f"`{path.name}` line {place} is cut short or not a JSON object")


def _document(path: Path, problems: list[str]) -> Row:
    """A JSON or YAML document; {} when it is absent or no object."""
    if not path.is_file():
        problems.append(f"`{path.name}` is not there")
        return {}
    try:
        content = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_bytes())
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        problems.append(f"`{path.name}` is cut short or not an object")
    return content if isinstance(content, dict) else {}


def _choose_examples(folder: Path, samples: Iterable[Row]) -> list[str]:
    """Examples with logged rollouts, those with a picture if there are any, evenly spaced: not chosen by outcome."""
    names = list(dict.fromkeys(str(row.get("example_id")) for row in samples))
    names = [name for name in names if (folder / "images" / image_name(name)).is_file()] or names
    size = min(EXAMPLES, len(names))
    return [names[i * len(names) // size] for i in range(size)]


def _of_examples(rows: Iterable[Row], examples: list[str]) -> dict[str, list[Row]]:
    """Rows of `examples`, by example; while those are fewer than `EXAMPLES`, every example met becomes one."""
    shown: dict[str, list[Row]] = {}
    for row in rows:
        name = str(row.get("example_id"))
        if name not in examples and len(examples) < EXAMPLES:
            examples.append(name)
        if name in examples:
            shown.setdefault(name, []).append(row)
    return shown


def _counted(rows: Iterable[Row], sentences: array, tokens: array) -> Iterator[Row]:
    """Passes on the rows with a finite score; adds score, truth and caption of each and of tokens of known truth."""
    caption, name = -1, object()
    for row in rows:
        if row.get("example_id") != name:
            caption, name = caption + 1, row.get("example_id")
        if math.isfinite(score := number(row, "score")):
            sentences.extend((score, number(row, "needs_image"), caption))
            for mass, needs in zip(row.get("token_scores") or (), row.get("token_needs_image") or (), strict=False):
                if needs is not None and math.isfinite(mass):
                    tokens.extend((mass, needs, caption))
            yield row


def _gather(rows: Iterable[Row], key: str) -> Floats:
    """The finite numbers of every row's list; rounding below 0 is 0."""
    joined = np.array([value for row in rows for value in row.get(key) or []], dtype=np.float64)
    return np.maximum(joined[np.isfinite(joined)], 0.0)


def number(row: Row, key: str) -> float:
    """row[key] as a float; NaN when it is absent, null or not a number."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def changed_settings(settings: Row, defaults: Row) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of each flat setting that differs."""
    names, absent = dict.fromkeys([*settings, *defaults]), "(not set)"
    pairs = [(name, settings.get(name, absent), defaults.get(name, absent)) for name in names]
    return [(name, value, default) for name, value, default in pairs if value != default]


def image_name(example_id: str, suffix: str = "") -> str:
    """File name under images/ of an example: its id with / replaced by _."""
    return f"{example_id.replace('/', '_')}{suffix}.png"


def score_name(run: Run) -> str:
    """What masking measured: the paper's D_vis only where nothing is subtracted and a token's own row is read."""
    signal = run.settings.get("masking.signal", "mass")
    baseline, row = (run.settings.get(f"masking.{name}") for name in ("baseline", "attention_row"))
    if (signal, baseline, row) == ("mass", "none", "own"):
        return "D_vis (visual share of attention)"
    above = " above the mean at its place" if baseline == "position" and signal != "truth" else ""
    return f"dependency score ({SIGNALS.get(signal, signal)}{above})"
