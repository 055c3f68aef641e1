"""Tables and plot of an experiment's results, and the generated blocks of docs/experiments/ and README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

from mmrpt.corpus import write_text
from mmrpt.experiments.arms import Arm, Experiment
from mmrpt.experiments.numbers import Difference, Results, by_kind, difference, measured, rates, seconds
from mmrpt.experiments.plot import draw
from mmrpt.report.markdown import code, duration, escape, figure, interval_of, percent, points, table
from mmrpt.report.read import CONDITIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "experiments"
HEADS = CONDITIONS | {"gap": "gap: image − another's"}
NOT_RUN = "Not run yet."
HOW = (
    "Held-out accuracy over all sets: mean over the seeds and, in brackets, each seed. Differences are in points, "
    "paired question by question, with a 95 % interval (Agresti and Min) over the questions of all seeds together. It "
    "says how sure the difference between *these* trained models is, and does not cover how much training differs from "
    "seed to seed: for that look at the seeds' own differences in brackets."
)
OTHER_QUESTIONS = "no interval: the two were asked other questions"


def page_block(experiment: Experiment, results: Results | None, picture: str = "") -> str:
    """What stands between the markers of the experiment's page."""
    if results is None or not results["seeds"]:
        return NOT_RUN
    parts = [_made(results), _missing(experiment, results), evidence(experiment, results), HOW]
    if experiment.by_kind:
        parts.append("Accuracy by kind of the hidden word, with the image (blanked, another's), over all seeds:")
        parts.append(_kinds(experiment, results))
    parts += [_measured(experiment, results), f"![{experiment.name}]({picture})" if picture else ""]
    return "\n\n".join(part for part in parts if part)


def evidence(experiment: Experiment, results: Results) -> str:
    """The two tables that README.md may show: accuracies, and what they differ by."""
    rows = []
    for arm in _run(experiment, results):
        shown = [_rates(rates(results, arm.name, column), points if column == "gap" else percent) for column in HEADS]
        rows.append([escape(arm.name), *shown, duration(seconds(results, arm.name))])
    accuracies = table(["accuracy", *HEADS.values(), "time of its phase"], rows, range(1, 6))
    return "\n\n".join(part for part in (accuracies, _differences(experiment, results)) if part)


def _differences(experiment: Experiment, results: Results) -> str:
    pairs = [(arm.name, experiment.baseline_of(arm)) for arm in experiment.arms]
    if experiment.method:
        pairs += [(experiment.method, arm.name) for arm in experiment.arms]
    rows = []
    for one, other in dict.fromkeys([*pairs, *experiment.compared]):
        found = {column: difference(results, one, other, column) for column in HEADS if column != "swapped"}
        if one != other and all(found.values()):
            rows.append([f"{escape(one)} − {escape(other)}", *map(_change, found.values())])
    header = ["difference", *(HEADS[column] for column in HEADS if column != "swapped")]
    return table(header, rows, range(1, 4)) if rows else ""


def _change(found: Difference) -> str:
    interval = interval_of(found.interval, points) if found.interval else f" ({OTHER_QUESTIONS})"
    return f"{points(found.value)}{interval}{_each(found.by_seed, points)}"


def _rates(by_seed: Mapping[str, float], show: Callable[[float], str]) -> str:
    return f"{show(fmean(by_seed.values()))}{_each(by_seed, lambda value: show(value).removesuffix(' %'))}"


def _each(by_seed: Mapping[str, float], show: Callable[[float], str]) -> str:
    return f" [{', '.join(map(show, by_seed.values()))}]" if len(by_seed) > 1 else ""


def _kinds(experiment: Experiment, results: Results) -> str:
    arms = _run(experiment, results)
    cells = {arm.name: {one: by_kind(results, arm.name, one) for one in CONDITIONS} for arm in arms}
    counts: dict[str, set[int]] = {}
    for kind, (_, count) in (item for found in cells.values() for item in found["image"].items()):
        counts.setdefault(kind, set()).add(count)

    def cell(found: Mapping[str, Mapping[str, tuple[float, int]]], kind: str) -> str:
        shown = [f"{100 * found[one][kind][0]:.0f}" for one in CONDITIONS if kind in found[one]]
        return f"{shown[0]} ({', '.join(shown[1:])})" if shown else ""

    header = ["%", *(f"{kind}, {' or '.join(map(str, sorted(asked)))} questions" for kind, asked in counts.items())]
    rows = [[escape(name), *(cell(found, kind) for kind in counts)] for name, found in cells.items()]
    return table(header, rows, range(1, len(header)))


