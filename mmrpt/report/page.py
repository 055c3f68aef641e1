"""Write report.md of a run: state, headline numbers, examples, plots, settings, what is missing.

Works on a run at any point: what is not there yet is named in the last section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmrpt.corpus import write_bytes
from mmrpt.report.examples import held_out_examples, training_examples
from mmrpt.report.markdown import code, duration, escape, figure, interval_of, percent, points, table
from mmrpt.report.numbers import (
    ABOUT_CONTROLS,
    ALL_SETS,
    COLUMNS,
    COMPARISONS,
    CONDITIONS,
    CONTROL,
    CONTROLS,
    MAY_DIFFER,
    MODELS,
    POOLS,
    PROMISES,
    SETS,
    Estimate,
    in_order,
    numbers_of,
)
from mmrpt.report.plots import PLOTS, draw_all
from mmrpt.report.read import Run, changed_settings, number, read_run
from mmrpt.report.statistics import wilson_interval
from mmrpt.report.tally import SEEN_ART, UNSEEN_ART
from mmrpt.settings import TIMED_CONTROLS, Settings, flatten, to_yaml

Numbers = Mapping[str, Estimate]
Comparisons = Mapping[tuple[str, str], str]

PHASE_NAMES = {
    "vision_pretraining": "vision pre-training",
    "warmup": "warm-up on captions",
    "scoring": "dependency scores and masking",
    "rl": "RL",
    **CONTROLS,
    "evaluation": "evaluation",
}
# Where they are not <phase>.steps.
STEPS_OF = {"vision_pretraining": "demo.vision_steps", **dict.fromkeys(set(CONTROLS) - {*TIMED_CONTROLS}, "rl.steps")}
PART = "seconds_"  # begins the name of a metric that is the time of a part of a step
ABOUT = (
    "Masked multimodal reinforcement pre-training: words are hidden in sentences whose attention leans on the image, "
    "and the model is rewarded for restoring them."
)
HOW_ASKED = (
    "Differences are in points; 95 % intervals are Wilson's for an accuracy and, for a difference, Agresti and Min's "
    "over the questions that both answered. Only the gap between the image and its two controls shows seeing: "
    "*blanked* is the same question over a grey picture, *another's image* over a wrong one."
)
UNSEEN = (
    f"*{SEEN_ART.capitalize()}*: without the questions for objects of the new art style. No training image shows that "
    "artwork, so chance is expected there."
)
UNSEEN_LABEL = "– of these in the new art style, whose artwork no training image shows"
MIRAGE = (
    "Mirage Score = accuracy with the image blanked / accuracy with the image: 0 where nothing is known without "
    "looking, 1 where the image adds nothing (interval: Bonett and Price's of a paired ratio)."
)
B_CLEAN = (
    "B-Clean: the questions that none of these models answers rightly with the image blanked. B-Clean share = their "
    "number / that of all questions: {}. Accuracy over them alone = right answers to them / their number:"
)
AVG = (
    "avg@{0}: mean share of right answers among {0} to each question, sampled at temperature 1; intervals are over "
    "questions:"
)


def write_report(run_dir: Path | str) -> Path:
    """Draw the plots, then write report.md (under a temporary name first) and return its path.

    Raises FileNotFoundError when run_dir is not a folder; a missing or torn file in it is reported, never raised.
    """
    run = read_run(run_dir)
    text = render(run, draw_all(run), flatten(yaml.safe_load(to_yaml(Settings()))))
    return write_bytes(run.folder / "report.md", text.encode())


def render(run: Run, drawn: Iterable[str], defaults: Mapping[str, Any]) -> str:
    """The report as Markdown; `drawn` names the plots in plots/, `defaults` are flat settings to compare with."""
    numbers = numbers_of(run)
    changed = changed_settings(run.settings, defaults)
    settings = table(["setting", "this run", "default"], [[code(part) for part in row] for row in changed])
    undrawn = (f"no data for the plot {code(name)}" for name in PLOTS if name not in drawn)
    sections = {
        f"# Run {code(run.settings.get('name') or run.folder.resolve().name)}": [ABOUT, *_summary(run, numbers)],
        "## Promises": [] if any(name not in MAY_DIFFER for name, *_ in changed) else [_promises(numbers)],
        "## Held-out accuracy": accuracies(run, numbers),
        "## Held-out questions": held_out_examples(run),
        "## Training examples": training_examples(run),
        "## Plots": [f"![{name.replace('_', ' ')}](plots/{name}.png)\n\n{PLOTS[name][1]}" for name in drawn],
        "## Settings that differ from the default": [settings if changed else "Every setting is at its default."],
        "## Environment": [table(["", ""], [[code(key), escape(value)] for key, value in run.environment.items()])],
        "## What is missing": ["\n".join(f"- {problem}" for problem in (*run.problems, *undrawn))],
    }
    filled = {title: [part for part in parts if part] for title, parts in sections.items()}
    return "\n\n".join(part for title, parts in filled.items() if parts for part in (title, *parts)) + "\n"


def accuracy_table(sets: Iterable[str], subjects: Mapping[str, str], cell: Callable[[str], str]) -> str:
    """Held-out sets by subjects in rows, conditions in columns. `subjects`: "accuracy/<model>" or "change/<comparison>"
    with its label; `cell` gives the text of a number of `numbers_of` by its name, "" where there is none.
    """
    rows = []
    for name in sets:
        for subject, label in subjects.items():
            cells = [cell(f"{subject}/{name}/{column}") for column in COLUMNS]
            if any(cells):
                rows.append([SETS.get(name, name), label, *(text or "–" for text in cells)])
    return table(["held-out set", "", *COLUMNS.values()], rows, right=range(2, 2 + len(COLUMNS))) if rows else ""


def format_of(name: str) -> Callable[[float], str]:
    """How a number of an accuracy table is written: rates in per cent, differences in signed points."""
    rate = name.removeprefix("sampled/").removeprefix("b_clean/").startswith("accuracy/")
    return percent if rate and not name.endswith("/gap") else points


def _summary(run: Run, numbers: Numbers) -> list[str]:
    """How far the run came, its headline numbers with their intervals, its phases, what masking decided."""
    found = headline(run, numbers)
    return [
        "The run is finished." if run.evaluation else "**The run is not finished**: `--resume` goes on with it.",
        *([found, *_how_measured(run)] if found else []),
        _validation(run),
        _phases(run),
        _masking(run, numbers),
    ]


def headline(run: Run, numbers: Numbers, comparisons: Comparisons = COMPARISONS) -> str:
    """Every model and comparison over all sets, a Markdown table; "" before the evaluation."""
    told = accuracy_table(POOLS, _subjects(run, comparisons), lambda name: _cell(numbers, name))
    for model in _models(run):
        if f"{model}/{SEEN_ART}/image" in numbers:
            return f"{told}\n\n{UNSEEN}"
    return told


def _subjects(run: Run, comparisons: Comparisons, prefix: str = "") -> dict[str, str]:
    subjects = _models(run) | {f"change/{one} - {other}": f"**{label}**" for (one, other), label in comparisons.items()}
    return {f"{prefix}{subject}": label for subject, label in subjects.items()}


def _how_measured(run: Run) -> list[str]:
    """How to read the headline, and what each control has and lacks where there are others than the default one."""
    trained = [name for name in in_order(CONTROLS, run.evaluation, "model") if name in CONTROLS]
    if not {*trained} - {"control"}:
        return [f"{HOW_ASKED} Control: {CONTROL}."]
    return [HOW_ASKED, "\n".join(f"- **{CONTROLS[name]}**: {ABOUT_CONTROLS[name]}" for name in trained)]


def _validation(run: Run) -> str:
    """Accuracy on the pairs for validation at the best step of RL and at the last; "" where it was not measured."""
    rows = run.metrics.get("validation")
    if not rows:
        return ""
    lines = []
    for label, row in (("best", max(rows, key=lambda row: row["image"])), ("last", rows[-1])):
        count = row["count"]
        intervals = {name: wilson_interval(round(row[name] * count), count) for name in CONDITIONS}
        cells = [percent(row[name]) + interval_of(intervals[name], percent).replace(" %", "") for name in CONDITIONS]
        lines.append([f"{label}: after step {row['step'] + 1}", *cells, points(row["image"] - row["swapped"])])
    header = [f"validation, {rows[-1]['count']:,} questions", *COLUMNS.values()]
    return (
        table(header, lines, right=range(1, 1 + len(COLUMNS))) + "\n\nThe best weights, `checkpoints/rl-best`, were "
        "chosen by these questions, which flatters them here; the held-out sets are asked of the last weights."
    )


def _models(run: Run) -> dict[str, str]:
    return {f"accuracy/{name}": MODELS.get(name, escape(name)) for name in in_order(MODELS, run.evaluation, "model")}


def _cell(numbers: Numbers, name: str) -> str:
    if name not in numbers:
        return ""
    return _rate(numbers[name], format_of(name))


def _rate(found: Estimate, show: Callable[[float], str] = percent) -> str:
    return show(found.value) + interval_of(found.interval, show).replace(" %", "")


def _phases(run: Run) -> str:
    """Steps and time of each phase that has begun."""
    rows = []
    for phase, label in PHASE_NAMES.items():
        steps, planned = run.metrics.get(phase), run.settings.get(STEPS_OF.get(phase, f"{phase}.steps"))
        if steps or (phase in run.seconds and planned != 0):
            done = steps[-1]["step"] + 1 if steps else 0 if planned else ""  # 0 also where no step had a signal
            said = f"{done} of {planned}" if planned else str(done)
            rows.append([label, said, duration(run.seconds.get(phase, math.nan))])
        rows += [[f"– {part}", "", duration(seconds)] for part, seconds in _parts(run, phase).items()]
    rows.append(["**all**", "", f"**{duration(sum(run.seconds.values()))}**"])
    return table(["phase", "steps", "time"], rows, right=(1, 2)) if len(rows) > 1 else ""


def _parts(run: Run, phase: str) -> dict[str, float]:
    """Seconds of each part of the phase's steps, where its rows tell them."""
    keys = sorted({key for row in run.metrics.get(phase, []) for key in row if key.startswith(PART)})
    return {key.removeprefix(PART): float(np.nansum(run.values(phase, key))) for key in keys}


