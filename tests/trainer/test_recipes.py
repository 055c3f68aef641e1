"""Every file of recipes/: its settings are known, its words are true, and with scale=tiny it runs from start to end."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml

from mmrpt.corpus import read_jsonl
from mmrpt.engines.estimate import estimate
from mmrpt.mask import main as mask
from mmrpt.policy import Policy
from mmrpt.scale import write_tiny_model
from mmrpt.settings import Settings, flatten, load_settings
from mmrpt.train import main as train
from tests.trainer.shapes import write_shape
from tests.trainer.test_train_cli import write_pairs

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EXPECTED = {"demo", "rendered", "mask-a-folder", "qwen2.5-vl-7b-lora", "qwen2.5-vl-7b-8gpu", "qwen3-vl-4b"}
EXPECTED |= {f"qwen2.5-vl-3b-{size}gb" for size in (24, 48, 80)}

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def test_the_recipes_are_there_and_readme_names_each():
    assert {path.stem for path in RECIPES} >= EXPECTED
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in RECIPES if f"(recipes/{path.name})" not in readme] == []
    assert "graft recipes" in (ROOT / "MANIFEST.in").read_text()


@every_recipe
def test_a_recipe_says_what_it_is_for_and_is_loaded_as_it_stands(recipe):
    text = recipe.read_text()
    lines = text[: text.index("\nname:")].splitlines()
    assert all(line.startswith("#") for line in lines) and max(map(len, text.splitlines())) <= 120
    head = " ".join(line.removeprefix("# ") for line in lines)
    assert re.search(r"Device memory: (\d+ GB|no GPU)", head) and f"--config recipes/{recipe.name}" in head
    found, given = load_settings(recipe), flatten(yaml.safe_load(text))
    values = flatten(json.loads(json.dumps(found, default=vars)))
    assert given and {name: values[name] for name in given} == given
    if found.model.path is not None:
        assert "Not run on hardware yet" in head and found.name == yaml.safe_load(text)["name"]


def test_the_demo_is_the_default_run():
    assert load_settings(ROOT / "recipes" / "demo.yaml") == Settings()


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Overrides that put pairs on disk and a model's folder without weights in the place of a recipe's own."""
    folder = tmp_path_factory.mktemp("offline")
    write_pairs(folder / "pairs", 24)

    def overrides(recipe: Path) -> list[str]:
        settings = load_settings(recipe)
        chosen = ["device=cpu", "threads=1", "scale=tiny"]
        if settings.data.pairs is not None:
            chosen.append(f"data.pairs={folder / 'pairs' / 'pairs.jsonl'}")
        if settings.model.path is not None:
            shape = re.fullmatch(r"Qwen/(.*)-Instruct", settings.model.path).group(1)
            if not (folder / shape).exists():
                write_shape(folder / shape, shape)
            chosen.append(f"model.path={folder / shape}")
        return chosen

    return overrides


@every_recipe
def test_a_recipe_runs_from_start_to_end_with_scale_tiny(recipe, offline, tmp_path, capsys, monkeypatch):
    if recipe.stem != "demo":  # whose report is drawn as every other: half of a test's time
        monkeypatch.setattr("mmrpt.report.page.draw_all", lambda run: [])
    run = ["--config", str(recipe), f"output={tmp_path}", "name=it", *offline(recipe)]
    folder, masks = tmp_path / "it", recipe.name.startswith("mask")
    assert (mask if masks else train)(run) == 0, capsys.readouterr().err
    settings = load_settings(folder / "config.yaml")
    assert read_jsonl(folder / "masked.jsonl")
    if masks:
        assert (folder / "card.html").exists()
        return
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "rl"]
    assert [(row["step"], row["groups"] > 0, row["skipped"]) for row in rows] == [(0, True, False), (1, True, False)]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert (folder / "checkpoints" / "rl" / "adapter_config.json").exists() == (settings.model.lora.rank > 0)
    assert (folder / "report.md").exists() and json.loads((folder / "evaluation.json").read_text())["rows"]
    if settings.evaluation.every:
        assert len(read_jsonl(folder / "validation.jsonl")) == 2
        Policy.load(folder / "checkpoints" / "rl-best")


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.name.startswith("mask")], ids=lambda path: path.stem)
def test_a_recipe_passes_a_dry_run(recipe, offline, tmp_path, capsys, monkeypatch):
    """With the recipe's own sizes; a tiny model and the update alone, as a real one's layers take a minute."""
    monkeypatch.setattr("mmrpt.engines.dry_run.estimate", partial(estimate, only="update"))
    chosen = offline(recipe)
    if (place := next((one for one in chosen if one.startswith("model.path=")), None)) is not None:
        write_tiny_model(place.removeprefix("model.path="), None, tmp_path / "tiny", 0)
        chosen = [*(one for one in chosen if one != place), f"model.path={tmp_path / 'tiny'}"]
    chosen.remove("scale=tiny")
    run = ["--config", str(recipe), f"output={tmp_path / 'runs'}", *chosen, "--dry-run", "--gpu-memory", "24"]
    assert train(run) == 0, capsys.readouterr().err
    assert re.search(r"memory: \d+\.\d [GM]iB in update, \d+% of the device's 24.0 GiB", capsys.readouterr().out)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_scale_tiny_is_of_the_tiny_model_and_shows_validation(offline, tmp_path, capsys):
    recipe = next(one for one in RECIPES if "80gb" in one.name)
    run = ["--config", str(recipe), f"output={tmp_path}", *offline(recipe), "--dry-run", "--gpu-memory", "24"]
    assert train(run) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    found = re.search(r"memory: (\d+)\.\d MiB", out)
    assert found and int(found[1]) < 500 and "\nvalidation " in out
