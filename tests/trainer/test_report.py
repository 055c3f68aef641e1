"""Reports of synthetic runs: numbers against an independent computation, Markdown that parses, runs cut anywhere."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from PIL import Image

from mmrpt.perturbation import blacken_patches
from mmrpt.report import page
from mmrpt.report.__main__ import main
from mmrpt.report.images import write_images
from mmrpt.report.markdown import code, escape, picture
from mmrpt.report.numbers import ABOUT_CONTROLS, CONTROL, CONTROLS
from mmrpt.report.read import changed_settings, read_run
from mmrpt.settings import CONTROL_PHASES, TIMED_CONTROLS, flatten, load_settings, save_settings
from tests.trainer.conftest import ColourPairs
from tests.trainer.run_folder import CORRECT, make_run, settings, write_lines

Z95 = statistics.NormalDist().inv_cdf(0.975)
FILES = sorted(
    [f"{name}.jsonl" for name in ("metrics", "scores", "masked", "samples", "perception", "answers")]
    + ["config.yaml", "environment.json", "evaluation.json", "masking.json", "seconds.json"]
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def written(run: Path, **changed: object) -> str:
    """The report without plots, compared with the run's own settings but for `changed`."""
    text = page.render(read_run(run), [], flatten(settings()) | changed)
    check_markdown(text)
    return text


def check_markdown(text: str) -> None:
    """Every table has as many cells in each row as in its header; what is not known is a dash."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|") and not lines[number - 1].startswith("|"):
            width, row = len(re.findall(r"(?<!\\)\|", line)), number
            assert set(lines[number + 1]) <= set("| -:"), f"no rule under the header: {line}"
            while row < len(lines) and lines[row].startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", lines[row])) == width, f"not the header's cells: {lines[row]}"
                row += 1
    assert "nan" not in re.findall(r"[a-z]+", text.lower()), "a number that is not known is a dash"


def row_of(text: str, *starts: str) -> list[str]:
    """Further cells of the one table row whose first cells are `starts`."""
    tables = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    found = [cells[len(starts) :] for cells in tables if tuple(cells[: len(starts)]) == starts]
    assert len(found) == 1, f"{len(found)} rows start with {starts}"
    return found[0]


def pooled_row(text: str, label: str) -> list[str]:
    """Of the headline's table, before those of the section on accuracy."""
    return row_of(text[: text.index("## Held-out accuracy")], "all sets", label)


def paired(differences: list[int]) -> str:
    """Agresti and Min's interval in points."""
    larger = len(differences) + 2
    mean = sum(differences) / larger
    reach = Z95 * math.sqrt(((sum(d * d for d in differences) + 1) / larger - mean**2) / larger)
    return f"({100 * (mean - reach):+.1f} to {100 * (mean + reach):+.1f})"


def pooled(model: str, condition: int) -> list[bool]:
    """Right or wrong of the 600 questions of all sets."""
    return [
        n < CORRECT[model, name][condition]
        for name in ("new_scenes", "new_combinations", "new_style")
        for n in range(200)
    ]


def test_headline_numbers_have_their_intervals_and_the_gap(run: Path) -> None:
    text = written(run)
    # 324 of 600: Wilson's interval of 0.54 as the roots of its equation.
    low, high = sorted(np.roots([1 + Z95**2 / 600, -(2 * 0.54 + Z95**2 / 600), 0.54**2]).real)
    answers = {
        (m, c): pooled(m, i) for m in ("warmup", "rl", "control") for i, c in enumerate(("image", "blanked", "swapped"))
    }
    gap = {
        m: [a - b for a, b in zip(answers[m, "image"], answers[m, "swapped"], strict=True)] for m in ("warmup", "rl")
    }
    rl = pooled_row(text, "RL")
    assert rl[0] == f"54.0 % ({100 * low:.1f} to {100 * high:.1f})"
    assert rl[3] == f"+42.0 {paired(gap['rl'])}"
    change = pooled_row(text, "**RL − warm start**")
    gained = [a - b for a, b in zip(answers["rl", "image"], answers["warmup", "image"], strict=True)]
    assert change[0] == f"+19.0 {paired(gained)}"
    assert change[3] == f"+22.0 {paired([a - b for a, b in zip(gap['rl'], gap['warmup'], strict=True)])}"
    assert pooled_row(text, "**RL − control**")[0].startswith("+11.5 (")
    assert f"Control: {CONTROL}." in text
    assert row_of(text, "new scenes", "RL")[1].startswith("26.0 % (")
    assert row_of(text, "colour") == ["300", "35 / 24 / 15", "54 / 25 / 12", "42 / 24 / 14"]


