"""Examples of a run as a person can follow them: picture, caption by dependency, masked caption, answers, tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmrpt.reporting.markdown import bar, code, escape, figure, percent, picture, table, token_strip
from mmrpt.reporting.runfiles import Row, RunFiles, column, image_name, number

PICTURE_WIDTH = 168
ANSWERS_SHOWN = 3  # different completions per step and example
VIEWS = (("", "the picture"), ("_blanked", "blanked"), ("_perturbed", "as perception saw it, patches blackened"))


def gallery(files: RunFiles, limit: int = 4) -> list[str]:
    """Markdown blocks of up to `limit` examples; [] when the run has none.

    Not chosen by outcome: among those with the most to show (picture, answers, scores), evenly spaced in file order.
    """
    scores = _by_example(files.rows("scores.jsonl"))
    masked = _by_example(files.rows("masked.jsonl"))
    samples = _by_example(files.replayed("samples.jsonl"))
    scale = _score_scale(files)
    threshold = number(files.document("masking.json"), "threshold")
    blocks = []
    for place, example in enumerate(choose_examples(files, scores, masked, samples, limit), start=1):
        parts = [f"### Example {place}: {code(example)}", _pictures(files, example)]
        parts.append(_sentences(scores.get(example, []), scale, threshold))
        parts.append(_answers(masked.get(example, []), samples.get(example, [])))
        blocks.append("\n\n".join(part for part in parts if part))
    return blocks


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
        has_picture = (files.folder / "images" / image_name(name)).is_file()
        steps = {row["step"] for row in samples.get(name, [])}
        tiers.setdefault((has_picture, len(steps) > 1, bool(steps), name in masked), []).append(name)
    chosen: list[str] = []
    for tier in sorted(tiers, reverse=True):
        wanted = limit - len(chosen)
        members = tiers[tier]
        if wanted >= len(members):
            chosen += members
        elif wanted > 0:
            chosen += [members[i * len(members) // wanted] for i in range(wanted)]
    return chosen


def answers_over_time(files: RunFiles, limit: int = 5) -> str:
    """What the model said at the first and at the last sampled step, one rollout a caption, with rewards."""
    rows = files.replayed("samples.jsonl")
    if not rows:
        return ""
    steps = [row["step"] for row in rows]
    shown = []
    for step in dict.fromkeys((min(steps), max(steps))):
        one_each = {row.get("sample_id"): row for row in reversed(rows) if row["step"] == step}
        for row in list(one_each.values())[::-1][:limit]:
            shown.append(
                [
                    str(step),
                    escape(row.get("masked_caption", "")),
                    f"**{escape(row.get('answer', ''))}**",
                    escape(row.get("completion", "")),
                    figure(number(row, "reward")),
                ]
            )
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


def _pictures(files: RunFiles, example: str) -> str:
    there = [(image_name(example, suffix), label) for suffix, label in VIEWS]
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
        return text + ". Not sampled in a step whose completions were kept."
    steps = _steps(samples, sample_id)
    lines = [line for step in dict.fromkeys((steps[0], steps[-1])) for line in _step_answers(about, step)]
    text += "\n\n" + table(["step", "completion", "times", "reward", "advantage"], lines, right=(0, 2, 3, 4))
    return text + _perception(about)


def _steps(samples: Sequence[Row], sample_id: object) -> list[int]:
    return sorted({row["step"] for row in samples if row.get("sample_id") == sample_id})


def _step_answers(about: Sequence[Row], step: int) -> list[list[str]]:
    """The commonest completions of one step with their rewards, and a line for the rest."""
    rows = [row for row in about if row["step"] == step]
    counted = Counter(str(row.get("completion", "")) for row in rows).most_common()
    first = {str(row.get("completion", "")): row for row in reversed(rows)}
    lines = []
    for completion, times in counted[:ANSWERS_SHOWN]:
        row = first[completion]
        values = [figure(number(row, "reward")), figure(number(row, "advantage"))]
        lines.append([str(step), escape(completion), str(times), *values])
    if counted[ANSWERS_SHOWN:]:
        rest = sum(times for _, times in counted[ANSWERS_SHOWN:])
        lines.append([str(step), f"{len(counted) - ANSWERS_SHOWN} other completions", str(rest), "", ""])
    return lines


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
