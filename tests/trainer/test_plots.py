"""Plots of a synthetic run: the numbers that are drawn, runs cut short, files that readers can open."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrpt.report import plots
from mmrpt.report.numbers import CONTROL
from mmrpt.report.read import read_run
from tests.trainer.run_folder import CORRECT, QUESTIONS, SKIPPED_STEP, THRESHOLD, make_run, write_lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def axes_of(name: str, run: Path) -> list:
    return plots.draw(name, read_run(run)).axes


def rows_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The two roots of (rate - p)^2 = z^2 p (1 - p) / n."""
    z2 = 1.959963984540054**2
    rate = successes / count
    low, high = sorted(np.roots([1 + z2 / count, -(2 * rate + z2 / count), rate * rate]).real)
    return low, high


def test_every_plot_is_a_small_picture_and_the_same_each_time(run: Path) -> None:
    assert plots.draw_all(read_run(run)) == list(plots.PLOTS)
    paths = [run / "plots" / f"{name}.png" for name in plots.PLOTS]
    for path in paths:
        assert path.stat().st_size < 60_000, f"{path.name} is {path.stat().st_size} bytes"
        with Image.open(path) as picture:
            assert picture.width > 300
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 3, f"{path.name} is blank"
    first = [path.read_bytes() for path in paths]
    plots.draw_all(read_run(run))
    assert [path.read_bytes() for path in paths] == first
    assert not list(run.rglob("*.tmp"))


def test_heldout_bars_are_the_accuracies_with_wilson_whiskers(run: Path) -> None:
    panels = axes_of("heldout_accuracy", run)
    assert [axis.get_title(loc="left") for axis in panels] == [
        f"{name} (200 questions)" for name in ("New scenes", "New combinations", "New art style")
    ]
    for axis, name in zip(panels, ("new_scenes", "new_combinations", "new_style"), strict=True):
        heights = [bar.get_height() for bar in axis.patches]
        numbers = [correct for model in ("warmup", "rl", "control") for correct in CORRECT[model, name]]
        assert heights == pytest.approx([100 * correct / QUESTIONS for correct in numbers])
        ends = [tuple(part[:, 1]) for line in axis.collections for part in line.get_segments()]
        expected = [tuple(100 * end for end in wilson(correct, QUESTIONS)) for correct in numbers]
        assert np.array(ends) == pytest.approx(np.array(expected), abs=1e-6)
    assert panels[0].get_legend_handles_labels()[1] == ["warm start", "RL", f"control: {CONTROL}"]


def test_curves_draw_raw_values_and_their_mean_without_skipped_steps(run: Path) -> None:
    (axis, _) = axes_of("reward", run)
    raw, smooth = axis.lines
    rows = [row for row in rows_of(run, "metrics.jsonl") if row["phase"] == "rl"]
    assert math.isnan(rows[SKIPPED_STEP]["reward"])
    rewards = [row["reward"] for row in rows if not math.isnan(row["reward"])]
    np.testing.assert_array_equal(raw.get_ydata(), rewards)
    np.testing.assert_array_equal(raw.get_xdata(), [step for step in range(80) if step != SKIPPED_STEP])
    assert smooth.get_ydata()[40] == pytest.approx(np.mean(rewards[37:44]))
    trend = f"{np.mean(rewards[:8]):.2g} to {np.mean(rewards[-8:]):.2g}"
    assert axis.get_title(loc="left") == f"Reward: {trend}"
    kept, _ = axes_of("kept_rate", run)
    assert list(kept.lines[2].get_ydata()) == [0.4, 0.4], "perception.keep_ratio"
    assert len([axis for axis in axes_of("stability", run) if axis.get_visible()]) == 6