def _masking(run: Run, numbers: Numbers) -> str:
    """What masking decided, and how that stands to the truth, where the pairs bring one."""
    if not run.masking:
        return ""
    sentences, dependent, samples, share = (
        number(run.masking, key) for key in ("sentences", "dependent", "samples", "samples_needing_image")
    )
    aucs = [numbers.get(name) for name in ("dependency_auc", "token_auc")]
    told = [f"{auc.value:.3f}{interval_of(auc.interval, '{:.3f}'.format)}" if auc else "not known" for auc in aucs]
    warning = f" **{escape(run.masking['warning'])}**" if run.masking.get("warning") else ""
    return (
        f"Masking: {dependent:,.0f} of {sentences:,.0f} sentences reach the threshold "
        f"{figure(number(run.masking, 'threshold'))} ({code(run.masking.get('method'))}).{warning} AUC of their scores "
        f"for sentences that need the image: {told[0]}. AUC of the scores of tokens for words that need it: {told[1]}. "
        f"Of the {samples:,.0f} hidden spans, only the image tells: "
        f"{'not known' if math.isnan(share) else percent(share)}."
    )


def _promises(numbers: Numbers) -> str:
    rows = []
    for promise in PROMISES:
        if found := numbers.get(promise.number):
            verdict = "kept" if promise.kept(found.value) else "not kept"
            if found.interval and found.interval.low < promise.bound <= found.interval.high:
                verdict += " (interval reaches across)"
            measured = promise.show(found.value) + interval_of(found.interval, promise.show)
        else:
            measured, verdict = "–", "not measured"
        rows.append([promise.name, measured, promise.wanted, verdict])
    return table(["promise of the default run", "measured", "wanted", ""], rows, right=(1,))


