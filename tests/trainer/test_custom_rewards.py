"""Rewards from a user's file: what is loaded, what is refused at the start, None, and functions that wait."""

from __future__ import annotations

import asyncio
import re
from functools import partial

import pytest

from mmrpt.corpus import read_jsonl
from mmrpt.engines import native
from mmrpt.engines.run import open_run
from mmrpt.rewards import combine_rewards, load_rewards
from mmrpt.settings import SettingsError, load_settings
from mmrpt.train import main
from tests.trainer.conftest import SMALL_RUN
from tests.trainer.test_resume import outside_world  # noqa: F401  a fixture

SOURCE = """
from dataclasses import dataclass

count = 1
with open(f"{__file__}.runs", "a") as runs:
    runs.write("x")

@dataclass
class Score:
    value: float

def short(completions, **columns):
    return [Score(float(len(c) < 5)).value for c in completions]

def loaded(completions, **columns):
    return [float(count)] * len(completions)

async def judge(prompts, completions, answer, **columns):
    return [float(p + c == a) for p, c, a in zip(prompts, completions, answer)]

class Longer:
    def __call__(self, completions, **columns):
        return [float(len(c)) for c in completions]

longer = Longer()

def no_columns(completions):
    return []

def needs_more(completions, solution, **columns):
    return []
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def test_functions_of_files_and_modules_are_found_by_name(file):
    names = ("short", "loaded", "judge", "longer")
    found = load_rewards([*(f"{file}:{name}" for name in names), "mmrpt.rewards.exact:exact_reward"])
    assert list(found) == [*names, "exact_reward"] and load_rewards([]) == {}
    assert file.with_name("my_rewards.py.runs").read_text() == "x"  # however many functions it has
    columns = {"prompts": ["a", "b"], "answer": ["asix", "c"]}
    totals, terms = combine_rewards(dict.fromkeys(names, 1.0), ["six", "seven"], found, **columns)
    assert terms == {"short": [1, 0], "loaded": [1, 1], "judge": [1, 0], "longer": [3, 5]}
    assert totals == [6, 6]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"has no function 'missing', but \['short', 'loaded', 'judge', 'no_columns', 'needs_more'\]"),
        ("count", "has no function 'count'"),
        ("no_columns", r"got an unexpected keyword argument '\w+'\): expected TRL's signature"),
        ("needs_more", r"missing a required argument: 'solution'\): expected TRL's signature"),
    ],
)
def test_a_name_that_cannot_serve_is_refused(file, name, message):
    with pytest.raises(SettingsError, match=f"reward.custom names '{re.escape(str(file))}:{name}'.*{message}"):
        load_rewards([f"{file}:{name}"])


@pytest.mark.parametrize(
    ("place", "text", "message"),
    [
        ("none.py:f", None, "FileNotFoundError.*the path from the folder where the command is run"),
        ("no.such.module:f", None, "ModuleNotFoundError: No module named 'no'"),
        ("broken.py:f", "def f(:\n", "SyntaxError"),
        ("broken.py:f", "1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_loaded_is_refused(tmp_path, monkeypatch, place, text, message):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / "broken.py").write_text(text)
    with pytest.raises(SettingsError, match=f"reward.custom names '{place}', which cannot be loaded .*{message}"):
        load_rewards([place])


def test_none_adds_nothing_and_other_values_are_refused():
    weights = {"format": 1.0, "mine": 2.0}
    wrong = {
        "is '1' for sample b, .*give None": [None, "1"],
        "is nan for sample a": [float("nan"), 1],
        "gave 1 values for 2 completions": [1],
        "gave None: expected a list": None,
    }
    for message, values in wrong.items():
        with pytest.raises(ValueError, match=f"reward term 'mine' {message}"):
            combine_rewards(weights, ["x", "y"], {"mine": lambda values=values, **_: values}, id=["a", "b"])
    totals, terms = combine_rewards(weights, ["x", "y"], {"mine": lambda **_: [None, 1]})
    assert totals == [terms["format"][0], terms["format"][1] + 2.0] and terms["mine"] == [None, 1]


def test_functions_that_wait_wait_together_in_one_loop():
    loops = []

    def waiter(own, others):
        async def reward(completions, **_):
            loops.append(asyncio.get_running_loop())
            events[own].set()
            await asyncio.wait_for(events[others].wait(), timeout=20)  # alone it would never end
            return [1.0] * len(completions)

        return reward

    async def within_a_loop():  # as in a notebook
        return plain()

    custom = {"a": waiter(0, 1), "b": waiter(1, 0)}
    plain = partial(combine_rewards, {"a": 1.0, "b": 1.0}, ["x"], custom)
    for call in (plain, lambda: asyncio.run(within_a_loop())):
        events = [asyncio.Event(), asyncio.Event()]
        assert call()[0] == [2.0]
    assert len(loops) == 4 and len(set(map(id, loops))) == 1

    async def fails(**_):
        raise ConnectionError("no judge")

    with pytest.raises(ConnectionError, match="no judge"):
        combine_rewards({"fails": 1.0}, ["x"], {"fails": fails})


def test_a_run_is_rewarded_by_a_file(file, tmp_path):
    custom = f"reward.custom={{{file}:longer: 0.5, {file}:judge: 0}}"
    native.train(open_run(load_settings(None, [f"output={tmp_path}", "name=run", *SMALL_RUN, custom])))
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "rl"]
    assert all(row["reward/longer"] > 0 and row["reward/judge"] == 0 for row in rows if row["rounds"])
    parts = {"seconds_sampling", "seconds_reward", "seconds_update", "seconds_captions"}
    assert any(parts | {"seconds_perception"} <= row.keys() for row in rows)


def test_a_run_does_not_start_without_its_rewards(tmp_path, capsys):
    assert main([f"output={tmp_path}", "name=run", *SMALL_RUN, f"reward.custom={{{tmp_path}/none.py:f: 1}}"]) == 2
    assert "none.py:f', which cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