def test_token_perception_says_what_the_top_fifth_carries(run: Path) -> None:
    histogram, curve = axes_of("token_perception", run)
    scores = sorted((v for row in rows_of(run, "perception.jsonl") for v in row["token_scores"]), reverse=True)
    share = 100 * sum(scores[: len(scores) // 5]) / sum(scores)
    assert curve.lines[2].get_ydata()[0] == pytest.approx(share)
    assert curve.get_title(loc="left") == f"The top 20 % of tokens carry {share:.0f} %"
    assert sum(bar.get_height() for bar in histogram.patches) == sum(score > 0 for score in scores)
    write_lines(run / "perception.jsonl", [{"step": 0, "token_scores": [0.0, 0.0, 0.0, 0.5, -1e-9, math.nan]}])
    histogram, _ = axes_of("token_perception", run)
    assert histogram.get_title(loc="left") == "5 response tokens, 80 % exactly 0 not drawn"


def test_trajectory_perception_counts_each_response_once(run: Path) -> None:
    (axis,) = axes_of("trajectory_perception", run)
    scores = [value for row in rows_of(run, "perception.jsonl") for value in row["trajectory_scores"]]
    assert sum(bar.get_height() for bar in axis.patches) == len(scores)
    assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx(np.quantile(scores, [0.1, 0.5, 0.9]))


def test_dependency_states_the_auc_of_the_pairs_and_the_threshold(run: Path) -> None:
    (run / "evaluation.json").unlink()  # it states an AUC of its own
    (axis,) = axes_of("dependency", run)
    rows = rows_of(run, "scores.jsonl")
    yes = [row["score"] for row in rows if row["needs_image"]]
    no = [row["score"] for row in rows if not row["needs_image"]]
    assert set(yes) & set(no), "the run must hold ties between the classes"
    auc = sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no))
    assert axis.get_title(loc="left") == f"Dependency of 180 sentences: AUC {auc:.3f}"
    assert list(axis.lines[0].get_xdata()) == [THRESHOLD, THRESHOLD]
    assert sum(bar.get_height() for bar in axis.patches) == len(rows)


def test_dependency_without_truth_claims_nothing(run: Path) -> None:
    (run / "evaluation.json").unlink()
    write_lines(run / "scores.jsonl", [{"example_id": "a", "score": s, "needs_image": None} for s in (0.2, 0.2)])
    (axis,) = axes_of("dependency", run)
    assert axis.get_title(loc="left") == "Dependency of 2 sentences"
    assert "not known if it needs the image (2)" in axis.get_legend_handles_labels()[1]


@pytest.mark.parametrize(
    ("masking", "label"),
    [
        ("baseline: none, attention_row: own", "D_vis (visual share of attention)"),
        ("baseline: none, attention_row: before", "dependency score (visual share of attention)"),
        (
            "baseline: position, attention_row: own",
            "dependency score (visual share of attention above the mean at its place)",
        ),
        ("signal: kl, baseline: none, attention_row: own", "dependency score (KL with and without the image)"),
        ("signal: truth, baseline: position", "dependency score (truth)"),
    ],
)
def test_only_the_papers_score_is_called_d_vis(run: Path, masking: str, label: str) -> None:
    (run / "config.yaml").write_text(f"masking: {{{masking}}}\n")
    assert axes_of("dependency", run)[0].get_xlabel() == label


def test_what_is_not_there_is_not_drawn(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert plots.draw_all(read_run(tmp_path / "empty")) == []
    rows = [
        row | {key: math.nan for key in row if key not in ("phase", "step")} for row in rows_of(run, "metrics.jsonl")
    ]
    write_lines(run / "metrics.jsonl", rows)
    there = ["heldout_accuracy", "dependency", "token_perception", "trajectory_perception"]
    assert plots.draw_all(read_run(run)) == there, "metrics that are all NaN are no data"


def test_one_step_and_one_token_are_enough(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"phase": "rl", "step": 0, "reward": 0.5, "kept_token_rate": 0.4}])
    write_lines(tmp_path / "perception.jsonl", [{"step": 0, "token_scores": [0.3], "trajectory_scores": [0.0]}])
    assert plots.draw_all(read_run(tmp_path)) == ["reward", "token_perception", "trajectory_perception", "kept_rate"]


def test_an_unknown_set_and_model_are_drawn_by_their_names(run: Path) -> None:
    row = {"model": "mine", "set": "charts", "condition": "image", "accuracy": 0.5, "count": 10}
    (run / "evaluation.json").write_text(json.dumps({"rows": [row]}))
    (axis,) = axes_of("heldout_accuracy", run)
    assert axis.get_title(loc="left") == "Charts (10 questions)"
    assert axis.patches[0].get_height() == 50.0 and axis.get_legend_handles_labels()[1] == ["mine"]