def test_state_phases_and_masking(run: Path) -> None:
    text = written(run)
    assert "The run is finished." in text
    assert "| RL | 80 of 80 | 2 min 30 s |" in text
    assert row_of(text, "**all**") == ["", "**4 min 43 s**"]
    assert "117 of 180 sentences reach the threshold 0.3 (`otsu`)." in text
    assert "AUC of their scores for sentences that need the image: 0.912 (" in text
    assert "Of the 60 hidden spans, only the image tells: 100.0 %." in text


def test_the_parts_of_a_phase_are_summed_below_it(run: Path) -> None:
    parts = {"seconds_sampling": 2.0, "seconds_update": 0.5}
    write_lines(
        run / "metrics.jsonl", [{"phase": "rl", "step": 0}, *({"phase": "rl", "step": i, **parts} for i in (1, 2))]
    )
    assert "| RL | 3 of 80 | 2 min 30 s |\n| – sampling |  | 4.0 s |\n| – update |  | 1.0 s |\n" in written(run)


def test_phases_that_were_not_asked_for_have_no_row(run: Path) -> None:
    tree = settings() | {"control": {"kinds": []}, "demo": {"vision_steps": 0}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    write_lines(run / "metrics.jsonl", [{"phase": "warmup", "step": 0, "loss": 1.0}])
    (run / "seconds.json").write_text(json.dumps({"vision_pretraining": 0.0, "warmup": 9.0, "rl": 5.0}))
    text = written(run)
    assert "| warm-up on captions | 1 of 60 | 9.0 s |\n| RL | 0 of 80 | 5.0 s |\n| **all** |" in text


def test_every_control_has_rows_and_says_what_it_has_and_lacks(run: Path) -> None:
    assert CONTROLS.keys() == ABOUT_CONTROLS.keys() == {*CONTROL_PHASES.values()}
    assert all(f"- **{label}**" not in written(run) for label in CONTROLS.values()), "of the default control a sentence"
    evaluation = json.loads((run / "evaluation.json").read_text())
    for shift, name in enumerate(list(CONTROLS)[1:], start=1):  # one question more is right from one to the next
        rows = [row for row in evaluation["rows"] if row["model"] == "control"]
        evaluation["rows"] += [row | {"model": name, "accuracy": row["accuracy"] + shift / 200} for row in rows]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    write_lines(run / "metrics.jsonl", [{"phase": name, "step": 6, "loss": 1.0} for name in CONTROLS])
    (run / "seconds.json").write_text(json.dumps({name: 30.0 for name in CONTROLS}))
    text = written(run)
    rates = text.partition("Mirage Score = ")[0]
    for shift, (name, label) in enumerate(CONTROLS.items()):
        assert row_of(rates, "all sets", label)[0].startswith(f"{100 * (255 + 3 * shift) / 600:.1f} % (")
        assert row_of(rates, "all sets", f"**RL − {label}**")[0].startswith(f"+{100 * (69 - 3 * shift) / 600:.1f}")
        assert f"- **{label}**: {ABOUT_CONTROLS[name]}" in text
        assert f"| {label} | {'7' if name in TIMED_CONTROLS else '7 of 80'} | 30 s |" in text
    assert "Control: " not in text


def test_without_all_single_answers_a_difference_has_no_interval(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    write_lines(run / "answers.jsonl", rows[1:])
    text = written(run)
    assert pooled_row(text, "**RL − warm start**")[0] == "+19.0"
    assert pooled_row(text, "**RL − control**")[0].startswith("+11.5 ("), "its answers are all there"
    write_lines(run / "answers.jsonl", [row for row in rows if row["sample_id"] != "new_scenes/0#0"])
    assert pooled_row(written(run), "**RL − control**")[0] == "+11.5", "answers of another evaluation"


def test_promises_are_those_of_the_default_run_alone(run: Path) -> None:
    assert "## Promises" not in written(run, **{"rl.steps": 170})
    text = written(run, name="demo", seed=0)
    assert row_of(text, "accuracy with image")[1:] == [">= 58.0 %", "not kept"]
    gain = row_of(text, "gap over the warm start (points)")
    assert gain[0].startswith("+22.0 (") and gain[1:] == [">= +8.0", "kept"]
    assert row_of(text, "change over the warm start, blanked (points)")[1:] == ["< +2.0", "kept"]
    assert row_of(text, "time of the whole run, on two cores") == ["4 min 43 s", "< 6 min 00 s", "kept"]


@pytest.mark.parametrize(("right", "verdict"), [(126, "kept"), (125, "not kept")])
def test_eight_points_are_eight_points(run: Path, right: int, verdict: str) -> None:
    """Although 0.63 - 0.55 is less than 0.08 in floating point."""
    rows = [
        {"model": model, "set": "new_scenes", "condition": condition, "accuracy": correct / 200, "count": 200}
        for model, correct in (("warmup", 110), ("rl", right))
        for condition, correct in (("image", correct), ("swapped", 0))
    ]
    (run / "evaluation.json").write_text(json.dumps({"rows": rows}))
    text = written(run)
    assert row_of(text, "gap over the warm start (points)")[2] == verdict
    assert row_of(text, "change over the warm start, blanked (points)") == ["–", "< +2.0", "not measured"]


def test_on_pairs_without_truth_nothing_is_claimed(run: Path) -> None:
    for name in ("scores", "masked"):
        rows = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        write_lines(run / f"{name}.jsonl", [row | {"needs_image": None, "kind": ""} for row in rows])
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"dependency_auc": None}))
    masking = json.loads((run / "masking.json").read_text()) | {"samples_needing_image": None, "warning": "One class?"}
    (run / "masking.json").write_text(json.dumps(masking))
    text = written(run)
    assert "AUC of their scores for sentences that need the image: not known." in text
    assert "hidden spans, only the image tells: not known." in text and "**One class?**" in text
    assert "Wanted: **red** (not known whether only the image tells)" in text
    assert "| needs the image |" not in text and "D_vis" not in text


