"""The rendered world: what its pictures show is what their truth says, and nothing leaks between splits. A run on it is
recipes/rendered.yaml, which test_recipes.py tries."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrpt.settings import load_settings
from mmrpt.sources import open_sources
from mmrpt.world import RenderedWorld, World, WorldConfig, open_world
from mmrpt.world.rendered.atlas import ATLAS, IMAGES, SIZES, TRUTH, Atlas, Part, write_atlas
from mmrpt.world.rendered.make import LEAST_VISIBLE, MITSUBA, Renderer, make_parts
from mmrpt.world.rendered.scene import (
    COLOURS,
    HELD_OUT_COLOURS,
    LANGUAGE_BIAS,
    MATERIALS,
    SHAPES,
    SOLIDS_WEIGHTS,
    USUAL_COLOUR,
    RenderedScene,
    Solid,
)
from mmrpt.world.scene import _lab as lab

RENDERED = WorldConfig(kind="rendered")


@pytest.fixture(scope="module")
def world() -> RenderedWorld:
    return RenderedWorld()


def shown(world: RenderedWorld, split: str, count: int) -> Iterator[tuple[RenderedScene, Image.Image]]:
    for i in range(count):
        yield world.scene(split, i), world.image(f"{split}/{i:06d}")


# ---- truth against pixels ----

_SRGB = {
    c: [255 * (1.055 * x ** (1 / 2.4) - 0.055 if x > 0.0031 else 12.92 * x) for x in v] for c, v in COLOURS.items()
}
HUE = {colour: np.arctan2(*lab(np.array(v))[[2, 1]]) for colour, v in _SRGB.items() if colour != "grey"}


def measured_colour(
    image: Image.Image, box: tuple[int, int, int, int], covered: list[tuple[int, int, int, int]]
) -> str:
    """The hue most pixels of the box have in CIELAB, those of `covered` boxes left out; grey where few have any."""
    free = np.zeros(image.size[::-1], bool)
    for (left, top, right, bottom), value in [(box, True), *((other, False) for other in covered)]:
        free[top:bottom, left:right] = value
    pixels = lab(np.asarray(image))[free]
    hued = pixels[np.hypot(pixels[:, 1], pixels[:, 2]) > 20]
    if len(hued) < len(pixels) / 4:
        return "grey"
    turn = np.arctan2(hued[:, 2], hued[:, 1])[:, None] - np.array(list(HUE.values()))
    nearest = np.abs(np.angle(np.exp(1j * turn))).argmin(1)
    return list(HUE)[np.bincount(nearest, minlength=len(HUE)).argmax()]


def in_front(scene: RenderedScene, solid: Solid) -> list[tuple[int, int, int, int]]:
    return [other.box for other in scene.solids if other.cell // 3 > solid.cell // 3]


@pytest.mark.parametrize("split", SIZES)
def test_the_colour_in_a_solids_box_is_the_one_it_is_said_to_have(world: RenderedWorld, split: str) -> None:
    said, seen = [], []
    for scene, image in shown(world, split, 150):
        said += [solid.colour for solid in scene.solids]
        seen += [measured_colour(image, solid.box, in_front(scene, solid)) for solid in scene.solids]
    assert np.mean(np.array(said) == seen) >= 0.95, Counter((a, b) for a, b in zip(said, seen, strict=True) if a != b)
    shuffled = np.random.default_rng(0).permutation(said)
    assert np.mean(shuffled == np.array(seen)) < 0.5, "colours said of other solids fit as well: the test sees nothing"
    assert set(said) == set(COLOURS)


def features(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    left, top, right, bottom = box
    pixels = lab(np.asarray(image.crop(box).resize((12, 12))))
    look = np.stack([pixels[..., 0] / 50 - 1, np.hypot(pixels[..., 1], pixels[..., 2]) / 50]).ravel()
    return np.concatenate(
        [look, look**2, [1, (right - left) / 20, (bottom - top) / 20, (right - left) / (bottom - top)]]
    )


def readable(x: np.ndarray, labels: list[str]) -> float:
    """The share of the last third whose label a ridge regression on the others reads off the features."""
    names, first = sorted(set(labels)), len(x) * 2 // 3
    numbers = np.array([names.index(label) for label in labels])
    targets = np.eye(len(names))[numbers]
    weights = np.linalg.solve(x[:first].T @ x[:first] + np.eye(x.shape[1]), x[:first].T @ targets[:first])
    return float(np.mean((x[first:] @ weights).argmax(1) == numbers[first:]))


def test_shape_and_material_are_readable_from_the_pixels_in_a_solids_box(world: RenderedWorld) -> None:
    whole = [(s, i) for scene, i in shown(world, "train", 400) for s in scene.solids if s.visible > 0.95]
    x = np.array([features(image, solid.box) for solid, image in whole])
    order = np.random.default_rng(0).permutation(len(whole))
    for kind, least, chance in (("object", 0.95, 1 / len(SHAPES)), ("material", 0.9, 1 / len(MATERIALS))):
        labels = [getattr(solid, kind) for solid, _ in whole]
        assert readable(x, labels) >= least
        assert readable(x, [labels[i] for i in order]) < chance + 0.15


@pytest.mark.parametrize("split", SIZES)
def test_places_are_those_of_the_boxes(world: RenderedWorld, split: str) -> None:
    size = world.config.image_size
    for scene, _ in shown(world, split, SIZES[split]):
        for a, b in combinations(scene.solids, 2):
            columns, rows = (a.cell % 3, b.cell % 3), (a.cell // 3, b.cell // 3)
            middles = [(s.box[0] + s.box[2]) / 2 for s in (a, b)]
            if columns[0] != columns[1]:
                assert (middles[0] < middles[1]) == (columns[0] < columns[1]), (a, b)
            if rows[0] != rows[1]:
                assert (a.box[3] < b.box[3]) == (rows[0] < rows[1]), (a, b)  # what is nearer ends lower
        for solid in scene.solids:
            left, top, right, bottom = solid.box
            assert 0 < left < right < size and 0 < top < bottom < size
            assert solid.visible >= LEAST_VISIBLE
            middle = (left + right) / 2 / size - 0.5
            assert solid.position.endswith("left" if middle < -0.16 else "right" if middle > 0.16 else "middle"), solid


# ---- splits and sources ----


def test_splits_share_no_arrangement_and_no_picture(world: RenderedWorld) -> None:
    seen: Counter[str] = Counter()
    for split, scenes in world.atlas.scenes.items():
        assert len(scenes) == SIZES[split]
        if split == "one_solid":  # of 360 arrangements there are
            assert {len(scene.solids) for scene in scenes} == {1}
        else:
            seen.update(scene.signature() for scene in scenes)
    assert set(world.SPLITS) == set(SIZES) and max(seen.values()) == 1
    pictures = {world.image(f"{split}/{i:06d}").tobytes() for split in SIZES for i in range(SIZES[split])}
    assert len(pictures) == sum(SIZES.values())


def test_new_combinations_are_pairs_no_other_split_shows(world: RenderedWorld) -> None:
    held = {(shape, colour) for shape, colours in HELD_OUT_COLOURS.items() for colour in colours}
    trained = {(shape, colour) for shape in SHAPES for colour in COLOURS} - held
    for split, scenes in world.atlas.scenes.items():
        pairs = {(solid.object, solid.colour) for scene in scenes for solid in scene.solids}
        assert pairs == held if split == "new_combinations" else pairs <= trained, split
        assert pairs == trained or split != "train"
    assert not held & set(USUAL_COLOUR.items())


def test_numbers_places_and_looks_are_as_planned(world: RenderedWorld) -> None:
    scenes = world.atlas.scenes["train"]
    solids = [solid for scene in scenes for solid in scene.solids]
    counts = Counter(len(scene.solids) for scene in scenes)
    assert all(abs(counts[3 + i] / len(scenes) - share) < 0.05 for i, share in enumerate(SOLIDS_WEIGHTS)), counts
    for kind, words in (("object", SHAPES), ("material", MATERIALS), ("cell", range(6))):
        found = Counter(getattr(solid, kind) for solid in solids)
        assert set(found) == set(words) and min(found.values()) > 0.7 * max(found.values()), found
    usual = np.mean([solid.colour == USUAL_COLOUR[solid.object] for solid in solids])
    expected = LANGUAGE_BIAS + (1 - LANGUAGE_BIAS) / 6
    assert abs(usual - expected) < 4 * (expected * (1 - expected) / len(solids)) ** 0.5, usual


def test_a_source_is_deterministic_grows_at_its_end_and_goes_on_with_new_captions(world: RenderedWorld) -> None:
    short, long = world.source("validation", 5), RenderedWorld().source("validation", SIZES["validation"] + 5)
    assert [e.id for e in short] == [f"validation/{i:06d}" for i in range(5)]
    assert list(short) == [long[i] for i in range(5)]
    assert len(pickle.dumps(short)) < 10_000 and list(pickle.loads(pickle.dumps(short))) == list(short)
    for i in range(5):
        again = long[SIZES["validation"] + i]
        assert again.caption != short[i].caption and long.image(again.id).tobytes() == long.image(short[i].id).tobytes()
    other = RenderedWorld(WorldConfig(kind="rendered", seed=1)).source("validation", 5)
    assert all(a.caption != b.caption for a, b in zip(short, other, strict=True))
    code = "from mmrpt.world import RenderedWorld\nfor e in RenderedWorld().source('train', 20): print(e.caption)"
    for seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        assert told.stdout.splitlines() == [e.caption for e in world.source("train", 20)]


def test_boxes_of_words_show_what_the_words_name(world: RenderedWorld) -> None:
    """By the pixels: a colour's boxes have it. Words of a place lie there, a number has so many boxes."""
    numbers, hits = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}, []
    for i, example in enumerate(world.source("train", 200)):
        boxes, scene = world.word_boxes(example.id), world.scene("train", i)
        assert len(boxes) == len(example.words)
        for word, places in zip(example.words, boxes, strict=True):
            text = example.caption[word.start : word.end]
            assert set(places) <= {solid.box for solid in scene.solids}
            assert places or not word.needs_image, (example, text)
            solids = [solid for solid in scene.solids if solid.box in places]
            if word.kind == "plain":
                assert not places
            elif places and word.kind == "colour":
                image = world.image(example.id)
                hits += [measured_colour(image, s.box, in_front(scene, s)) == text for s in solids]
            elif places and word.kind in ("object", "material", "position"):
                assert {getattr(solid, word.kind) for solid in solids} == {text}
            elif places:
                assert len(places) == numbers.get(text, 2)  # a relation has two
    assert len(hits) > 200 and np.mean(hits) >= 0.95


