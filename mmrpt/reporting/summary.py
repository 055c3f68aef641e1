"""The report's numbers in words and tables: targets, accuracies, masking, perception, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrpt.metrics import top_share
from mmrpt.reporting.markdown import code, escape, figure, percent, percent_with, table
from mmrpt.reporting.measured import (
    ALL_SETS,
    CONDITIONS,
    MODELS,
    SETS,
    Difference,
    Evaluation,
    difference,
    measured_auc,
    points,
    read_dependency,
    read_perception,
)
from mmrpt.reporting.runfiles import RunFiles, find_setting, flatten, number
from mmrpt.reporting.targets import targets

SHARES = (0.01, 0.05, 0.1, 0.2, 0.4)


def in_words(files: RunFiles, evaluation: Evaluation) -> str:
    """The result as a person would say it; each claim of seeing beside the same number blanked and swapped."""
    sentences = []
    auc, _ = measured_auc(files)
    if math.isfinite(auc):
        sentences.append(
            f"Attention alone tells sentences that need the image from those that do not with an AUC of {auc:.3f}."
        )
    sets = evaluation.sets()
    warm, after = (evaluation.pooled(model, "image", sets) for model in ("warm", "reinforced"))
    if warm and after:
        gain = difference(evaluation, "reinforced", "warm", "image")
        sentences.append(
            f"With the image, reinforcement moved held-out accuracy from {percent(warm.rate)} to {percent(after.rate)} "
            f"({points(gain.value)})."
        )
        for condition, said in (("blanked", "With the image blanked"), ("swapped", "With another's image")):
            change = difference(evaluation, "reinforced", "warm", condition)
            if change is not None:
                before, now = (evaluation.pooled(model, condition, sets) for model in ("warm", "reinforced"))
                sentences.append(f"{said}: {percent(before.rate)} to {percent(now.rate)} ({points(change.value)}).")
    control = difference(evaluation, "reinforced", "caption", "image")
    if control is not None:
        caption = evaluation.pooled("caption", "image", sets)
        sentences.append(
            f"As many steps of further caption training reach {percent(caption.rate)} with the image: reinforcement is "
            f"{abs(100 * control.value):.1f} points {'above' if control.value >= 0 else 'below'} that."
        )
    return " ".join(sentences)


def masking_words(files: RunFiles) -> str:
    """What the masking stage decided."""
    masking = files.document("masking.json")
    if not masking:
        return ""
    threshold, sentences, dependent = (number(masking, key) for key in ("threshold", "sentences", "dependent"))
    parts = [f"threshold {figure(threshold)} by {code(masking.get('method', 'unknown method'))}"]
    if sentences > 0 and math.isfinite(dependent):
        parts.append(
            f"{dependent:,.0f} of {sentences:,.0f} sentences lean on the image ({percent(dependent / sentences)})"
        )
    if rows := files.rows("masked.jsonl"):
        parts.append(f"{len(rows):,} masked captions")
        known = [row["needs_image"] for row in rows if isinstance(row.get("needs_image"), bool)]
        if known:
            parts.append(f"in truth only the image tells {percent(sum(known) / len(known))} of the masked spans")
    return "Masking: " + "; ".join(parts) + "."


def target_table(files: RunFiles, evaluation: Evaluation) -> str:
    rows = []
    for target in targets(files, evaluation):
        name = f"{target.name}, {target.where}" if target.where else target.name
        strong = "**" if target.where in ("", ALL_SETS) else ""
        rows.append([f"{strong}{name}{strong}", target.measured, target.interval, target.wanted, target.verdict])
    return table(["promise of a default run", "measured", "95 % interval", "wanted", ""], rows, right=(1, 2))


def glance_table(evaluation: Evaluation) -> str:
    """Accuracy over all sets, with the image beside blanked and swapped, and what reinforcement changed."""
    conditions, rows = evaluation.conditions(), []
    for model in evaluation.models():
        cells = [evaluation.pooled(model, condition, evaluation.sets()) for condition in conditions]
        shown = [percent_with(cell.rate, cell.interval) if cell else "–" for cell in cells]
        rows.append([MODELS.get(model, model), *shown])
    for minus in ("warm", "caption"):
        changes = [difference(evaluation, "reinforced", minus, condition) for condition in conditions]
        if any(changes):
            shown = [points_with(change) if change else "–" for change in changes]
            rows.append([f"**reinforced − {MODELS[minus]}**", *shown])
    header = ["accuracy over all held-out sets", *(CONDITIONS.get(name, name) for name in conditions)]
    return table(header, rows, right=range(1, len(header))) if rows else ""


def points_with(change: Difference) -> str:
    low, high = change.interval
    return f"{points(change.value)} ({100 * low:+.1f} to {100 * high:+.1f})"


def accuracy_table(evaluation: Evaluation) -> str:
    """Every accuracy with its interval; all sets pooled last."""
    conditions = evaluation.conditions()
    rows = []
    groups = [(SETS.get(name, name), [name]) for name in evaluation.sets()]
    if len(groups) > 1:
        groups.append((f"**{ALL_SETS}**", evaluation.sets()))
    for label, sets in groups:
        for model in evaluation.models():
            cells = [evaluation.pooled(model, condition, sets) for condition in conditions]
            if any(cells):
                count = next(cell.count for cell in cells if cell)
                shown = [percent_with(cell.rate, cell.interval) if cell else "–" for cell in cells]
                rows.append([label, MODELS.get(model, model), f"{count:,}", *shown])
    header = ["held-out set", "model", "questions", *(CONDITIONS.get(name, name) for name in conditions)]
    return table(header, rows, right=range(2, len(header)))


def kind_table(evaluation: Evaluation) -> str:
    """Accuracy by kind of the masked span over all sets, with the image and blanked; "" where kinds are unknown."""
    conditions = [name for name in ("image", "blanked") if name in evaluation.conditions()]
    columns = [(model, condition) for model in evaluation.models() for condition in conditions]
    rows = []
    for kind in evaluation.kind_names():
        cells = [evaluation.pooled_kind(model, condition, kind) for model, condition in columns]
        count = max(cell.count for cell in cells)
        rows.append([escape(kind) or "–", f"{count:,}", *(percent(cell.rate) for cell in cells)])
    header = [f"{MODELS.get(model, model)}, {CONDITIONS[condition]}" for model, condition in columns]
    return table(["masked span", "questions", *header], rows, right=range(1, len(columns) + 2)) if rows else ""


def perception_words(files: RunFiles) -> str:
    """Is token perception sparse, do trajectories differ: in numbers."""
    tokens, trajectories = read_perception(files)
    parts = []
    if tokens.size and tokens.max() > 0:
        shares = ", ".join(f"{100 * part:.0f} %: {percent(top_share(tokens, part))}" for part in SHARES)
        parts.append(f"Of the whole perception of {tokens.size:,} response tokens, the top tokens carry: {shares}.")
    if trajectories.size:
        low, middle, high = np.quantile(trajectories, [0.1, 0.5, 0.9])
        parts.append(
            f"Mean perception of {trajectories.size:,} responses: median {figure(middle)} nats, 10th percentile "
            f"{figure(low)}, 90th {figure(high)}."
        )
    return " ".join(parts)


def auc_note(files: RunFiles) -> str:
    """A line when the run's own AUC and that of its scores.jsonl differ, or when classes are unknown."""
    own = number(files.document("evaluation.json"), "dependency_auc")
    dependency = read_dependency(files)
    if math.isfinite(own) and math.isfinite(dependency.auc) and abs(own - dependency.auc) > 5e-4:
        low, high = dependency.interval
        return (
            f"`evaluation.json` states the AUC {own:.3f}; over the sentences of `scores.jsonl`, those the run trained "
            f"on, it is {dependency.auc:.3f} ({low:.3f} to {high:.3f})."
        )
    return ""


