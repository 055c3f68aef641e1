"""Plots of synthetic runs: the numbers that are drawn, runs cut short, files that readers can open."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mmrpt import plots
from mmrpt.reporting import style
from mmrpt.reporting.runfiles import RunFiles
from tests.trainer.run_folder import CORRECT, QUESTIONS, SKIPPED_STEP, THRESHOLD, make_run, write_lines

Drawn = dict[str, Figure]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Figures by file name, as they were when saved."""
    figures: Drawn = {}
    save = style.save

    def keep(figure: Figure, path: Path) -> Path:
        figures[path.stem] = figure
        return save(figure, path)

    monkeypatch.setattr(style, "save", keep)
    return figures


def rows_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The two roots of (rate - p)^2 = z^2 p (1 - p) / n."""
    z2 = 1.959963984540054**2
    rate = successes / count
    low, high = sorted(np.roots([1 + z2 / count, -(2 * rate + z2 / count), rate * rate]).real)
    return low, high


def test_every_plot_is_a_small_picture(run: Path) -> None:
    paths = plots.draw_all(run)
    assert [path.stem for path in paths] == list(plots.PLOTS)
    for path in paths:
        assert path.stat().st_size < 60_000, f"{path.name} is {path.stat().st_size} bytes"
        with Image.open(path) as picture:
            assert picture.width > 300
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 3, f"{path.name} is blank"
    assert not list(run.rglob("*.tmp"))


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    for draw in (plots.plot_reward, plots.plot_dependency):
        path = draw(run)
        first = path.read_bytes()
        assert draw(run) == path
        assert path.read_bytes() == first


def test_heldout_bars_are_the_accuracies_with_wilson_whiskers(run: Path, drawn: Drawn) -> None:
    plots.plot_heldout_accuracy(run)
    figure = drawn["heldout_accuracy"]
    panels = figure.axes
    assert [axis.get_title(loc="left") for axis in panels] == [
        f"{name} (200 questions)" for name in ("New scenes", "New combinations", "New art style")
    ]
    for axis, name in zip(panels, ("new_scenes", "new_combinations", "new_style"), strict=True):
        heights = sorted(bar.get_height() for bar in axis.patches)
        numbers = [correct for model in ("warm", "reinforced", "caption") for correct in CORRECT[model, name]]
        assert heights == pytest.approx(sorted(100 * correct / QUESTIONS for correct in numbers))
        ends = sorted(tuple(part[:, 1]) for line in axis.collections for part in line.get_segments())
        expected = sorted(tuple(100 * end for end in wilson(correct, QUESTIONS)) for correct in numbers)
        assert np.array(ends) == pytest.approx(np.array(expected), abs=1e-6)
    assert "35 to 54 % with image, 24 to 25 % image blanked, 15 to 12 %" in figure.get_suptitle()


def test_reward_draws_raw_values_and_their_mean_without_skipped_steps(run: Path, drawn: Drawn) -> None:
    plots.plot_reward(run)
    raw, smooth = (line.get_ydata() for line in drawn["reward"].axes[0].lines)
    rewards = [row["reward"] for row in rows_of(run, "metrics.jsonl") if row["phase"] == "rl"]
    assert math.isnan(raw[SKIPPED_STEP]) and math.isnan(rewards[SKIPPED_STEP])
    np.testing.assert_array_equal(raw, rewards)
    assert len(rewards) == 80
    near = [value for i, value in enumerate(rewards) if 0 <= i <= 8 and i != SKIPPED_STEP]  # nine steps about step 4
    assert smooth[4] == pytest.approx(np.mean(near))
    assert smooth[40] == pytest.approx(np.mean(rewards[36:45]))


def test_token_perception_says_what_the_top_fifth_carries(run: Path, drawn: Drawn) -> None:
    plots.plot_token_perception(run)
    histogram, curve = drawn["token_perception"].axes
    scores = sorted((v for row in rows_of(run, "perception.jsonl") for v in row["token_scores"]), reverse=True)
    share = 100 * sum(scores[: len(scores) // 5]) / sum(scores)
    assert curve.lines[2].get_ydata()[0] == pytest.approx(share)
    assert curve.get_title(loc="left") == f"The top 20 % of tokens carry {share:.0f} %"
    assert histogram.get_xscale() == "log"
    assert sum(bar.get_height() for bar in histogram.patches) == sum(score > 0 for score in scores)


def test_token_perception_names_the_tokens_a_log_axis_cannot_show(run: Path, drawn: Drawn) -> None:
    write_lines(run / "perception.jsonl", [{"step": 0, "token_scores": [0.0, 0.0, 0.0, 0.5, -1e-9, float("nan")]}])
    plots.plot_token_perception(run)
    assert drawn["token_perception"].axes[0].get_title(loc="left") == "5 response tokens, 80 % exactly 0 not drawn"


def test_trajectory_perception_counts_each_response_once(run: Path, drawn: Drawn) -> None:
    plots.plot_trajectory_perception(run)
    (axis,) = drawn["trajectory_perception"].axes
    scores = [value for row in rows_of(run, "perception.jsonl") for value in row["trajectory_scores"]]
    assert sum(bar.get_height() for bar in axis.patches) == len(scores)
    assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx(np.quantile(scores, [0.1, 0.5, 0.9]))


def test_dependency_states_the_auc_of_the_pairs_and_the_threshold(run: Path, drawn: Drawn) -> None:
    plots.plot_dependency(run)
    (axis,) = drawn["dependency"].axes
    rows = rows_of(run, "scores.jsonl")
    yes = [row["score"] for row in rows if row["needs_image"]]
    no = [row["score"] for row in rows if not row["needs_image"]]
    assert set(yes) & set(no), "the run must hold ties between the classes"
    auc = sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no))
    assert axis.get_title(loc="left") == f"Sentences that need the image score higher: AUC {auc:.3f}"
    assert list(axis.lines[0].get_xdata()) == [THRESHOLD, THRESHOLD]
    assert sum(bar.get_height() for bar in axis.patches) == len(rows)


def test_dependency_without_truth_draws_one_class(run: Path, drawn: Drawn) -> None:
    write_lines(run / "scores.jsonl", [{"example_id": "a", "score": s, "needs_image": None} for s in (0.2, 0.2)])
    (run / "masking.json").unlink()
    assert plots.plot_dependency(run) is not None
    (axis,) = drawn["dependency"].axes
    assert "unknown" in axis.get_title(loc="left")
    assert not axis.lines, "no threshold is known"


def test_kept_rate_beside_the_setting(run: Path, drawn: Drawn) -> None:
    plots.plot_kept_rate(run)
    (axis,) = drawn["kept_rate"].axes
    assert axis.get_title(loc="left") == "43 % of response tokens carry gradient"
    assert axis.lines[-1].get_ydata()[0] == pytest.approx(40.0)


@pytest.mark.parametrize("first_step", [0, 60], ids=["own steps", "counted on"])
def test_control_loss_follows_the_warm_up(run: Path, drawn: Drawn, first_step: int) -> None:
    rows = rows_of(run, "metrics.jsonl")
    for row in rows:
        row["step"] += first_step if row["phase"] == "control" else 0
    write_lines(run / "metrics.jsonl", rows)
    plots.plot_loss(run)
    (axis,) = drawn["loss"].axes
    ends = [(line.get_xdata()[0], line.get_xdata()[-1]) for line in axis.lines[1::2]]
    assert ends == [(0, 59), (60, 139)]


def test_a_run_in_its_warm_up_has_one_plot(run: Path) -> None:
    for name in ("scores", "masked", "samples", "perception", "answers"):
        (run / f"{name}.jsonl").unlink()
    for name in ("evaluation.json", "masking.json"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()[:20]
    (run / "metrics.jsonl").write_text("\n".join(lines)[:-7])
    assert [path.stem for path in plots.draw_all(run)] == ["loss"]


def test_an_empty_folder_has_no_plots(tmp_path: Path) -> None:
    assert plots.draw_all(tmp_path) == []
    assert all(plot.draw(tmp_path) is None for plot in plots.PLOTS.values())


def test_metrics_that_are_all_nan_are_no_data(run: Path) -> None:
    rows = [
        row | {key: math.nan for key in row if key not in ("phase", "step")} for row in rows_of(run, "metrics.jsonl")
    ]
    write_lines(run / "metrics.jsonl", rows)
    assert {path.stem for path in plots.draw_all(run)} == {
        "heldout_accuracy",
        "dependency",
        "token_perception",
        "trajectory_perception",
    }


def test_one_step_and_one_token_are_enough(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"phase": "rl", "step": 0, "reward": 0.5, "kept_token_rate": 0.4}])
    write_lines(tmp_path / "perception.jsonl", [{"step": 0, "token_scores": [0.3], "trajectory_scores": [0.0]}])
    stems = {path.stem for path in plots.draw_all(tmp_path)}
    assert stems == {"reward", "kept_rate", "token_perception", "trajectory_perception"}


def test_a_step_written_twice_counts_once(run: Path) -> None:
    """A killed run that goes back to its checkpoint writes the steps after it again."""
    whole = RunFiles(run)
    metrics, perception = whole.phase("rl"), whole.replayed("perception.jsonl")
    for name, again in (("metrics.jsonl", metrics[50:]), ("perception.jsonl", perception[12:])):
        rows = rows_of(run, name)
        write_lines(run / name, rows + again)
    files = RunFiles(run)
    assert [row["step"] for row in files.phase("rl")] == list(range(80))
    assert [row["step"] for row in files.replayed("perception.jsonl")] == list(range(20))


def test_several_rows_of_one_step_are_kept(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", [{"step": step, "n": n} for step in (0, 1, 2, 1, 2) for n in range(2)])
    kept = [(row["step"], row["n"]) for row in RunFiles(tmp_path).replayed("samples.jsonl")]
    assert kept == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_an_unknown_set_and_model_are_drawn_by_their_names(run: Path, drawn: Drawn) -> None:
    row = {"model": "mine", "set": "charts", "condition": "image", "accuracy": 0.5, "count": 10}
    broken = {"model": "mine", "set": "maps", "condition": "image", "accuracy": math.nan, "count": 10}
    (run / "evaluation.json").write_text(json.dumps({"rows": [row, broken]}))
    plots.plot_heldout_accuracy(run)
    (axis,) = drawn["heldout_accuracy"].axes
    assert axis.get_title(loc="left") == "Charts (10 questions)"
    assert [bar.get_height() for bar in axis.patches] == [50.0]


def test_command_line_names_what_it_drew_and_what_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "perception.jsonl").unlink()
    plots.main([str(run)])
    out = capsys.readouterr().out
    assert str(run / "plots" / "reward.png") in out
    assert "not drawn: token_perception (no data in perception.jsonl, token_scores)" in out


def test_command_line_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        plots.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "pass a run folder" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="pass a run folder"):
        plots.plot_reward(tmp_path / "nowhere")