def accuracies(run: Run, numbers: Numbers, comparisons: Comparisons = COMPARISONS) -> list[str]:
    """Markdown blocks: set by set, where there are several, kind by kind, Mirage Score, B-Clean, avg@k."""
    sets, models = in_order(SETS, run.evaluation, "set"), _models(run)
    parts = [accuracy_table(sets, models, lambda name: _cell(numbers, name))] if len(sets) > 1 else []
    return [*parts, *_kinds(run, numbers), *_mirage(run, numbers), *_rates(run, numbers, comparisons)]


def _kinds(run: Run, numbers: Numbers) -> list[str]:
    """Accuracies by the kind of the hidden word."""
    models, rows = _models(run), []
    for kind in sorted({kind for row in run.evaluation for kind in row.get("by_kind") or {}}):
        places = {ALL_SETS: escape(kind)} | ({UNSEEN_ART[0]: UNSEEN_LABEL} if kind == UNSEEN_ART[1] else {})
        for place, label in places.items():
            cells = {m: [numbers.get(f"{m}/{place}/{condition}/{kind}") for condition in CONDITIONS] for m in models}
            count = max((cell.count for found in cells.values() for cell in found if cell), default=0)
            if count:
                shown = (" / ".join(f"{100 * c.value:.0f}" if c else "–" for c in found) for found in cells.values())
                rows.append([label, f"{count:,}", *shown])
    header = ["hidden word", "questions", *models.values()]
    told = f"By the kind of the hidden word, over all sets, % {' / '.join(CONDITIONS.values())}:"
    return [told, table(header, rows, right=range(1, len(header)))] if rows else []


def _mirage(run: Run, numbers: Numbers) -> list[str]:
    """Mirage Scores over all sets."""
    rows = []
    for name, (model, label) in product(POOLS, _models(run).items()):
        if found := numbers.get(f"mirage/{model.removeprefix('accuracy/')}/{name}"):
            rows.append([name, label, f"{found.value:.2f}{interval_of(found.interval, '{:.2f}'.format)}"])
    return [MIRAGE, table(["held-out set", "", "Mirage Score"], rows, right=(2,))] if rows else []


def _rates(run: Run, numbers: Numbers, comparisons: Comparisons) -> list[str]:
    """The share of B-Clean with the accuracies over it, and avg@k, over all sets."""
    shares = {name: numbers[f"b_clean_share/{name}"] for name in POOLS if f"b_clean_share/{name}" in numbers}
    told = (f"{_rate(one)} of the {one.count:,} of {name}" for name, one in shares.items())
    sampled = next((row["sampled"] for row in run.evaluation if "sampled" in row), 0)
    parts = []
    for prefix, text in (("b_clean/", B_CLEAN.format("; ".join(told))), ("sampled/", AVG.format(sampled))):
        rates = accuracy_table(POOLS, _subjects(run, comparisons, prefix), lambda name: _cell(numbers, name))
        parts += [text, rates] if rates else []
    return parts