def changed_settings(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value of the run, default) of each setting that differs; tuples and lists of the same values are equal."""

    def plain(tree: Mapping[str, Any]) -> dict[str, Any]:
        return flatten(json.loads(json.dumps(tree, default=str)))

    ours, theirs = plain(config), plain(defaults)
    names = dict.fromkeys([*ours, *theirs])
    absent = "(not set)"
    pairs = [(name, ours.get(name, absent), theirs.get(name, absent)) for name in names]
    return [(name, value, default) for name, value, default in pairs if value != default]


def settings_section(files: RunFiles, defaults: Mapping[str, Any]) -> str:
    config = files.document("config.yaml")
    if not config:
        return "`config.yaml` is missing: the settings of this run are unknown."
    changed = changed_settings(config, defaults)
    if not changed:
        return "Every setting is at its default."
    rows = [[code(name), code(value), code(default)] for name, value, default in changed]
    return table(["setting", "this run", "default"], rows)


def environment_section(files: RunFiles) -> str:
    flat = flatten(files.document("environment.json"))
    seed = find_setting(files.document("config.yaml"), "seed")
    rows = [[code(name), escape(value)] for name, value in flat.items() if value is not None]
    rows += [["`seed`", escape(seed)]] if seed is not None else []
    return table(["", ""], rows) if rows else "`environment.json` is missing: versions and machine are unknown."