def _measured(experiment: Experiment, results: Results) -> str:
    """What `measure` gave: a table of the plain numbers, and one for each number that is a row."""
    found = {arm.name: measured(results, arm.name) for arm in _run(experiment, results)}
    plain = {arm: {name: one for name, one in of.items() if not isinstance(one, dict)} for arm, of in found.items()}
    rows = dict.fromkeys(name for of in found.values() for name, one in of.items() if isinstance(one, dict))
    tables = {"measured (mean over seeds)": plain}
    tables |= {name: {arm: of.get(name, {}) for arm, of in found.items()} for name in rows}
    return "\n\n".join(part for name, of_arms in tables.items() if (part := _number_table(name, of_arms)))


def _number_table(head: str, of_arms: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(name for numbers in of_arms.values() for name in numbers))
    rows = [
        [escape(arm), *(figure(numbers[name]) if name in numbers else "" for name in columns)]
        for arm, numbers in of_arms.items()
        if numbers
    ]
    return table([escape(head), *map(escape, columns)], rows, range(1, len(columns) + 1)) if rows else ""


def _run(experiment: Experiment, results: Results) -> list[Arm]:
    return [arm for arm in experiment.arms if any(arm.name in found for found in results["seeds"].values())]


def _made(results: Results) -> str:
    made, seeds = results["made"], results["seeds"]
    counts = {sum(row["count"] for row in one["rows"]) // 3 for found in seeds.values() for one in found.values()}
    questions = " or ".join(f"{count:,}" for count in sorted(counts))
    base = f" Settings of every arm: {code(' '.join(results['base']))}." if results["base"] else ""
    return (
        f"Seeds: {', '.join(seeds)}; {questions} held-out questions a seed; run {made['date']} at commit "
        f"{made['commit']} on {made['cpu']} (threads: {made['threads']}), torch {made['torch']}, transformers "
        f"{made['transformers']}.{base}"
    )


def _missing(experiment: Experiment, results: Results) -> str:
    lacking = {
        arm.name: [seed for seed, found in results["seeds"].items() if arm.name not in found] for arm in experiment.arms
    }
    lines = [f"{escape(name)} (seed {', '.join(seeds)})" for name, seeds in lacking.items() if seeds]
    return f"**Not run yet**: {'; '.join(lines)}." if lines else ""


# ------------------------------------------------------------------------------------------------ files


def write(experiment: Experiment, results: Results, folder: Path) -> list[Path]:
    """results.json, <name>.png and <name>.md, the block of the page, in `folder`."""
    picture, text = folder / f"{experiment.name}.png", page_block(experiment, results, f"{experiment.name}.png")
    data = write_text(folder / "results.json", to_text(results))
    return [data, write_text(folder / f"{experiment.name}.md", text + "\n"), draw(experiment, results, picture)]


def publish(experiment: Experiment, results: Results, root: Path = ROOT) -> list[Path]:
    """docs/experiments/<name>.json and .png, the block of the page there and, where README.md has markers of the
    experiment's name, its two tables there. Raises FileNotFoundError where there is no page."""
    pages, readme = root / "docs" / "experiments", root / "README.md"
    page = pages / f"{experiment.name}.md"
    if not page.exists():
        raise FileNotFoundError(f"{page} is not there: publish from a checkout, in which the experiment has a page.")
    picture = f"{experiment.name}.png"
    fill(page, "results", page_block(experiment, results, picture))
    done = [write_text(pages / f"{experiment.name}.json", to_text(results)), page]
    if readme.exists() and _markers(experiment.name)[0] in readme.read_text():
        fill(readme, experiment.name, f"{evidence(experiment, results)}\n\n{_made(results)} {HOW}")
        done.append(readme)
    return [*done, draw(experiment, results, pages / picture)]


def published(experiment: Experiment) -> Results | None:
    """What docs/experiments/<name>.json holds, if it is there."""
    path = PAGES / f"{experiment.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def fill(path: Path, name: str, text: str) -> None:
    """Puts `text` between <!-- name:begin --> and <!-- name:end --> of a file. Raises ValueError without the two."""
    begin, end = _markers(name)
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no {begin} followed by {end}: write the two lines where the block belongs.")
    write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def to_text(results: Results) -> str:
    """JSON, a line for each value and each list of numbers."""
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\s+([\d.,\s-]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"
