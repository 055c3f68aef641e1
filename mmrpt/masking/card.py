"""The data card of a masked corpus: card.md, and card.html, one offline page with pictures."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from mmrpt.corpus import iter_jsonl, write_text
from mmrpt.masking.select import MASKED, SUMMARY
from mmrpt.settings import Settings
from mmrpt.types import MaskedSample, PairSource

EXAMPLES = 12
COMMON_ANSWERS = 20
ANSWERS_COUNTED = 100_000
THUMBNAIL = 256  # pixels of the longer side
CARD, PAGE = "card.md", "card.html"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
td:last-child { text-align: right; } .warning { background: #fff3cd; padding: .5rem 1rem; }
.example { display: flex; gap: 1rem; margin: 1rem 0; } .example img { max-width: 256px; align-self: flex-start; }
mark { background: #ffd54a; } small { color: #666; }
"""


def write_card(folder: Path, source: PairSource, settings: Settings) -> Path:
    """Writes both cards from the files of the run and returns the page's path."""
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    counts = _counts(summary, settings)
    answers = _common_answers(folder)
    examples = list(_examples(folder, summary["samples"]))
    write_text(folder / CARD, _markdown(summary, counts, answers, examples, settings))
    write_text(folder / PAGE, _page(summary, counts, answers, examples, (source, settings)))
    return folder / PAGE


def _counts(summary: dict[str, Any], settings: Settings) -> list[tuple[str, str]]:
    options = settings.masking
    threshold = summary["threshold"]
    rows = [
        ("captions", f"{summary['captions']:,}"),
        *((f"rows rejected: {kind}", f"{count:,}") for kind, count in summary["rejected"].items()),
        ("sentences", f"{summary['sentences']:,}"),
        ("sentences without a letter, left out", f"{summary['without_letters']:,}"),
        ("sentences that depend on the image", f"{summary['dependent']:,}"),
        ("masked samples", f"{summary['samples']:,}"),
        ("answers dropped: they stand elsewhere in the caption", f"{summary['dropped']['repeated']:,}"),
        ("answers dropped: given with the image blanked", f"{summary['dropped']['blind']:,}"),
        ("threshold rule", options.threshold),
        ("threshold", "of each caption" if threshold is None else f"{threshold:.4f}"),
        ("signal", options.signal),
        ("layers", ", ".join(map(str, options.layers))),
        ("attention row", options.attention_row),
        ("baseline", options.baseline),
        ("model", settings.model.path or "tiny model, untrained"),
    ]
    if summary["between_class_share"] is not None:
        rows.append(("variance between Otsu's two classes", f"{summary['between_class_share']:.0%}"))
    if summary["mass_rank_correlation"] is not None:
        rows.append(("rank correlation with the attention mass", f"{summary['mass_rank_correlation']:.3f}"))
    return rows


def _common_answers(folder: Path) -> list[tuple[str, int]]:
    rows = islice(iter_jsonl(folder / MASKED), ANSWERS_COUNTED)
    return Counter(row["answer"].casefold() for row in rows).most_common(COMMON_ANSWERS)


def _examples(folder: Path, count: int) -> Iterator[MaskedSample]:
    """Samples from all over the corpus."""
    wanted = {round(i * (count - 1) / max(1, EXAMPLES - 1)) for i in range(EXAMPLES)}
    for number, row in enumerate(iter_jsonl(folder / MASKED)):
        if number in wanted:
            yield MaskedSample(**row)


def _markdown(
    summary: dict[str, Any],
    counts: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, int]],
    examples: Sequence[MaskedSample],
    settings: Settings,
) -> str:
    lines = [f"# Masked captions: {settings.name}", ""]
    if summary["warning"]:
        lines += [f"> Warning: {summary['warning']}", ""]
    lines += ["| | |", "|---|---:|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in counts)]
    lines += ["", f"Commonest answers: {', '.join(f'{_cell(a)} ({n})' for a, n in answers)}.", ""]
    lines += ["| masked caption | answer | score |", "|---|---|---:|"]
    lines += [f"| {_cell(s.masked_caption)} | {_cell(s.answer)} | {s.sentence_score:.3f} |" for s in examples]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _page(
    summary: dict[str, Any],
    counts: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, int]],
    examples: Sequence[MaskedSample],
    corpus: tuple[PairSource, Settings],
) -> str:
    source, settings = corpus
    title = f"Masked captions: {escape(settings.name)}"
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in counts)
    warning = f'<p class="warning">{escape(summary["warning"])}</p>' if summary["warning"] else ""
    common = ", ".join(f"{escape(answer)} ({count})" for answer, count in answers)
    shown = "".join(_example(sample, source, settings.prompts.mask) for sample in examples)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{warning}<table>{rows}</table><h2>Scores of sentences</h2>"
        f"{_histogram(summary['histogram'], summary['threshold'])}<h2>Commonest answers</h2><p>{common}</p>"
        f"<h2>Examples</h2>{shown}</body></html>\n"
    )


def _example(sample: MaskedSample, source: PairSource, mask: str) -> str:
    image = source.image(sample.example_id).copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    before, after = sample.masked_caption[: sample.start], sample.masked_caption[sample.start + len(mask) :]
    return (
        f'<div class="example"><img alt="" src="data:image/jpeg;base64,{data}"><p>{escape(before)}'
        f"<mark>{escape(sample.answer)}</mark>{escape(after)}<br><small>{escape(sample.id)}, score of its sentence "
        f"{sample.sentence_score:.3f}</small></p></div>"
    )


def _histogram(histogram: dict[str, list[float]], threshold: float | None) -> str:
    """An inline SVG; sentences right of the line were masked."""
    edges, counts = histogram["edges"], histogram["counts"]
    width, height, low, high = 640, 180, edges[0], edges[-1]
    scale = width / ((high - low) or 1.0)
    top = max(counts) or 1
    bars = "".join(
        f'<rect x="{(a - low) * scale:.1f}" y="{height * (1 - n / top):.1f}" height="{height * n / top:.1f}" '
        f'width="{max(0.5, (b - a) * scale - 1):.1f}" fill="#4a7ebb"><title>{n} from {a:.4f}</title></rect>'
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
    )
    line = ""
    if threshold is not None:
        x = (min(max(threshold, low), high) - low) * scale
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#c33" stroke-dasharray="4"/>'
    below = f'y="{height + 16}"'
    ends = f'<text {below}>{low:.3f}</text><text x="{width}" {below} text-anchor="end">{high:.3f}</text>'
    return f'<svg viewBox="0 0 {width} {height + 24}" width="{width}" font-size="12">{bars}{line}{ends}</svg>'
