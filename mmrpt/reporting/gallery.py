"""Examples of a run as a person can follow them: picture, caption by dependency, masked caption, answers, tokens."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmrpt.reporting.markdown import bar, code, escape, figure, percent, picture, table, token_strip
from mmrpt.reporting.measured import CONDITIONS, MODELS, SETS
from mmrpt.reporting.runfiles import Row, RunFiles, column, image_name, number

PICTURE_WIDTH = 168
ANSWERS_SHOWN = 3  # different rollouts per step and example
VIEWS = (("", "the picture"), ("_blanked", "blanked"), ("_perturbed", "as perception saw it, patches blackened"))


def training_gallery(files: RunFiles, limit: int = 3) -> list[str]:
    """Markdown blocks of up to `limit` training examples; [] when the run has none.

    Not chosen by outcome: among those with the most to show (picture, answers, scores), evenly spaced in file order.
    """
    scores = _by_example(files.rows("scores.jsonl"))
    masked = _by_example(files.rows("masked.jsonl"))
    samples = _by_example(files.replayed("samples.jsonl"))
    scale = _score_scale(files)
    threshold = number(files.document("masking.json"), "threshold")
    blocks = []
    for place, example in enumerate(choose_examples(files, scores, masked, samples, limit), start=1):
        parts = [f"### Example {place}: {code(example)}", _pictures(files, example, VIEWS)]
        parts.append(_sentences(scores.get(example, []), scale, threshold))
        parts.append(_answers(masked.get(example, []), samples.get(example, [])))
        blocks.append("\n\n".join(part for part in parts if part))
    return blocks


def held_out_gallery(files: RunFiles, per_set: int = 2) -> list[str]:
    """Markdown blocks of the first questions of each held-out set, those whose picture was kept before the others."""
    by_set: dict[str, dict[str, list[Row]]] = {}
    for row in files.rows("answers.jsonl"):
        by_set.setdefault(str(row.get("set")), {}).setdefault(str(row.get("sample_id")), []).append(row)
    blocks = []
    for name, questions in by_set.items():
        shown: dict[str, list[Row]] = {}
        for rows in sorted(
            questions.values(), key=lambda rows: not _has_picture(files, str(rows[0].get("example_id")))
        ):
            shown.setdefault(str(rows[0].get("example_id")), rows)
            if len(shown) == per_set:
                break
        blocks += [_question(files, SETS.get(name, name), example, rows) for example, rows in shown.items()]
    return blocks


def _question(files: RunFiles, set_name: str, example: str, rows: Sequence[Row]) -> str:
    """One question: pictures, masked caption, every model's answer under every condition, thoughts with the image."""
    said = {(str(row.get("model")), str(row.get("condition"))): row for row in rows}
    models = [model for model in MODELS if any(key[0] == model for key in said)]
    lines = [[MODELS[model], *(_answer(said.get((model, condition))) for condition in CONDITIONS)] for model in models]
    parts = [
        f"### {set_name.capitalize()}: {code(example)}",
        _pictures(files, example, VIEWS[:2]),
        f"> {escape(rows[0].get('masked_caption', ''))}",
        f"Wanted: **{escape(rows[0].get('answer', ''))}**",
        table(["model", *CONDITIONS.values()], lines),
    ]
    for model in ("warm", "reinforced"):
        if (model, "image") in said:
            parts.append(
                f"{MODELS[model].capitalize()}, with the image: {escape(said[model, 'image'].get('completion', ''))}"
            )
    return "\n\n".join(parts)


def _answer(row: Row | None) -> str:
    """What stands between the answer marks (else everything), and whether it is right."""
    if row is None:
        return "–"
    completion = str(row.get("completion", ""))
    found = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    text = escape((found.group(1) if found else completion).strip()) or "(nothing)"
    return f"**{text}** ✓" if row.get("exact") else f"{text} ✗"


def _has_picture(files: RunFiles, example: str) -> bool:
    return (files.folder / "images" / image_name(example)).is_file()


