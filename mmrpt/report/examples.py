"""Examples of a run as a person can follow them: picture, caption by dependency, masked caption, answers, tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmrpt.report.markdown import code, escape, figure, picture, table
from mmrpt.report.numbers import CONDITIONS, MODELS, SETS, in_order
from mmrpt.report.read import Row, Run, image_name, number, score_name

QUESTIONS_PER_SET = 2
ROLLOUTS_PER_STEP = 3
VIEWS = {"": "the picture", "_blanked": "blanked", "_perturbed": "perturbed: patches blackened"}
NEEDS_IMAGE = {True: "only the image tells", False: "the text gives it away"}


def held_out_examples(run: Run) -> list[str]:
    """Markdown blocks of the first questions of each held-out set, those whose picture was kept before the others."""
    sets: dict[str, dict[str, list[Row]]] = {}
    for row in run.answers:
        sets.setdefault(str(row.get("set")), {}).setdefault(str(row.get("example_id")), []).append(row)
    return [
        _question(run, name, example, questions[example])
        for name, questions in sets.items()
        for example in sorted(questions, key=lambda one: not _image(run, one, ""))[:QUESTIONS_PER_SET]
    ]


def _question(run: Run, name: str, example: str, rows: Sequence[Row]) -> str:
    """Pictures, masked caption, every model's answer under every condition."""
    first = rows[0]
    said = {
        (row.get("model"), row.get("condition")): row for row in rows if row.get("sample_id") == first.get("sample_id")
    }
    lines = [
        [MODELS.get(model, escape(model)), *(_answer(said.get((model, condition))) for condition in CONDITIONS)]
        for model in in_order(MODELS, rows, "model")
    ]
    parts = [
        f"### {SETS.get(name, escape(name)).capitalize()}: {code(example)}",
        _pictures(run, example, ["", "_blanked"]),
        f"> {escape(first.get('masked_caption', ''))}",
        f"Wanted: **{escape(first.get('answer', ''))}**",
        table(["model", *CONDITIONS.values()], lines),
    ]
    return "\n\n".join(parts)


def _answer(row: Row | None) -> str:
    """What stands between the answer marks (else everything), and whether it is right."""
    if row is None:
        return "–"
    completion = str(row.get("completion", ""))
    found = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    text = escape((found.group(1) if found else completion).strip()) or "(nothing)"
    return f"**{text}** ✓" if row.get("exact") else f"{text} ✗"


def _image(run: Run, example: str, suffix: str) -> str | None:
    """The path of a picture relative to the report, or None where none was kept."""
    path = f"images/{image_name(example, suffix)}"
    return path if (run.folder / path).is_file() else None


def _pictures(run: Run, example: str, views: Sequence[str]) -> str:
    there = {VIEWS[view]: path for view in views if (path := _image(run, example, view))}
    shown = [picture(path, f"{example}: {label}") for label, path in there.items()]
    return table(list(there), [shown]) if there else "(no picture of it was kept in `images/`)"


def training_examples(run: Run) -> list[str]:
    """Markdown blocks of the training examples whose rows were kept; [] when the run has none."""
    blocks = []
    for example in run.examples:
        parts = [f"### Training example {code(example)}", _pictures(run, example, list(VIEWS))]
        parts.append(_sentences(run, run.sentences.get(example, [])))
        about = [row for row in run.samples if str(row.get("example_id")) == example]
        parts.append(_rollouts(run.masked.get(example, []), about))
        blocks.append("\n\n".join(part for part in parts if part))
    return blocks


def _sentences(run: Run, rows: Sequence[Row]) -> str:
    """The caption's sentences with their scores."""
    truth = {True: "needs the image", False: "does not"}
    lines = []
    for row in rows:
        text = escape(str(row.get("text", "")).strip())
        bold = text and number(row, "score") >= number(run.masking, "threshold")
        score, needs = figure(number(row, "score")), truth.get(row.get("needs_image"), "not known")
        lines.append([score, f"**{text}**" if bold else text, needs])
    header = ["score", "sentence (bold: reaches the threshold)", "truth"]
    return f"Its sentences, with their {score_name(run)}:\n\n{table(header, lines, right=(0,))}" if lines else ""


def _rollouts(masked: Sequence[Row], samples: Sequence[Row]) -> str:
    """One masked caption of the example, what was said about it first and last, and the perception of one answer."""
    if not masked and not samples:
        return ""
    names = [row.get("sample_id") for row in samples]
    chosen = max(dict.fromkeys(names), key=names.count, default=None)
    about = [row for row in samples if row.get("sample_id") == chosen]
    target = next(iter([row for row in masked if row.get("id") == chosen] or masked or about))
    needs = NEEDS_IMAGE.get(target.get("needs_image"), "not known whether only the image tells")
    traits = ", ".join(filter(None, [escape(target.get("kind") or ""), needs]))
    text = f"> {escape(target.get('masked_caption', ''))}\n\nWanted: **{escape(target.get('answer', ''))}** ({traits})"
    if not about:
        return f"{text}. None of its rollouts is in the log."
    steps, lines = [row["step"] for row in about], []
    for step in dict.fromkeys((min(steps), max(steps))):
        different = {str(row.get("completion", "")): row for row in reversed(about) if row["step"] == step}
        for row in sorted(different.values(), key=lambda row: -number(row, "reward"))[:ROLLOUTS_PER_STEP]:
            reward, advantage = (figure(number(row, key)) for key in ("reward", "advantage"))
            lines.append([str(step), escape(row.get("completion", "")), reward, advantage])
    return (
        f"{text}\n\n{table(['step', 'completion', 'reward', 'advantage'], lines, right=(0, 2, 3))}{_kept_tokens(about)}"
    )


def _kept_tokens(about: Sequence[Row]) -> str:
    """The last answer whose token perception is there; HTML, as Markdown's stars do not close beside spaces."""
    scored = [row for row in about if row.get("tokens") and row.get("kept")]
    if not scored:
        return ""
    row = max(scored, key=lambda one: (one["step"], number(one, "reward")))
    shown = [escape(token.replace("Ġ", " ").replace("Ċ", "\n")) for token in row["tokens"]]  # of byte-level BPE
    strip = "".join(f"<b>{one}</b>" if kept else one for one, kept in zip(shown, row["kept"], strict=False))
    return f"\n\nAn answer of step {row['step']}, the most image-dependent tokens, which carry gradient, bold: {strip}"
