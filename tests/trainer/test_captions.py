"""Captions of the drawn world, read back from their text alone: true of the scene, and needing the image exactly when
brute force over every possible scene says so. The reader below shares no code with the writer."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest

from mmrpt.masking.sentences import sentence_spans
from mmrpt.types import Example, Word
from mmrpt.world import Scene, World, WorldConfig
from mmrpt.world.concepts import COLOUR_NAMES, all_concepts
from mmrpt.world.grammar import FRAGMENTS

COUNT = {"one": 1, "two": 2, "three": 3, "four": 4}
CELL = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
RELATION = ("left of", "right of", "above", "below", "across from")
KNOWN = {re.sub(r"\[\w+ ([^\]]+)\]", r"\1", text) for text in FRAGMENTS["known"]}
CATEGORY = {c.name: c.category for c in all_concepts()}
SLOT = re.compile(
    r"\b(?:(?P<position>(?:top|bottom) (?:left|right))|(?P<relation>left of|right of|above|below|across from)"
    rf"|(?P<count>one|two|three|four)|(?P<colour>{'|'.join(COLOUR_NAMES)})|(?P<object>{'|'.join(CATEGORY)})"
    rf"|kind of (?P<category>{'|'.join(sorted(set(CATEGORY.values())))}))\b"
)


class Claim:
    """One sentence as a predicate of scenes, its slots in the order of the text."""

    def __init__(self, sentence: str, start: int) -> None:
        self.sentence = sentence
        self.slots = [(m.lastgroup, m[m.lastgroup], start + m.start(m.lastgroup)) for m in SLOT.finditer(sentence)]
        self.kinds = tuple(kind for kind, _, _ in self.slots)
        self.values = [value for _, value, _ in self.slots]
        self.definite = [kind == "colour" and f"{value} card " in f"{sentence} " for kind, value, _ in self.slots]
        self.only = len(self.slots) == 1 and self.kinds != ("count",)
        self.agrees = "count" in self.kinds and re.search(r"(one|two|three|four) (of the )?cards?\b", sentence)

    def holds(self, values: list[str], worlds: Worlds) -> np.ndarray:
        """(W,) bool: in which worlds the sentence is true with these words in its slots."""
        if self.only:
            (kind,), (value,) = self.kinds, values
            return (worlds.number == 1) & worlds.has(kind, value).any(1)
        if "relation" in self.kinds:
            (kind_a, _, kind_b), (a, name, b) = self.kinds, values
            first, second = worlds.the(kind_a, a), worlds.the(kind_b, b)
            lies = np.array([[relation(i, j) == name for j in range(4)] for i in range(4)])
            return np.einsum("wi,ij,wj->w", first.astype(int), lies.astype(int), second.astype(int)) > 0
        if "count" in self.kinds:
            number = COUNT[values[self.kinds.index("count")]]
            if self.kinds == ("count",):
                return worlds.number == number
            return worlds.has("colour", values[self.kinds.index("colour")]).sum(1) == number
        if "category" in self.kinds:
            name, category = values
            return worlds.has("object", name).any(1) & (CATEGORY[name] == category)
        cards = worlds.taken.copy()
        for kind, value, definite in zip(self.kinds, values, self.definite, strict=True):
            cards &= worlds.the(kind, value) if definite else worlds.has(kind, value)
        return cards.any(1)


class Worlds:
    """W scenes at once: per cell the number of its object and colour, -1 where there is no card. (W, 4) each."""

    def __init__(self, objects: np.ndarray, colours: np.ndarray, names: list[str], tints: list[str]) -> None:
        self.objects, self.colours, self.names, self.tints = objects, colours, names, tints
        self.taken = objects >= 0
        self.number = self.taken.sum(1)

    def has(self, kind: str, value: str) -> np.ndarray:
        """(W, 4) bool: which cards have this object, colour or position."""
        if kind == "position":
            row, column = CELL[value]
            return self.taken & (np.arange(4) == 2 * row + column)
        numbers, names = (self.objects, self.names) if kind == "object" else (self.colours, self.tints)
        return numbers == names.index(value) if value in names else np.zeros_like(self.taken)

    def the(self, kind: str, value: str) -> np.ndarray:
        """As `has`, but nothing where more than one card has it: "the red card" speaks of one."""
        cards = self.has(kind, value)
        return cards & (cards.sum(1, keepdims=True) == 1)

    def where(self, chosen: np.ndarray) -> Worlds:
        return Worlds(self.objects[chosen], self.colours[chosen], self.names, self.tints)


def relation(a: int, b: int) -> str | None:
    (row_a, column_a), (row_b, column_b) = divmod(a, 2), divmod(b, 2)
    if a == b:
        return None
    if row_a == row_b:
        return "left of" if column_a < column_b else "right of"
    if column_a == column_b:
        return "above" if row_a < row_b else "below"
    return "across from"


def of_scene(scene: Scene) -> Worlds:
    names, tints = sorted(CATEGORY), list(COLOUR_NAMES)
    objects, colours = np.full((1, 4), -1), np.full((1, 4), -1)
    for card in scene.cards:
        left, top, right, bottom = card.box
        cell = 2 * ((top + bottom) > scene.image_size) + ((left + right) > scene.image_size)
        objects[0, cell], colours[0, cell] = names.index(card.object), tints.index(card.colour)
    return Worlds(objects, colours, names, tints)


def every_world(names: list[str], tints: list[str], low: int, high: int) -> Worlds:
    """All scenes of `low` to `high` cards with distinct objects of `names` in colours of `tints`."""
    objects, colours = [], []
    for count in range(low, high + 1):
        grid = np.indices((len(names),) * count + (len(tints),) * count, np.int8).reshape(2 * count, -1)
        things, paints = grid[:count], grid[count:]
        distinct = np.all(
            [things[i] != things[j] for i, j in combinations(range(count), 2)] or [things[0] >= 0], axis=0
        )
        for cells in combinations(range(4), count):
            for table, part in ((objects, things), (colours, paints)):
                full = np.full((int(distinct.sum()), 4), -1, np.int8)
                full[:, cells] = part[:, distinct].T
                table.append(full)
    return Worlds(np.concatenate(objects), np.concatenate(colours), names, tints)


def claims_of(example: Example) -> list[Claim]:
    spans = sentence_spans(example.caption)
    texts = [(example.caption[a:b].rstrip("."), a) for a, b in spans]
    return [c for c in (Claim(text, a) for text, a in texts if text not in KNOWN) if c.slots]


def word_at(example: Example, start: int) -> Word:
    return next(word for word in example.words if word.start == start)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def examples(world: World) -> list[Example]:
    return list(world.source("train", 3000))


def test_the_form_of_captions(world: World, examples: list[Example]) -> None:
    vocabulary = set(world.vocabulary())
    lengths, sentences = [], Counter()
    for example in examples:
        caption = example.caption
        spans = sentence_spans(caption)
        assert caption == caption.lower() and "  " not in caption and caption == caption.strip()
        assert " ".join(caption[a:b] for a, b in spans) == caption
        assert all(caption[a:b].endswith(".") and caption[a:b].count(".") == 1 for a, b in spans)
        # every word lies in exactly one Word, in order; what is left are the stops
        rest = caption
        for word in reversed(example.words):
            rest = rest[: word.start] + rest[word.end :]
        assert set(rest) <= {".", " "}
        assert all(a.end < b.start for a, b in zip(example.words, example.words[1:], strict=False))
        assert set(caption.replace(".", "").split()) <= vocabulary
        lengths.append(len(caption.split()))
        sentences[len(spans)] += 1
        needing = [any(w.needs_image for w in example.words if a <= w.start < b) for a, b in spans]
        assert any(needing) and not all(needing), caption
    assert set(sentences) == {3, 4, 5, 6}
    assert 30 <= np.mean(lengths) <= 36, np.mean(lengths)


def test_the_vocabulary_is_bounded_and_used(world: World, examples: list[Example]) -> None:
    said = Counter(word for e in examples for word in e.caption.replace(".", "").split())
    assert len(world.vocabulary()) <= 460
    unused = set(world.vocabulary()) - set(said)
    assert not unused, f"never said in {len(examples)} captions: {sorted(unused)}"


def test_about_half_of_the_sentences_need_the_image_and_neither_place_nor_first_word_tells(
    examples: list[Example],
) -> None:
    by_word, by_place, total, needing = defaultdict(Counter), defaultdict(Counter), 0, 0
    for example in examples:
        for place, (a, b) in enumerate(sentence_spans(example.caption)):
            needs = any(w.needs_image for w in example.words if a <= w.start < b)
            by_word[example.caption[a:b].split()[0]][needs] += 1
            by_place[place][needs] += 1
            total, needing = total + 1, needing + needs
    assert 0.4 < needing / total < 0.55, needing / total
    for table, limit in ((by_word, 0.75), (by_place, 0.6)):
        assert sum(max(c.values()) for c in table.values()) / total < limit, table
    assert all(0.2 < by_word[w][True] / by_word[w].total() < 0.85 for w in ("the", "on", "in", "at", "you", "we"))


def test_every_claim_is_true_of_its_scene_and_every_word_has_its_kind(world: World) -> None:
    for split in world.SPLITS:
        for i, example in enumerate(world.source(split, 400)):
            scene = of_scene(world.scene(split, i))
            claims = claims_of(example)
            kinds = {}
            for claim in claims:
                assert claim.holds(claim.values, scene)[0], f"{example.id}: {claim.sentence!r} is false"
                for kind, value, start in claim.slots:
                    kinds[start] = (start + len(value), "object" if kind == "category" else kind)
            told = {w.start: (w.end, w.kind) for w in example.words if w.kind != "plain"}
            spans = sentence_spans(example.caption)
            known = [(a, b) for a, b in spans if example.caption[a : b - 1] in KNOWN]
            assert kinds == {k: v for k, v in told.items() if not any(a <= k < b for a, b in known)}, example
            assert not any(word_at(example, k).needs_image for k in told if k not in kinds)


def options(kind: str, claim: Claim, value: str, names: list[str], tints: list[str]) -> list[str]:
    """Every word that fits the gap grammatically."""
    if kind == "count" and claim.agrees:
        return ["one"] if value == "one" else ["two", "three", "four"]
    table = {
        "object": names,
        "colour": tints,
        "position": list(CELL),
        "relation": list(RELATION),
        "count": list(COUNT),
        "category": sorted(set(CATEGORY.values())),
    }
    return table[kind]


def needs_by_brute_force(claims: list[Claim], which: int, slot: int, worlds: Worlds) -> bool:
    """Whether, over all worlds, more than one word makes every claim true somewhere."""
    fits = np.ones(len(worlds.number), bool)
    for k, other in enumerate(claims):
        if k != which:
            fits &= other.holds(other.values, worlds)
    left, claim = worlds.where(fits), claims[which]
    right = 0
    for word in options(claim.kinds[slot], claim, claim.values[slot], worlds.names, worlds.tints):
        right += bool(claim.holds([*claim.values[:slot], word, *claim.values[slot + 1 :]], left).any())
    assert right >= 1, f"no world fits {claim.sentence!r}"
    return right > 1


def check_truth(world: World, example: Example, worlds: Worlds) -> Counter[tuple[str, bool]]:
    claims, seen = claims_of(example), Counter()
    for which, claim in enumerate(claims):
        for slot, (kind, value, start) in enumerate(claim.slots):
            expected = needs_by_brute_force(claims, which, slot, worlds)
            got = word_at(example, start).needs_image
            assert got == expected, f"{example.id} {example.caption!r}: {value!r} at {start} needs_image={got}"
            seen[kind, got] += 1
    return seen


def test_words_need_the_image_exactly_when_all_two_card_worlds_say_so() -> None:
    world = World(WorldConfig(concepts=16, max_cards=2))
    worlds = every_world([c.name for c in world.concepts], list(COLOUR_NAMES), 1, 2)
    assert len(worlds.number) == 4 * 16 * 8 + 6 * 16 * 15 * 64
    seen = Counter()
    for split in ("train", "new_combinations"):
        for example in world.source(split, 40):
            seen += check_truth(world, example, worlds)
    assert seen["position", False] and seen["position", True] and seen["object", False] and seen["object", True]


def test_words_need_the_image_exactly_when_all_four_card_worlds_say_so(world: World) -> None:
    """Full size, with two unnamed objects and colours standing for all unnamed ones, which no claim tells apart."""
    seen, checked = Counter(), 0
    for i, example in enumerate(world.source("train", 400)):
        claims = claims_of(example)
        named = [v for c in claims for k, v, _ in c.slots if k == "object"]
        tints = sorted({v for c in claims for k, v, _ in c.slots if k == "colour"})
        if len(world.scene("train", i).cards) < 2 or len(set(named)) > 4 or len(tints) > 3:
            continue  # too many worlds to count; the rules that decide are the same
        like = {CATEGORY[v] for c in claims for k, v, _ in c.slots if k == "object" and "category" in c.kinds}
        unnamed = [n for n in sorted(CATEGORY) if n not in named]
        # each category spoken of keeps an unnamed object, of which "is a kind of ..." could also be said
        fresh = [next(n for n in unnamed if CATEGORY[n] == category) for category in sorted(like)]
        fresh += [n for n in unnamed if n not in fresh][: max(0, max(2, 5 - len(set(named))) - len(fresh))]
        names = sorted(set(named)) + fresh
        tints += [t for t in COLOUR_NAMES if t not in tints][:2]
        seen += check_truth(world, example, every_world(names, tints, 1, 4))
        checked += 1
        if checked == 100:
            break
    assert checked == 100
    for kind in ("object", "colour", "position"):
        assert seen[kind, True], seen


def test_a_hidden_word_that_needs_the_image_has_one_right_answer(world: World) -> None:
    for i, example in enumerate(world.source("train", 400)):
        scene = of_scene(world.scene("train", i))
        for claim in claims_of(example):
            for slot, (kind, value, start) in enumerate(claim.slots):
                if not word_at(example, start).needs_image:
                    continue
                words = options(kind, claim, value, scene.names, scene.tints)
                right = [
                    w for w in words if claim.holds([*claim.values[:slot], w, *claim.values[slot + 1 :]], scene)[0]
                ]
                assert right == [value], f"{example.id}: {claim.sentence!r} could also say {right}"


def test_word_class_and_truth_are_not_the_same_thing(examples: list[Example]) -> None:
    seen = Counter((word.kind, word.needs_image) for example in examples for word in example.words)
    for kind in ("object", "colour", "count", "position", "relation"):
        assert seen[kind, True] > 30 and seen[kind, False] > 30, (kind, seen)
    assert not seen["plain", True]
    visual = sum(n for (kind, _), n in seen.items() if kind != "plain")
    assert 0.05 < sum(n for (k, needs), n in seen.items() if k != "plain" and not needs) / visual < 0.3


def test_no_article_or_plain_word_gives_a_name_away(world: World, examples: list[Example]) -> None:
    from mmrpt.world.grammar import plain_words

    names = set(CATEGORY) | set(COLOUR_NAMES)
    assert not plain_words() & (names | set(COUNT) | {"top", "bottom"})
    for example in examples:
        for word in example.words:
            if word.needs_image:
                before = example.caption[: word.start].split()
                assert not before or before[-1] not in ("a", "an"), example.caption