def test_another_image_size_scales_pictures_and_boxes(world: RenderedWorld) -> None:
    small = RenderedWorld(WorldConfig(kind="rendered", image_size=56))
    for i in range(20):
        assert small.image(f"train/{i:06d}").size == (56, 56)
        for one, other in zip(small.scene("train", i).solids, world.scene("train", i).solids, strict=True):
            assert np.abs(2 * np.array(one.box) - other.box).max() <= 1
        assert small.example("train", i) == world.example("train", i)


# ---- what is refused ----


def test_splits_ids_and_settings_that_do_not_fit_are_refused(world: RenderedWorld) -> None:
    with pytest.raises(ValueError, match="no split 'new_style'.*new_scenes"):
        world.source("new_style", 3)
    with pytest.raises(ValueError, match="expected 1 or more"):
        world.source("train", 0)
    with pytest.raises(KeyError, match="train/000012"):
        world.image("elsewhere/000001")
    for name, value in {"concepts": 100, "max_cards": 3, "language_bias": 0.5, "object_zipf": 0.5}.items():
        with pytest.raises(ValueError, match=f"demo.world.{name} is .*demo.world.kind=drawn"):
            load_settings(None, ["demo.world.kind=rendered", f"demo.world.{name}={value}"])
    with pytest.raises(ValueError, match="demo.world.kind is 'painted': expected 'drawn' or 'rendered'"):
        load_settings(None, ["demo.world.kind=painted"])