def test_examples_show_scores_answers_and_kept_tokens(run: Path) -> None:
    text = written(run)
    assert "### New art style: `new_style/3`" in text, "the question whose picture was kept comes first"
    example = text[text.index("### Training example `train/0`") : text.index("### Training example `train/1`")]
    scores = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()][:3]
    for row in scores:
        (line,) = [line for line in example.splitlines() if f"| {row['score']:.3g} |" in line]
        assert ("**" + escape(row["text"]) + "**" in line) == (row["score"] >= 0.3), line
        assert ("needs the image" in line) == row["needs_image"]
    assert r"> There are three \<mask\> foxes" in example
    assert "Wanted: **red** (colour, only the image tells)" in example
    assert re.search(r"^\| 79 \| .*\| 1\.3 \| 0\.5 \|$", example, re.MULTILINE)
    assert r"bold: \<think\><b> it</b><b> is</b><b> " in example and example.count("<b>") == 4, "of eight tokens"


def test_answers_are_marked_right_or_wrong(run: Path) -> None:
    rows = [
        {"model": "warmup", "condition": "image", "completion": "no marks | here", "exact": False},
        {"model": "rl", "condition": "image", "completion": "<answer> red</answer>", "exact": True},
    ]
    common = {"set": "new_scenes", "sample_id": "a#0", "example_id": "a", "answer": "red", "masked_caption": "<mask>"}
    write_lines(run / "answers.jsonl", [row | common for row in rows])
    text = written(run)
    question = text[text.index("### New scenes: `a`") : text.index("## Training examples")]
    assert row_of(question, "warm start") == [r"no marks \| here ✗", "–", "–"]
    assert row_of(question, "RL") == ["**red** ✓", "–", "–"]


def test_only_settings_that_differ_are_listed(run: Path) -> None:
    text = written(run, **{"rl.steps": 100})
    section = text[text.index("## Settings that differ") : text.index("## Environment")]
    assert section.count("\n| `") == 1 and row_of(section, "`rl.steps`") == ["`80`", "`100`"]
    assert "Every setting is at its default." in written(run)
    ours, theirs = {"same": [1], "lr": 0.1, "new": 1}, {"same": [1], "lr": 0.2, "old": {}}
    assert changed_settings(ours, theirs) == [("lr", 0.1, 0.2), ("new", 1, "(not set)"), ("old", "(not set)", {})]


