"""Reports of synthetic runs: numbers against an independent computation, Markdown that parses, runs cut anywhere."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from mmrpt import report
from mmrpt.reporting.gallery import sentence_text, sentence_tokens
from mmrpt.reporting.markdown import bar, code, escape, picture, token_strip
from mmrpt.reporting.summary import changed_settings
from tests.trainer.run_folder import CAPTION, make_run, settings, write_lines

DEFAULTS = {"name": "demo", "seed": 3, "warmup": {"steps": 60}, "rl": {"steps": 100, "optimiser": {"lr": 1e-3}}}
DEFAULTS |= {"control": {"enabled": True}, "perception": {"keep_ratio": 0.4}}
FILES = sorted(
    [f"{name}.jsonl" for name in ("metrics", "scores", "masked", "samples", "perception", "answers")]
    + ["config.yaml", "environment.json", "evaluation.json", "masking.json", "seconds.json"]
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports that are about words: drawing is tested elsewhere and slow."""
    monkeypatch.setattr(report, "draw_all", lambda run_dir: [])


def written(run: Path) -> str:
    text = report.write_report(run, DEFAULTS).read_text(encoding="utf-8")
    check_markdown(text)
    return text


def check_markdown(text: str) -> None:
    """Every table has as many cells in each row as in its header; headings do not repeat."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|") and not lines[number - 1].startswith("|"):
            width, row = len(re.findall(r"(?<!\\)\|", line)), number
            assert set(lines[number + 1]) <= set("| -:"), f"no rule under the header: {line}"
            while row < len(lines) and lines[row].startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", lines[row])) == width, (
                    f"cells differ from the header's: {lines[row]}"
                )
                row += 1
    assert "nan" not in re.findall(r"[a-z]+", text.lower()), "a number that is not known is a dash"


def row_of(text: str, *starts: str) -> list[str]:
    """Cells of the one table row whose first cells are `starts`."""
    tables = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    found = [cells for cells in tables if tuple(cells[: len(starts)]) == starts]
    assert len(found) == 1, f"{len(found)} rows start with {starts}"
    return found[0]


def test_numbers_of_a_whole_run(run: Path, no_plots: None) -> None:
    text = written(run)
    assert "The run is finished." in text
    # 324 of 600 against 210: Wilson's interval of 0.54 by its closed form, computed here another way.
    z2 = 1.959963984540054**2
    low, high = sorted(np.roots([1 + z2 / 600, -(2 * 0.54 + z2 / 600), 0.54**2]).real)
    glance = text[: text.index("## Promised")]
    assert row_of(glance, "reinforced")[1] == f"54.0 % ({100 * low:.1f} to {100 * high:.1f})"
    assert row_of(text, "**all sets**", "reinforced")[2:4] == ["600", f"54.0 % ({100 * low:.1f} to {100 * high:.1f})"]
    # All 114 more right answers are gained, none lost: d = 114 / 602, variance of 114 such questions.
    middle = 114 / 602
    reach = math.sqrt(z2) * math.sqrt(115 - 114**2 / 602) / 602
    gain = row_of(text, "**Gain over the warm start, with the image, all sets**")
    assert gain[1:] == [
        "+19.0 points",
        f"{100 * (middle - reach):+.1f} to {100 * (middle + reach):+.1f}",
        ">= +10 points",
        "met",
    ]
    blanked = row_of(text, "**Change over the warm start, image blanked, all sets**")
    assert blanked[1] == "+1.0 points" and blanked[3:] == ["< +3 points", "met"]
    assert row_of(text, "**Gain over equal caption training, with the image, all sets**")[1] == "+11.5 points"
    assert row_of(text, "**Time of the whole run**")[1] == "4 min 43 s"
    assert row_of(text, "colour")[1:4] == ["300", "35.0 %", "24.0 %"]
    assert row_of(text, "reinforcement") == ["reinforcement", "80 of 80", "2 min 30 s"]
    assert "117 of 180 sentences lean on the image (65.0 %)" in text


def test_links_lead_to_files_and_plots_are_explained(run: Path) -> None:
    text = written(run)
    links = re.findall(r'!\[[^\]]*\]\(([^)]+)\)|<img src="([^"]+)"', text)
    paths = [unquote(one or other) for one, other in links]
    assert len([path for path in paths if path.startswith("plots/")]) == len(report.PLOTS)
    assert len([path for path in paths if path.startswith("images/")]) == 3 * 3 + 3
    for path in paths:
        assert (run / path).is_file(), f"{path} is linked and not there"
    assert text.rstrip().endswith("Nothing: every file is there and whole.")
    assert all(plot.reading in text for plot in report.PLOTS.values())


def test_sparseness_is_measured(run: Path, no_plots: None) -> None:
    text = written(run)
    rows = [json.loads(line) for line in (run / "perception.jsonl").read_text().splitlines()]
    scores = sorted((value for row in rows for value in row["token_scores"]), reverse=True)
    for hundredths in (1, 5, 10, 20, 40):
        share = sum(scores[: len(scores) * hundredths // 100]) / sum(scores)
        assert f"{hundredths} %: {100 * share:.1f} %" in text


def test_a_wrong_auc_is_noticed(run: Path, no_plots: None) -> None:
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    yes, no = ([row["score"] for row in rows if row["needs_image"] is side] for side in (True, False))
    auc = sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no))
    assert f"states the AUC 0.912; over the sentences of `scores.jsonl`, those the run trained on, it is {auc:.3f}" in (
        written(run)
    )
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"dependency_auc": None}))
    assert row_of(written(run), "**Dependency scores tell sentences that need the image (AUC)**")[1] == f"{auc:.3f}"


@pytest.mark.parametrize(
    ("reinforced", "gain", "verdict"),
    [(130, "+10.0 points", "met (interval reaches across)"), (129, "+9.5 points", "missed (interval reaches across)")],
)
def test_a_promise_is_kept_or_missed_by_its_own_number(
    run: Path, no_plots: None, reinforced: int, gain: str, verdict: str
) -> None:
    """Ten points are ten points although 0.65 - 0.55 is less than 0.1 in floating point."""
    rows = [
        {"model": model, "set": "new_scenes", "condition": "image", "accuracy": correct / 200, "count": 200}
        for model, correct in (("warm", 110), ("reinforced", reinforced))
    ]
    (run / "evaluation.json").write_text(json.dumps({"rows": rows}))
    text = written(run)
    target = row_of(text, "**Gain over the warm start, with the image, all sets**")
    assert (target[1], target[4]) == (gain, verdict)
    assert "Newcombe" in text, "the answers on disk are not those of these rows, so nothing is paired"
    assert row_of(text, "**Change over the warm start, image blanked, all sets**")[1:] == [
        "–",
        "",
        "< +3 points",
        "not measured",
    ]


def test_examples_show_scores_answers_and_kept_tokens(run: Path, no_plots: None) -> None:
    text = written(run)
    assert "### New art style: `new_style/3`" in text, "the question whose picture was kept comes first"
    example = text[text.index("### Example 1: `train/0`") : text.index("### Example 2")]
    scores = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()][:3]
    for row in scores:
        shown = [line for line in example.splitlines() if escape(row["text"]) in line and "D_vis" not in line]
        line = next(line for line in shown if f"| {row['score']:.3g} |" in line)
        assert ("**" + escape(row["text"]) + "**" in line) == (row["score"] >= 0.3), line
        assert ("needs the image" in line) == row["needs_image"]
    assert r"> There are three \<mask\> foxes" in example
    assert "Wanted: **red** (colour, only the image tells)" in example
    assert re.search(r"^\| 79 \| .*\| 1\.3 \| 0\.5 \|$", example, re.MULTILINE)
    assert "bold: the 50.0 % that carry gradient" in example
    strip = example[example.index("Token perception") :]
    assert "<b>it</b><sub>" in strip and "<b>\\<think\\></b>" not in strip
    assert strip.count("<b>") == 4, "four of eight tokens are kept"


def test_answers_are_marked_right_or_wrong(run: Path, no_plots: None) -> None:
    rows = [
        {"model": "warm", "condition": "image", "completion": "no marks | here", "exact": False},
        {"model": "reinforced", "condition": "image", "completion": "<answer> red</answer>", "exact": True},
    ]
    common = {"set": "new_scenes", "sample_id": "a#0", "example_id": "a", "answer": "red", "masked_caption": "<mask>"}
    write_lines(run / "answers.jsonl", [row | common for row in rows])
    text = written(run)
    question = text[text.index("### New scenes: `a`") : text.index("## Training examples")]
    assert row_of(question, "warm start") == ["warm start", r"no marks \| here ✗", "–", "–"]
    assert row_of(question, "reinforced") == ["reinforced", "**red** ✓", "–", "–"]


def test_only_settings_that_differ_are_listed(run: Path, no_plots: None) -> None:
    text = written(run)
    section = text[text.index("## Settings that differ") : text.index("## Environment")]
    assert row_of(section, "`rl.steps`") == ["`rl.steps`", "`80`", "`100`"]
    assert section.count("\n| `") == 2, "name and rl.steps"
    (run / "config.yaml").write_text(yaml.safe_dump(DEFAULTS))
    assert "Every setting is at its default." in written(run)


def test_tuples_and_lists_of_the_same_values_are_the_same_setting() -> None:
    ours = {"a": {"sizes": [1, 2], "lr": 0.1}, "new": 1}
    theirs = {"a": {"sizes": (1, 2), "lr": 0.2}, "old": {}}
    assert changed_settings(ours, theirs) == [("a.lr", 0.1, 0.2), ("new", 1, "(not set)"), ("old", "(not set)", {})]


def test_defaults_are_those_of_the_trainer(run: Path, no_plots: None) -> None:
    from mmrpt.settings import load_settings, save_settings

    save_settings(load_settings(overrides=["rl.steps=7", "name=mine"]), run / "config.yaml")
    text = report.write_report(run).read_text()
    section = text[text.index("## Settings that differ") : text.index("## Environment")]
    assert section.count("\n| `") == 2, section
    assert row_of(section, "`rl.steps`")[1] == "`7`"


def test_a_run_stopped_in_its_warm_up_says_so(run: Path) -> None:
    for name in ("scores", "masked", "samples", "perception", "answers"):
        (run / f"{name}.jsonl").unlink()
    for name in ("evaluation.json", "masking.json", "seconds.json"):
        (run / name).unlink()
    for phase in ("warmup", "rl", "control"):
        (run / "checkpoints" / phase).rmdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()[:20]
    (run / "metrics.jsonl").write_text("\n".join(lines)[:-7])
    text = written(run)
    assert "caption warm-up came to step 19 of 60" in text
    assert "`metrics.jsonl` line 20 is cut short (the run was stopped there)" in text
    assert "- `evaluation.json` is not there" in text
    assert "- plot `reward`: no data in metrics.jsonl, phase rl" in text
    assert row_of(text, "caption warm-up") == ["caption warm-up", "19 of 60", "–"]
    assert row_of(text, "**Time of the whole run**")[4] == "not measured"
    assert "![loss](plots/loss.png)" in text


def test_an_empty_folder_gets_a_report(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert "no step of training is recorded yet" in text
    assert all(f"`{name}` is not there" in text for name in FILES if name != "seconds.json")


def test_part_of_a_run_keeps_no_promise_of_time(run: Path, no_plots: None) -> None:
    (run / "evaluation.json").unlink()
    (run / "checkpoints" / "control").rmdir()
    text = written(run)
    assert row_of(text, "**Time of the whole run**")[1::3] == ["4 min 43 s so far", "not measured"]
    assert "caption-trained control came to step 80 of 80" in text


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_missing(run: Path, no_plots: None, name: str) -> None:
    (run / name).unlink()
    text = written(run)
    # evaluation.json holds the seconds too, so that seconds.json is asked for only without it.
    assert (f"`{name}` is not there" in text) == (name != "seconds.json")


def test_a_run_may_be_cut_at_any_byte(run: Path, no_plots: None) -> None:
    rng = np.random.default_rng(17)
    for name in FILES:
        whole = (run / name).read_bytes()
        for cut in rng.integers(0, len(whole), 4).tolist():
            (run / name).write_bytes(whole[:cut])
            try:
                written(run)
            except Exception as error:
                raise AssertionError(f"{name} cut at byte {cut}") from error
        (run / name).write_bytes(whole)


def test_rows_that_make_no_sense_are_named_not_fatal(run: Path, no_plots: None) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[1, 2]\n{"phase": "rl"}\nnot json\n')
    rows = [
        {"model": "warm", "set": "new_scenes", "condition": "image", "accuracy": 1.5, "count": 10},
        {"model": "warm"},
    ]
    (run / "evaluation.json").write_text(json.dumps({"rows": rows}))
    text = written(run)
    assert "`metrics.jsonl` line 221 is list, expected an object" in text
    assert "`metrics.jsonl` line 223 is not JSON" in text
    assert "row warm / new_scenes / image has no usable accuracy and count" in text


def test_the_old_report_stays_until_the_new_one_is_whole(
    run: Path, no_plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written(run)
    monkeypatch.setattr("mmrpt.reporting.runfiles.os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk")))
    (run / "masking.json").unlink()
    with pytest.raises(OSError, match="disk"):
        report.write_report(run, DEFAULTS)
    assert (run / "report.md").read_text() == before


def test_text_of_a_run_cannot_break_the_page(run: Path, no_plots: None) -> None:
    nasty = "a | b\n# head <b> `code` [link](x) $1$ *s* _u_ ~~x~~ &lt; \\"
    for name in ("masked", "samples", "answers"):
        rows = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        write_lines(run / f"{name}.jsonl", [row | {"masked_caption": nasty, "completion": nasty} for row in rows])
    text = written(run)
    assert "\n# head" not in text
    assert escape(nasty) == (r"a \| b ⏎ \# head \<b\> \`code\` \[link\](x) \$1\$ \*s\* \_u\_ \~\~x\~\~ \&lt; " + "\\\\")
    assert code("a`b|c") == "`a'b¦c`" and code("") == ""
    assert picture('images/a "b#1.png', 'x "y" | z', 9) == (
        '<img src="images/a%20%22b%231.png" width="9" alt="x &quot;y&quot; &#124; z">'
    )


def test_bars_and_strips() -> None:
    assert [bar(value, 0, 8) for value in (0, 0.99, 1, 7.99, 8, 99, -1, math.nan)] == list("▁▁▂███▁ ")
    assert bar(1.0, 1.0, 1.0) == "▁"
    strip = token_strip(["Ġred", "card", " "], [8.0, 0.0, 4.0], [True, False, False])
    assert strip == "<b>red</b><sub>█</sub>card<sub>▁</sub> ␣<sub>▅</sub>"


def test_sentences_are_cut_from_whichever_text_a_row_holds() -> None:
    caption = "".join(CAPTION)
    start, end = len(CAPTION[0]), len(CAPTION[0]) + len(CAPTION[1]) - 1
    row = {"start": start, "end": end, "token_masses": [0.1, 0.2]}
    row["token_spans"] = [[start, start + 2], [start + 3, start + 5]]
    for text in (caption, caption[start:end]):
        assert sentence_text(row | {"text": text}) == "It is a quiet day | so they say."
        assert sentence_tokens(row | {"text": text}) == ["It", " is"]
    assert sentence_text({"text": "alone"}) == "alone"
    assert sentence_tokens(row) == []


def test_command_line(
    run: Path, no_plots: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "default_settings", settings)
    report.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.md")
    with pytest.raises(SystemExit):
        report.main([str(run / "nowhere")])
    assert "pass a run folder" in capsys.readouterr().err