def test_scenes_that_are_missing_or_cut_short_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="git checkout -- mmrpt/world/assets"):
        Atlas(tmp_path)
    (tmp_path / TRUTH).write_bytes((ATLAS / TRUTH).read_bytes())
    (tmp_path / IMAGES).write_bytes((ATLAS / IMAGES).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"images.bin has \d+ bytes: expected \d+, by scenes.json.gz"):
        Atlas(tmp_path)


# ---- the package, the run, and how the scenes were made ----


def test_the_scenes_fit_into_the_package() -> None:
    assert sum(len(file.read_bytes()) for file in ATLAS.iterdir()) <= 6_000_000
    assert {file.name for file in ATLAS.iterdir()} == {TRUTH, IMAGES}


def test_settings_choose_the_world(tmp_path: Path) -> None:
    settings = load_settings(None, ["demo.world.kind=rendered", f"output={tmp_path}"])
    sources = open_sources(settings)
    assert isinstance(sources.world, RenderedWorld) and set(sources.held_out) == {"new_scenes", "new_combinations"}
    assert len(sources.train) == settings.demo.size and sources.facts[0].id == sources.train[0].id
    assert type(open_world(WorldConfig())) is World
    words = set(" ".join(sources.texts()).replace(".", "").split())
    assert set(sources.world.vocabulary()) <= words


def test_rendering_without_mitsuba_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(SystemExit, match=r"pip install 'mmrpt\[rendered\]'"):
        Renderer()


def test_the_generator_makes_the_scenes_of_the_package(tmp_path: Path, world: RenderedWorld) -> None:
    mitsuba = pytest.importorskip("mitsuba")
    first = {"train": 4}
    parts = list(make_parts(tmp_path, first, Renderer(threads=1)))
    write_atlas(tmp_path / "atlas", parts)
    made = Atlas(tmp_path / "atlas")
    for i in range(4):
        ours, theirs = made.scenes["train"][i], world.scene("train", i)
        assert ours.signature() == theirs.signature()
        boxes = np.array([[s.box for s in scene.solids] for scene in (ours, theirs)])
        assert np.abs(boxes[0] - boxes[1]).max() <= 1
        one, other = (np.asarray(source.image("train", i), float) for source in (made, world.atlas))
        assert np.abs(one - other).mean() < 4
        assert mitsuba.__version__ != MITSUBA or np.abs(one - other).mean() < 1
    (again,) = make_parts(tmp_path, first, None)  # a finished part is read, not rendered
    assert again == Part("train", parts[0].scenes, parts[0].images)