def test_a_whole_report_links_its_files_and_compares_with_the_trainers_defaults(run: Path, capsys) -> None:
    save_settings(load_settings(overrides=["rl.steps=7", "name=mine"]), run / "config.yaml")
    main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.md")
    text = (run / "report.md").read_text(encoding="utf-8")
    check_markdown(text)
    section = text[text.index("## Settings that differ") : text.index("## Environment")]
    assert section.count("\n| `") == 2 and row_of(section, "`rl.steps`")[0] == "`7`"
    links = re.findall(r'!\[[^\]]*\]\(([^)]+)\)|<img src="([^"]+)"', text)
    paths = [unquote(one or other) for one, other in links]
    assert len([path for path in paths if path.startswith("plots/")]) == len(page.PLOTS)
    assert len([path for path in paths if path.startswith("images/")]) == 3 * 3 + 3
    assert not [path for path in paths if not (run / path).is_file()]
    assert "## What is missing" not in text
    with pytest.raises(SystemExit):
        main([str(run / "nowhere")])
    assert "pass a run folder" in capsys.readouterr().err


def test_a_run_stopped_in_its_warm_up_says_so(run: Path) -> None:
    for name in FILES:
        if name not in ("metrics.jsonl", "config.yaml", "environment.json"):
            (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()[:20]
    (run / "metrics.jsonl").write_text("\n".join(lines)[:-7])
    text = written(run)
    assert "**The run is not finished**" in text
    assert row_of(text, "warm-up on captions") == ["19 of 60", "–"]
    assert "`metrics.jsonl` line 20 is cut short" in text
    assert "- `evaluation.json` is not there" in text and "- no data for the plot `reward`" in text


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_missing(run: Path, name: str) -> None:
    (run / name).unlink()
    assert f"`{name}` is not there" in written(run)


def test_a_run_may_be_cut_at_any_byte(run: Path) -> None:
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


def test_rows_that_make_no_sense_are_named_not_fatal(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[1, 2]\n{"phase": "rl"}\nnot json\n')
    text = written(run)
    assert "`metrics.jsonl` line 221 is" in text and "`metrics.jsonl` line 223 is" in text
    assert "line 222" not in text and "| control | 80 of 80 | 40 s |" in text


def test_the_old_report_stays_until_the_new_one_is_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "draw_all", lambda run: [])
    before = page.write_report(run).read_text()
    monkeypatch.setattr("mmrpt.run_folder.os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk")))
    (run / "masking.json").unlink()
    with pytest.raises(OSError, match="disk"):
        page.write_report(run)
    assert (run / "report.md").read_text() == before


def test_text_of_a_run_cannot_break_the_page(run: Path) -> None:
    nasty = "a | b\n# head <b> `code` [link](x) $1$ *s* _u_ ~~x~~ &lt; \\"
    for name in ("masked", "samples", "answers"):
        rows = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        write_lines(run / f"{name}.jsonl", [row | {"masked_caption": nasty, "completion": nasty} for row in rows])
    assert "\n# head" not in written(run)
    assert escape(nasty) == (r"a \| b ⏎ \# head \<b\> \`code\` \[link\](x) \$1\$ \*s\* \_u\_ \~\~x\~\~ \&lt; " + "\\\\")
    assert code("a`b|c") == "`a'b¦c`" and code("") == ""
    assert picture('images/a "b#1.png', 'x "y" | z') == (
        '<img src="images/a%20%22b%231.png" width="168" alt="x &quot;y&quot; &#124; z">'
    )


def test_pictures_are_small(tmp_path: Path) -> None:
    class Large(ColourPairs):
        def image(self, example_id: str) -> Image.Image:
            return super().image(example_id).resize((1200, 600))

    def perturbed(image: Image.Image, seed: int) -> Image.Image:
        return blacken_patches(image, seed=seed, patch_size=100)

    train, held_out = Large(), Large(name="held")
    write_lines(tmp_path / "samples.jsonl", [{"step": n, "example_id": train[n].id} for n in range(8)])
    answers = [{"set": "held_out", "example_id": held_out[n].id} for n in range(8)]
    write_lines(tmp_path / "answers.jsonl", answers)
    write_images(tmp_path, train, {"held_out": held_out}, perturbed)
    names = {path.name for path in (tmp_path / "images").iterdir()}
    wanted = [train[n].id for n in range(2, 8)] + [held_out[n].id for n in range(6)]
    suffixes = ("", "_blanked", "_perturbed")
    assert names == {f"{one.replace('/', '_')}{suffix}.png" for one in wanted for suffix in suffixes}
    for name in names:
        with Image.open(tmp_path / "images" / name) as image:
            assert image.size == (256, 128)
    stem = tmp_path / "images" / wanted[0].replace("/", "_")
    plain, patched = (np.asarray(Image.open(f"{stem}{one}.png")).mean(-1) for one in ("", "_perturbed"))
    assert 0.2 < (patched < 10).mean() < 0.8 and (plain > 10).all()
