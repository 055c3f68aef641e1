"""Several seeds as one result: numbers against an independent computation, refusals, files that other readers open."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import yaml
from PIL import Image

from benchmarks import report_seeds
from tests.trainer.run_folder import evaluation_rows, settings

SHIFTS = (-6, 0, 9)  # right answers of the RL model per set and condition, beside those of CORRECT


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = []
    for seed, shift in enumerate(SHIFTS):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        rows = evaluation_rows()
        for row in rows:
            row["accuracy"] += shift / 200 * (row["model"] == "rl")
        (folder / "seconds.json").write_text(json.dumps({"warmup": 60.0 + seed, "rl": 240.0}))
        (folder / "evaluation.json").write_text(json.dumps({"rows": rows, "dependency_auc": 0.84 + 0.01 * seed}))
        (folder / "config.yaml").write_text(yaml.safe_dump(settings() | {"seed": seed, "name": folder.name}))
        (folder / "environment.json").write_text(json.dumps({"commit": "abc1234", "torch": "2.13.0"}))
        folders.append(folder)
    return folders


def test_mean_and_spread_of_every_number(runs: list[Path], tmp_path: Path) -> None:
    report_seeds.main(["--out", str(tmp_path / "out" / "main_job"), *map(str, runs)])
    record = json.loads((tmp_path / "out" / "main_job.json").read_text())
    numbers = record["numbers"]
    # CORRECT: rl 324 of 600 with the image, warmup 210, control 255; blanked 150 and 144; swapped 72 and 90.
    for name, base in (
        ("accuracy/rl/all sets/image", 324),
        ("change/rl - warmup/all sets/image", 324 - 210),
        ("change/rl - control/all sets/image", 324 - 255),
        ("change/rl - warmup/all sets/blanked", 150 - 144),
        ("accuracy/rl/all sets/gap", 324 - 72),
    ):
        values = [(base + 3 * shift * (not name.endswith("gap"))) / 600 for shift in SHIFTS]
        assert numbers[name]["mean"] == pytest.approx(statistics.fmean(values)), name
        assert numbers[name]["std"] == pytest.approx(statistics.stdev(values), abs=1e-12), name
        assert (numbers[name]["low"], numbers[name]["high"]) == pytest.approx((min(values), max(values))), name
        assert numbers[name]["count"] == 3
    assert numbers["accuracy/warmup/new_style/swapped"] == pytest.approx(
        {"mean": 0.16, "std": 0.0, "low": 0.16, "high": 0.16, "count": 3}
    )
    assert numbers["accuracy/warmup/new_style/image/colour"]["mean"] == pytest.approx(0.30)
    assert numbers["seconds/whole run"]["mean"] == pytest.approx(301.0)
    assert [run["numbers"]["dependency_auc"] for run in record["runs"]] == pytest.approx([0.84, 0.85, 0.86])
    assert [run["seed"] for run in record["runs"]] == [0, 1, 2]
    assert record["settings_that_differ"] == [], "a seed and a name are what may differ"
    assert {"date", "commit", "versions", "device_name"} <= set(record["provenance"])


def test_page_and_picture(runs: list[Path], tmp_path: Path) -> None:
    report_seeds.main(["--out", str(tmp_path / "main_job"), *map(str, runs)])
    text = (tmp_path / "main_job.md").read_text()
    assert "| dependency AUC | 0.850 ± 0.010 (0.840 to 0.860) | >= 0.850 | 2 of 3 |" in text
    # 6/600 and 3 * shift / 600: -2.0, +1.0, +5.5 points; two of three stay under three.
    assert "| change over the warm start, blanked (points) | +1.5 ± 3.8 (-2.0 to +5.5) | < +3.0 | 2 of 3 |" in text
    assert "| 5 min 01 s ± 1.0 s (5 min 00 s to 5 min 02 s) | < 6 min 00 s | 3 of 3 |" in text
    assert "![accuracy over seeds](main_job.png)" in text
    assert "differ in more than" not in text
    with Image.open(tmp_path / "main_job.png") as picture:
        assert picture.width > 300
    assert (tmp_path / "main_job.png").stat().st_size < 90_000


def test_one_run_has_no_spread_and_the_json_no_nan(runs: list[Path], tmp_path: Path) -> None:
    evaluation = json.loads((runs[0] / "evaluation.json").read_text())
    del evaluation["dependency_auc"]
    evaluation["rows"] = [row for row in evaluation["rows"] if row["model"] == "warmup"]
    (runs[0] / "evaluation.json").write_text(json.dumps(evaluation))
    report_seeds.main(["--out", str(tmp_path / "one"), str(runs[0])])
    text = (tmp_path / "one.json").read_text()
    record = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert "dependency_auc" not in record["numbers"]
    assert record["numbers"]["accuracy/warmup/all sets/image"]["std"] is None
    page = (tmp_path / "one.md").read_text()
    assert "| all sets | warm start | 35.0 % (1 run) | 24.0 % (1 run) | 15.0 % (1 run) | +20.0 (1 run) |" in page
    assert "| dependency AUC | – | >= 0.850 | – |" in page
    assert "nan" not in page


def test_runs_of_other_settings_are_pointed_out(runs: list[Path], tmp_path: Path) -> None:
    other = settings() | {"seed": 1, "rl": {"steps": 90, "optimiser": {"lr": 1e-3}}}
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(other))
    report_seeds.main(["--out", str(tmp_path / "x"), *map(str, runs)])
    assert "**The runs differ in more than their seed**: rl.steps: 80 and 90." in (tmp_path / "x.md").read_text()


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda runs: [runs[0], runs[0]], "given twice"),
        (lambda runs: [runs[0], runs[0].parent / "nowhere"], "pass a run folder"),
        (lambda runs: [runs[0].parent], "let the run finish"),
    ],
)
def test_refusals_say_what_to_do(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], choose, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        report_seeds.main(["--out", str(tmp_path / "x"), *map(str, choose(runs))])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*")), "nothing is written for a refused input"
