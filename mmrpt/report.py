"""Write runs/<name>/report.md: what the run was, what it measured, examples a person can follow, plots, settings.

    python -m mmrpt.report runs/demo

Works on a run at any point: what is not there yet is named in the last section.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmrpt.plots import PLOTS, draw_all
from mmrpt.reporting import progress, summary
from mmrpt.reporting.gallery import answers_over_time, held_out_gallery, training_gallery
from mmrpt.reporting.markdown import code
from mmrpt.reporting.measured import Evaluation, difference, read_evaluation
from mmrpt.reporting.runfiles import RunFiles, write_atomically
from mmrpt.settings import Settings

PAIRED = (
    "Intervals are 95 %: Wilson's for an accuracy, Agresti and Min's for a difference between two models' answers to "
    "the same questions."
)
UNPAIRED = (
    "Intervals are 95 %: Wilson's for an accuracy, Newcombe's for a difference, which takes the two models' answers as "
    "independent although the questions are the same (single answers are not there), and so errs on the wide side."
)
CONDITIONS = (
    "Only a gap between the image and its two controls shows seeing: *blanked* is the same question over an empty "
    "picture, *another's image* the same question over the wrong picture."
)


def write_report(run_dir: Path | str, defaults: Mapping[str, Any] | None = None) -> Path:
    """Draw the plots, then write report.md beside them (under a temporary name first) and return its path.

    `defaults`: nested settings to compare the run's with; None: those of `Settings`.
    Raises FileNotFoundError when run_dir is not a folder; a missing or torn file in it is reported, never raised.
    """
    drawn = {path.stem for path in draw_all(run_dir)}
    files = RunFiles(run_dir)
    evaluation = read_evaluation(files)
    sections = [
        _head(files, evaluation),
        _numbers(files, evaluation),
        _examples(files),
        _plots(drawn),
        "## Settings that differ from the default\n\n"
        + summary.settings_section(files, default_settings() if defaults is None else defaults),
        "## Environment\n\n" + summary.environment_section(files),
        _missing(files, evaluation, drawn),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return write_atomically(files.folder / "report.md", text.encode())


def default_settings() -> dict[str, Any]:
    return dataclasses.asdict(Settings())


def _head(files: RunFiles, evaluation: Evaluation) -> str:
    name = files.document("config.yaml").get("name") or files.folder.resolve().name
    parts = [
        f"# Run {code(name)}",
        "Masked multimodal reinforcement pre-training: words that only the picture can tell are hidden from captions, "
        "and the model is rewarded for restoring them.",
        progress.state(files, evaluation),
        summary.in_words(files, evaluation),
        summary.glance_table(evaluation),
        progress.run_table(files),
        summary.masking_words(files),
    ]
    return "\n\n".join(part for part in parts if part)


def _numbers(files: RunFiles, evaluation: Evaluation) -> str:
    change = difference(evaluation, "reinforced", "warm", "image")
    intervals = PAIRED if change is None or change.paired else UNPAIRED
    parts = ["## Promised and measured", summary.target_table(files, evaluation), intervals, summary.auc_note(files)]
    if evaluation.cells:
        parts += [
            "## Held-out accuracy",
            CONDITIONS,
            summary.accuracy_table(evaluation),
            summary.kind_table(evaluation),
        ]
    if words := summary.perception_words(files):
        parts += ["## Perception", words]
    return "\n\n".join(part for part in parts if part)


def _examples(files: RunFiles) -> str:
    parts = []
    if before_and_after := held_out_gallery(files):
        how = "The first questions of each set, not chosen by outcome. Answers are greedy; ✓ is right to the letter."
        parts += ["## Held-out questions before and after", how, *before_and_after]
    if training := training_gallery(files):
        how = "Evenly spaced among the training captions with the most to show, not chosen by outcome."
        parts += ["## Training examples", how, *training]
    if answers := answers_over_time(files):
        how = (
            "The log keeps a few rollouts a step: the best and the worst of a group, the contrast the step learns from."
        )
        parts += ["## Rollouts of the first and of the last step", how, answers]
    if not parts:
        return "## Examples\n\nNone yet: no scores, masked captions, rollouts or answers are there."
    return "\n\n".join(parts)


def _plots(drawn: set[str]) -> str:
    shown = [
        f"![{name.replace('_', ' ')}](plots/{name}.png)\n\n{plot.reading}"
        for name, plot in PLOTS.items()
        if name in drawn
    ]
    return "\n\n".join(["## Plots", *(shown or ["None yet: the run holds no data for any."])])


def _missing(files: RunFiles, evaluation: Evaluation, drawn: set[str]) -> str:
    lines = [f"- {problem}" for problem in dict.fromkeys([*files.problems, *evaluation.refused])]
    lines += [f"- plot {code(name)}: no data in {plot.needs}" for name, plot in PLOTS.items() if name not in drawn]
    return "## What is missing\n\n" + ("\n".join(lines) if lines else "Nothing: every file is there and whole.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmrpt.report", description="Write the report of a run folder.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/demo")
    run = parser.parse_args(arguments).run
    if not run.is_dir():
        parser.error(f"{run} is not a folder: pass a run folder, such as runs/demo")
    print(write_report(run))


if __name__ == "__main__":
    main()