def choose_examples(
    files: RunFiles,
    scores: dict[str, list[Row]],
    masked: dict[str, list[Row]],
    samples: dict[str, list[Row]],
    limit: int,
) -> list[str]:
    """Up to `limit` example ids: the richest tier first, within a tier evenly spaced in file order."""
    names = list(dict.fromkeys([*samples, *masked, *scores]))
    tiers: dict[tuple[bool, bool, bool, bool], list[str]] = {}
    for name in names:
        steps = {row["step"] for row in samples.get(name, [])}
        tiers.setdefault((_has_picture(files, name), len(steps) > 1, bool(steps), name in masked), []).append(name)
    chosen: list[str] = []
    for tier in sorted(tiers, reverse=True):
        wanted = limit - len(chosen)
        members = tiers[tier]
        if wanted >= len(members):
            chosen += members
        elif wanted > 0:
            chosen += [members[i * len(members) // wanted] for i in range(wanted)]
    return chosen


def answers_over_time(files: RunFiles, limit: int = 6) -> str:
    """The kept rollouts of the first and of the last sampled step, with rewards."""
    rows = files.replayed("samples.jsonl")
    if not rows:
        return ""
    shown = []
    for step in dict.fromkeys((rows[0]["step"], rows[-1]["step"])):
        for row in [one for one in rows if one["step"] == step][:limit]:
            values = [escape(row.get("masked_caption", "")), f"**{escape(row.get('answer', ''))}**"]
            values += [escape(row.get("completion", "")), figure(number(row, "reward"))]
            shown.append([str(step), *values])
    return table(["step", "masked caption", "wanted", "completion", "reward"], shown, right=(0, 4))


def _by_example(rows: Sequence[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("example_id"):
            grouped.setdefault(str(row["example_id"]), []).append(row)
    return grouped


def _score_scale(files: RunFiles) -> tuple[float, float]:
    """What the lowest and the highest bar of a sentence mean: the 2nd and 98th percentile of all scores."""
    scores = column(files.rows("scores.jsonl"), "score")
    scores = scores[np.isfinite(scores)]
    return tuple(np.quantile(scores, [0.02, 0.98]).tolist()) if scores.size else (0.0, 1.0)


def _pictures(files: RunFiles, example: str, views: Sequence[tuple[str, str]]) -> str:
    there = [(image_name(example, suffix), label) for suffix, label in views]
    there = [(name, label) for name, label in there if (files.folder / "images" / name).is_file()]
    if not there:
        return "(no picture of it was kept in `images/`)"
    pictures = [picture(f"images/{name}", f"{example}: {label}", PICTURE_WIDTH) for name, label in there]
    return table([label for _, label in there], [pictures])


def _sentences(rows: Sequence[Row], scale: tuple[float, float], threshold: float) -> str:
    """The caption's sentences with their scores, and the tokens of the highest one with their visual mass."""
    if not rows:
        return ""
    rows = list({row.get("sentence", place): row for place, row in enumerate(rows)}.values())
    rows.sort(key=lambda row: number(row, "start"))
    lines = []
    for row in rows:
        score = number(row, "score")
        text = escape(sentence_text(row))
        truth = {True: "needs the image", False: "does not"}.get(row.get("needs_image"), "–")
        dependent = math.isfinite(threshold) and score >= threshold
        lines.append([bar(score, *scale), figure(score), f"**{text}**" if dependent and text else text, truth])
    header = f"sentence (bold: at least the threshold {figure(threshold)})" if math.isfinite(threshold) else "sentence"
    text = "Caption, with how much attention says that each sentence leans on the image:\n\n"
    text += table(["", "D_vis", header, "in truth"], lines, right=(1,))
    highest = max(rows, key=lambda row: number(row, "score") if math.isfinite(number(row, "score")) else -math.inf)
    tokens = sentence_tokens(highest)
    if tokens:
        strip = token_strip(tokens, highest["token_masses"])
        text += f"\n\nVisual mass of the tokens of the highest sentence: {strip}"
    return text


def sentence_text(row: Row) -> str:
    """The sentence of a scores.jsonl row, whether "text" holds the sentence or the whole caption; "" without it."""
    text, start, end = str(row.get("text", "")), row.get("start"), row.get("end")
    if isinstance(start, int) and isinstance(end, int) and len(text) >= end and len(text) != end - start:
        text = text[start:end]
    return text.strip()


def sentence_tokens(row: Row) -> list[str]:
    """The text of each token of a scores.jsonl row by its span; [] where spans or masses are missing.

    A gap before a token's span becomes part of it, so that words stay apart where spans leave spaces out.
    """
    text, start, end = str(row.get("text", "")), row.get("start"), row.get("end")
    spans, masses = row.get("token_spans") or [], row.get("token_masses") or []
    if not text or not isinstance(start, int) or not isinstance(end, int) or len(spans) != len(masses):
        return []
    shift = start if len(text) == end - start else 0
    ends = [start, *(high for _, high in spans[:-1])]
    return [
        text[max(0, min(low, before) - shift) : max(0, high - shift)]
        for before, (low, high) in zip(ends, spans, strict=True)
    ]


def _answers(masked: Sequence[Row], samples: Sequence[Row]) -> str:
    """One masked caption of the example, what was said about it first and last, and the perception of one answer."""
    if not masked and not samples:
        return ""
    sampled = Counter(row.get("sample_id") for row in samples)
    sample_id = max(sampled, key=lambda name: (len(_steps(samples, name)), sampled[name])) if sampled else None
    about = [row for row in samples if row.get("sample_id") == sample_id]
    known = [row for row in masked if row.get("id") == sample_id] or list(masked) or about
    target = known[0]
    traits = [str(target["kind"])] if target.get("kind") else []
    if isinstance(target.get("needs_image"), bool):
        traits.append("only the image tells" if target["needs_image"] else "the text gives it away")
    wanted = f"**{escape(target.get('answer', ''))}**" + (f" ({', '.join(traits)})" if traits else "")
    text = f"> {escape(target.get('masked_caption', ''))}\n\nWanted: {wanted}"
    if not about:
        return text + ". None of its rollouts is in the log."
    steps = _steps(samples, sample_id)
    lines = [line for step in dict.fromkeys((steps[0], steps[-1])) for line in _step_answers(about, step)]
    text += "\n\n" + table(["step", "completion", "reward", "advantage"], lines, right=(0, 2, 3))
    return text + _perception(about)


def _steps(samples: Sequence[Row], sample_id: object) -> list[int]:
    return sorted({row["step"] for row in samples if row.get("sample_id") == sample_id})


def _step_answers(about: Sequence[Row], step: int) -> list[list[str]]:
    """The kept rollouts of one step, different ones, best first."""
    rows = {str(row.get("completion", "")): row for row in reversed(about) if row["step"] == step}
    best_first = sorted(rows.items(), key=lambda item: -number(item[1], "reward"))
    return [
        [str(step), escape(completion), figure(number(row, "reward")), figure(number(row, "advantage"))]
        for completion, row in best_first[:ANSWERS_SHOWN]
    ]


def _perception(about: Sequence[Row]) -> str:
    """The last answer that has token perception, as a strip on a logarithmic scale."""
    scored = [row for row in about if row.get("tokens") and row.get("perception")]
    if not scored:
        return ""
    row = max(scored, key=lambda one: (one["step"], number(one, "reward")))
    heights = [math.log10(max(float(value), 1e-6)) for value in row["perception"]]
    kept = [bool(mark) for mark in row.get("kept") or [False] * len(heights)]
    rate = sum(kept) / len(kept) if kept else math.nan
    strip = token_strip(row["tokens"], heights, kept)
    return (
        f"\n\nToken perception of an answer of step {row['step']} (bar: logarithm of the KL between picture and "
        f"perturbed picture; bold: the {percent(rate)} that carry gradient): {strip}"
    )
