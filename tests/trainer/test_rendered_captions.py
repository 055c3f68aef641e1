"""Captions of the rendered world, read back from their text alone: true of the scene, and needing the image exactly
when brute force over every possible scene says so. The reader below shares no code with the writer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from mmrpt.masking.sentences import sentence_spans
from mmrpt.types import Word
from mmrpt.world import RenderedWorld
from mmrpt.world.captions import Caption, write_caption
from mmrpt.world.draws import Draws
from mmrpt.world.rendered.captions import FRAGMENTS, rendered_language
from mmrpt.world.rendered.logic import Rules
from mmrpt.world.rendered.scene import RenderedScene

COUNT = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
CELL = {f"{row} {column}": 3 * r + c for r, row in enumerate(("back", "front")) for c, column in enumerate(
    ("left", "middle", "right"))}  # fmt: skip
LOOKS = {
    "object": ("cube", "sphere", "cylinder", "cone", "ring"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "grey"),
    "material": ("metal", "rubber"),
}
WORDS = {**LOOKS, "position": tuple(CELL), "count": tuple(COUNT)}
WORDS["relation"] = ("left of", "right of", "behind", "in front of")
SLOT = re.compile(r"\b(?:" + "|".join(f"(?P<{kind}>{'|'.join(words)})" for kind, words in WORDS.items()) + r")(?=s?\b)")
KNOWN = {re.sub(r"\[\w+ ([^\]]+)\]", r"\1", text) for text in FRAGMENTS["known"]}
WEIGHTS = (0.2, 0.4, 0.25, 0.15)


class Worlds:
    """W scenes at once: by cell the numbers of object, colour and material, -1 where nothing stands. (W, 6) each."""

    def __init__(self, looks: dict[str, np.ndarray], names: dict[str, Sequence[str]]) -> None:
        self.looks, self.names = looks, names
        self.taken = looks["object"] >= 0
        self.number = self.taken.sum(1)

    def has(self, kind: str, value: str) -> np.ndarray:
        """(W, 6) bool: which solids have this value."""
        if kind == "position":
            return self.taken & (np.arange(6) == CELL[value])
        names = self.names[kind]
        return self.looks[kind] == names.index(value) if value in names else np.zeros_like(self.taken)

    def the(self, kind: str, value: str) -> np.ndarray:
        """As `has`, but nothing where more than one solid has it: "the red solid" speaks of one."""
        solids = self.has(kind, value)
        return solids & (solids.sum(1, keepdims=True) == 1)

    def where(self, chosen: np.ndarray) -> Worlds:
        return Worlds({kind: table[chosen] for kind, table in self.looks.items()}, self.names)


class Claim:
    """One sentence as a predicate of scenes, its slots in the order of the text."""

    def __init__(self, sentence: str, start: int) -> None:
        found = list(SLOT.finditer(sentence))
        self.sentence = sentence
        self.slots = [(m.lastgroup, m[0], start + m.start()) for m in found]
        self.kinds = tuple(m.lastgroup for m in found)
        self.values = [m[0] for m in found]
        names = {"object": r"the $", "position": r"the solid at the $"}
        self.definite = [
            bool(re.search(names[m.lastgroup], sentence[: m.start()]))
            if m.lastgroup in names
            else sentence[m.end() :].startswith(" solid")
            for m in found
        ]

    def holds(self, values: Sequence[str], worlds: Worlds) -> np.ndarray:
        """(W,) bool: in which worlds the sentence is true with these words in its slots."""
        given = dict(zip(self.kinds, values, strict=True))
        if "relation" in given:
            (kind_a, _, kind_b), (a, name, b) = self.kinds, values
            lies = np.array([[RELATION[name](i, j) for j in range(6)] for i in range(6)], int)
            ends = (worlds.the(kind, value).astype(int) for kind, value in ((kind_a, a), (kind_b, b)))
            return np.einsum("wi,ij,wj->w", next(ends), lies, next(ends)) > 0
        if "count" in given:
            number = COUNT[given.pop("count")]
            if not given:
                return worlds.number == number
            (look,) = given.items()
            return worlds.has(*look).sum(1) == number
        solids = worlds.taken
        for kind, value, definite in zip(self.kinds, values, self.definite, strict=True):
            solids = solids & (worlds.the(kind, value) if definite else worlds.has(kind, value))
        return solids.any(1)


RELATION = {
    "left of": lambda i, j: i % 3 < j % 3,
    "right of": lambda i, j: i % 3 > j % 3,
    "behind": lambda i, j: i < 3 <= j,
    "in front of": lambda i, j: j < 3 <= i,
}


def claims_of(text: str) -> list[Claim]:
    sentences = [(text[a:b].rstrip("."), a) for a, b in sentence_spans(text)]
    return [c for c in (Claim(sentence, a) for sentence, a in sentences if sentence not in KNOWN) if c.slots]


def of_scene(scene: RenderedScene) -> Worlds:
    looks = {kind: np.full((1, 6), -1) for kind in LOOKS}
    for solid in scene.solids:
        for kind, names in LOOKS.items():
            looks[kind][0, solid.cell] = names.index(getattr(solid, kind))
    return Worlds(looks, LOOKS)


def every_world(names: dict[str, Sequence[str]], low: int, high: int) -> Worlds:
    """All scenes of `low` to `high` solids with looks of `names`."""
    tables: dict[str, list[np.ndarray]] = {kind: [] for kind in names}
    for count in range(low, high + 1):
        sizes = [len(words) for words in names.values() for _ in range(count)]
        grid = np.indices(sizes, np.int8).reshape(3, count, -1)
        for cells in combinations(range(6), count):
            for table, part in zip(tables.values(), grid, strict=True):
                full = np.full((grid.shape[2], 6), -1, np.int8)
                full[:, cells] = part.T
                table.append(full)
    return Worlds({kind: np.concatenate(parts) for kind, parts in tables.items()}, names)


def word_at(words: Sequence[Word], start: int) -> Word:
    return next(word for word in words if word.start == start)


@pytest.fixture(scope="module")
def world() -> RenderedWorld:
    return RenderedWorld()


def test_the_form_of_captions(world: RenderedWorld) -> None:
    vocabulary, said, lengths = set(world.vocabulary()), Counter(), []
    for example in world.source("train", 1500):
        caption = example.caption
        spans = sentence_spans(caption)
        assert caption == caption.lower() and " ".join(caption[a:b] for a, b in spans) == caption
        rest = caption
        for word in reversed(example.words):  # every word lies in exactly one Word; what is left are the stops
            rest = rest[: word.start] + rest[word.end :]
        assert set(rest) <= {".", " "}
        said.update(caption.replace(".", "").split())
        lengths.append(len(caption.split()))
        needing = [any(w.needs_image for w in example.words if a <= w.start < b) for a, b in spans]
        assert any(needing) and not all(needing), caption
    assert set(said) <= vocabulary
    assert not vocabulary - set(said), f"never said: {sorted(vocabulary - set(said))}"
    assert 30 <= np.mean(lengths) <= 40, np.mean(lengths)


def test_every_claim_is_true_of_its_scene_and_every_word_has_its_kind(world: RenderedWorld) -> None:
    for split in world.SPLITS:
        for i, example in enumerate(world.source(split, 120)):
            kinds = {}
            for claim in claims_of(example.caption):
                assert claim.holds(claim.values, of_scene(world.scene(split, i)))[0], (example.id, claim.sentence)
                kinds |= {start: (start + len(value), kind) for kind, value, start in claim.slots}
            told = {w.start: (w.end, w.kind) for w in example.words if w.kind != "plain"}
            known = [(a, b) for a, b in sentence_spans(example.caption) if example.caption[a : b - 1] in KNOWN]
            assert kinds == {k: v for k, v in told.items() if not any(a <= k < b for a, b in known)}, example
            assert not any(word_at(example.words, k).needs_image for k in told if k not in kinds)


def test_a_hidden_word_has_one_right_answer(world: RenderedWorld) -> None:
    """Also one that the rest of the caption tells, so that no answer of a model that looks is called wrong."""
    for i, example in enumerate(world.source("train", 300)):
        scene = of_scene(world.scene("train", i))
        for claim in claims_of(example.caption):
            for slot, (kind, value, _) in enumerate(claim.slots):
                words = [[*claim.values[:slot], word, *claim.values[slot + 1 :]] for word in WORDS[kind]]
                assert [w[slot] for w in words if claim.holds(w, scene)[0]] == [value], (example.id, claim.sentence)


def check_truth(caption: Caption, worlds: Worlds) -> Counter[tuple[str, bool]]:
    """Over all worlds, a word needs the image where more than one word makes every claim true somewhere."""
    claims, seen = claims_of(caption.text), Counter()
    for which, claim in enumerate(claims):
        fits = np.ones(len(worlds.number), bool)
        for other in claims[:which] + claims[which + 1 :]:
            fits &= other.holds(other.values, worlds)
        left = worlds.where(fits)
        for slot, (kind, value, start) in enumerate(claim.slots):
            options = worlds.names.get(kind, WORDS[kind])
            filled = ([*claim.values[:slot], word, *claim.values[slot + 1 :]] for word in options)
            right = sum(bool(claim.holds(values, left).any()) for values in filled)
            assert right >= 1, f"no world fits {claim.sentence!r}"
            got = word_at(caption.words, start).needs_image
            assert got == (right > 1), f"{caption.text!r}: {value!r} at {start} needs_image={got}"
            seen[kind, got] += 1
    return seen


def test_words_need_the_image_exactly_when_all_scenes_of_two_solids_say_so(world: RenderedWorld) -> None:
    worlds, seen = every_world(LOOKS, 1, 2), Counter()
    assert len(worlds.number) == 6 * 80 + 15 * 80**2
    for i in range(60):
        scene = world.scene("train", i)
        scene = RenderedScene(scene.solids[: 1 + i % 2], scene.image_size)
        seen += check_truth(write_caption(scene, Draws(5, i), rendered_language(Rules(1, 2)), WEIGHTS), worlds)
    assert all(seen[kind, needs] for kind in ("object", "colour", "position") for needs in (True, False)), seen
    assert seen["material", True] and seen["count", False] and seen["relation", True], seen


@pytest.mark.parametrize(("solids", "most"), [((3,), 40), ((3, 4), 18)])
def test_words_need_the_image_exactly_when_all_scenes_of_more_solids_say_so(
    world: RenderedWorld, solids: tuple[int, ...], most: int
) -> None:
    """With two unnamed shapes and colours standing for all unnamed ones, which no claim tells apart; a material that
    no claim names is left out."""
    seen, checked, rules = Counter(), 0, Rules(min(solids), max(solids))
    for i in range(500):
        scene = world.scene("train", i)
        if len(scene.solids) not in solids:
            continue
        caption = write_caption(scene, Draws(7, i), rendered_language(rules), WEIGHTS)
        told = {(kind, value) for claim in claims_of(caption.text) for kind, value, _ in claim.slots}
        names = {}
        for kind, words in LOOKS.items():
            said = [word for word in words if (kind, word) in told]
            rest = [word for word in words if word not in said]
            names[kind] = said + rest[: (2 if said else 1) if kind == "material" else 2]
        if np.prod([len(words) for words in names.values()]) > most:
            continue  # too many worlds to count; the rules that decide are the same
        seen += check_truth(caption, every_world(names, *rules))
        checked += 1
        if checked == 20:
            break
    assert checked == 20
    assert sum(n for (_, needs), n in seen.items() if not needs), seen
    assert all(seen[kind, True] for kind in ("object", "colour", "position", "count")), seen


def test_no_plain_word_gives_a_name_away(world: RenderedWorld) -> None:
    for example in world.source("train", 500):
        plain = [example.caption[w.start : w.end] for w in example.words if w.kind == "plain"]
        assert not SLOT.search(" ".join(plain)), example
        before = {a.end + 1: example.caption[a.start : a.end] for a in example.words}
        slots = [w for w in example.words if w.kind not in ("plain",) and w.needs_image]
        assert not {before.get(w.start) for w in slots} & {"a", "an"}, example
