"""Numbers of experiments against numbers worked out by hand: rates, intervals, kinds, and what some arms measure."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmrpt.corpus import write_jsonl
from mmrpt.experiments import numbers
from mmrpt.experiments.arms import Arm, Experiment
from mmrpt.experiments.long import course
from mmrpt.experiments.page import evidence
from mmrpt.experiments.sparsity import gini, perception, share_that_holds, within_groups
from mmrpt.experiments.vppo import speed


def result(image: str, swapped: str, questions: str = "q", **more) -> dict:
    half = len(image) // 2
    hits = {
        name: {"image": i, "blanked": "0" * len(i), "swapped": s}
        for name, i, s in (
            ("a", image[:half], swapped[:half]),
            ("b", image[half:], swapped[half:]),
        )
    }
    asked = {"a": questions, "b": questions}
    return {"hits": hits, "questions": asked, "model": "rl", "seconds": {"rl": 7.0}, "measured": {}, "rows": []} | more


def made_up(**seeds) -> dict:
    named = {seed.removeprefix("seed"): arms for seed, arms in seeds.items()}
    return {
        "experiment": "x",
        "base": [],
        "made": dict.fromkeys(("date", "commit", "cpu", "threads", "torch", "transformers"), "?"),
        "seeds": named,
    }


RESULTS = made_up(
    seed0={"one": result("1101", "1000"), "other": result("0101", "0011")},
    seed1={"one": result("1110", "0000"), "other": result("1000", "0000")},
    seed2={"one": result("1111", "1111")},
)


def test_rates_are_those_of_each_seed():
    assert numbers.rates(RESULTS, "one", "image") == {"0": 0.75, "1": 0.75, "2": 1.0}
    assert numbers.rates(RESULTS, "one", "gap") == {"0": 0.5, "1": 0.75, "2": 0.0}


@pytest.mark.parametrize(
    ("column", "by_seed", "total"),
    [
        ("image", {"0": 0.25, "1": 0.5}, 3),  # 1000, then 0110
        ("blanked", {"0": 0.0, "1": 0.0}, 0),
        ("gap", {"0": 0.5, "1": 0.5}, 4),  # 1000 minus another's 1, 0, -1, -1 is 0011; then 0110
    ],
)
def test_intervals_pool_the_questions_of_seeds_that_have_both(column, by_seed, total):
    """Of 8 differences that are 0 or 1, Agresti and Min: two more, of which half is +1, half is -1 and one is 0."""
    found = numbers.difference(RESULTS, "one", "other", column)
    assert found.by_seed == by_seed and found.value == sum(by_seed.values()) / 2
    middle, squares = total / 10, (total + 1) / 10
    reach = 1.959964 * math.sqrt((squares - middle**2) / 10)
    assert found.interval == pytest.approx((middle - reach, middle + reach), abs=1e-6)


def test_other_questions_have_no_interval():
    results = made_up(seed0={"one": result("1101", "0000"), "other": result("0101", "0000", questions="p")})
    found = numbers.difference(results, "one", "other", "image")
    assert found.interval is None and found.value == 0.25
    assert numbers.difference(results, "one", "absent", "image") is None


def test_kinds_are_pooled_and_unseen_artwork_stands_apart():
    def row(name, condition, **kinds):
        return {"set": name, "condition": condition, "by_kind": kinds}

    rows = [row("new_scenes", "image", object=[0.5, 4], colour=[1.0, 2]), row("new_style", "image", object=[0.0, 5])]
    more = [row("new_scenes", "image", object=[1.0, 12]), row("new_scenes", "blanked", object=[0.0, 12])]
    results = made_up(seed0={"one": {"rows": rows}}, seed1={"one": {"rows": more}})
    wanted = {"colour": (1.0, 2), "object": (14 / 16, 16), "object, unseen artwork": (0.0, 5)}
    assert numbers.by_kind(results, "one", "image") == wanted
    assert numbers.by_kind(results, "one", "blanked") == {"object": (0.0, 12)}


def test_measured_numbers_are_means_over_seeds_at_any_depth():
    given = [{"a": 1.0, "b": {"x": 2.0}}, {"a": 4.0, "b": {"x": 4.0, "y": 7.0}}, {"a": None}]
    results = made_up(**{f"seed{i}": {"one": {"measured": one}} for i, one in enumerate(given)})
    assert numbers.measured(results, "one") == {"a": 2.5, "b": {"x": 3.0, "y": 7.0}}


def test_the_tables_show_rates_intervals_and_every_seed():
    experiment = Experiment("x", "?", (Arm("one"), Arm("other")), "other")
    text = evidence(experiment, RESULTS)
    assert "| one | 83.3 % [75.0, 75.0, 100.0] | 0.0 % [0.0, 0.0, 0.0] | 41.7 % [25.0, 0.0, 100.0] | +41.7" in text
    assert "| one − other | +37.5 (-4.5 to +64.5) [+25.0, +50.0] |" in text


# ------------------------------------------------------------------------------------------------ measures


def test_sparsity_measures():
    assert share_that_holds([1, 1, 1, 1], 0.5) == 0.5 and share_that_holds([1] * 10, 0.8) == 0.8
    assert share_that_holds([0, 8, 0, 1, 1], 0.8) == 0.2 and math.isnan(share_that_holds([0, 0], 0.8))
    values = np.random.default_rng(0).gamma(0.3, size=200)
    by_pairs = np.abs(values[:, None] - values).mean() / (2 * values.mean())  # the definition
    assert gini(values) == pytest.approx(by_pairs, rel=1e-9) and gini([3, 3, 3]) == 0
    assert gini([0, 0, 0, 9]) == 0.75 and math.isnan(gini([0, 0]))
    assert within_groups([[1, 3], [1, 3]]) == 1 and within_groups([[1, 1], [3, 3]]) == 0
    assert within_groups([[0, 2], [4, 6]]) == pytest.approx(1 / 5)  # 1 within, 4 between


def test_perception_of_a_run_is_pooled_over_its_steps(tmp_path):
    steps = [([0.0, 4.0], [1.0, 3.0]), ([1.0, 0.0, 0.0], [1.0, 3.0, 2.0, 2.0])]
    write_jsonl(tmp_path / "perception.jsonl", [{"token_scores": t, "trajectory_scores": r} for t, r in steps])
    run = SimpleNamespace(folder=tmp_path, settings=SimpleNamespace(rollout=SimpleNamespace(group_size=2)))
    found = perception(run, Arm("a"))
    assert (found["tokens seen"], found["responses"]) == (5, 6)
    assert found["share of tokens that holds 80 % of the sum"] == 1 / 5  # 4 of 5
    assert found["standard deviation over mean of responses"] == pytest.approx(math.sqrt(2 / 3) / 2)
    assert found["share of the responses' variance within a group"] == 1.0  # every group has the mean 2
    write_jsonl(tmp_path / "perception.jsonl", [{"token_scores": [0.0], "trajectory_scores": [0.0, 0.0]}])
    assert perception(run, Arm("a")) == {"tokens seen": 1, "responses": 2}  # no ratio of nothing


def in_folder(folder: Path, rows: list[dict]) -> SimpleNamespace:
    write_jsonl(folder / "metrics.jsonl", rows)
    return SimpleNamespace(folder=folder)


def test_tokens_a_second_are_those_of_rl(tmp_path):
    parts = {"seconds_sampling": 2.0, "seconds_perception": 1.0, "seconds_update": 1.0}
    rows = [{"phase": "warmup", "tokens": 999, "seconds_update": 9.0}]
    rows += [{"phase": "rl", "seconds": 77.0, "tokens": tokens, **parts} for tokens in (100, 300)]
    rows += [{"phase": "rl", "seconds_update": 0.0}]  # a step without a group has no tokens
    found = speed(in_folder(tmp_path, rows), Arm("a"))
    assert [*found.values()] == [400 / 8, 400 / 2, 2 / 8]
    assert speed(None, Arm("a", model="warmup")) == {}


def test_the_course_of_rl_is_a_mean_over_fifty_steps(tmp_path):
    rows = [{"phase": "rl", "step": i, "reward": float(i), "accuracy": math.nan if i else 1.0} for i in range(70)]
    rows[3].pop("reward")  # a step that sampled nothing
    found = course(in_folder(tmp_path, rows), Arm("a"))
    assert found["mean reward of sampled answers"] == {
        "steps 1 to 50": pytest.approx((sum(range(50)) - 3) / 49),
        "steps 51 to 70": pytest.approx(sum(range(50, 70)) / 20),
    }
    assert found["share of right answers among them"] == {"steps 1 to 50": 1.0}
