"""What the text of a caption determines: facts as data, and an exact search for scenes that fit them.

A word needs the image when, with the word hidden, some other filler still fits: there is a scene (any of the world's,
not only the drawn one) in which all the other facts and the completed one are true. This module decides that by
search, so the truth does not rest on a list of special cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, permutations
from typing import NamedTuple

from mmrpt.world.concepts import COLOUR_NAMES, USUAL_COLOUR
from mmrpt.world.scene import POSITIONS

COUNTS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below", "across from")
CATEGORIES = tuple(USUAL_COLOUR)
OTHER = "*"  # any object or colour that the caption does not name

# Kinds of the slots of every form of fact. "The red card" says that exactly one card is red; "is red" does not.
FORMS: dict[str, tuple[str, ...]] = {
    "object on the colour card": ("object", "colour"),
    "object's card is colour": ("object", "colour"),
    "object at position": ("object", "position"),
    "the colour card at position": ("colour", "position"),
    "card at position is colour": ("position", "colour"),
    "only card shows object": ("object",),
    "only card is colour": ("colour",),
    "only card at position": ("position",),
    "number of cards": ("count",),
    "number of colour cards": ("count", "colour"),
    "object relation object": ("object", "relation", "object"),
    "object relation colour": ("object", "relation", "colour"),
    "colour relation object": ("colour", "relation", "object"),
    "colour relation colour": ("colour", "relation", "colour"),
    "object is a category": ("object", "category"),
}


class Fact(NamedTuple):
    """One statement about the scene. `agrees`: the grammar shows whether its count is one or more ("two cards are")."""

    form: str
    values: tuple[str, ...]
    agrees: bool = False


@dataclass(frozen=True)
class Rules:
    """What a reader of captions knows about every scene: how many cards, and each object's category."""

    min_cards: int
    max_cards: int
    category: dict[str, str]


def relation(a: int, b: int) -> str:
    """How the card of cell `a` lies to that of cell `b`: one word for each pair, so no answer has a rival."""
    if a // 2 == b // 2:
        return "left of" if a < b else "right of"
    if a % 2 == b % 2:
        return "above" if a < b else "below"
    return "across from"


def needs_image(facts: Sequence[Fact], which: int, slot: int, rules: Rules) -> bool:
    """Whether hiding one slot of one fact leaves more than one filler that fits the rest."""
    fact = facts[which]
    others = [*facts[:which], *facts[which + 1 :]]
    for filler in _fillers(facts, which, slot, rules):
        values = (*fact.values[:slot], filler, *fact.values[slot + 1 :])
        if _possible([*others, fact._replace(values=values)], rules):
            return True
    return False


def _fillers(facts: Sequence[Fact], which: int, slot: int, rules: Rules) -> Iterator[str]:
    """Other words of the slot's kind. One unnamed object stands for all, since no fact tells them apart."""
    fact = facts[which]
    kind, value = FORMS[fact.form][slot], fact.values[slot]
    if kind == "object":
        named = {v for f in facts for k, v in zip(FORMS[f.form], f.values, strict=True) if k == "object"}
        like = rules.category[value] if fact.form == "object is a category" else None
        fresh = (o for o, c in rules.category.items() if o not in named and (like is None or c == like))
        yield from (name for name in [*islice(fresh, 1), *sorted(named)] if name != value)
        return
    options = {
        "colour": COLOUR_NAMES,
        "position": POSITIONS,
        "relation": RELATIONS,
        "category": CATEGORIES,
        "count": COUNTS,
    }[kind]
    if kind == "count" and fact.agrees:
        options = COUNTS[:1] if value == "one" else COUNTS[1:]
    yield from (option for option in options if option != value)


class _Demands:
    """The facts sorted by what they ask of a scene. `broken` when they contradict each other on their face."""

    def __init__(self, facts: Sequence[Fact], rules: Rules) -> None:
        self.objects: list[str] = []
        self.colours: list[str] = []
        self.number: set[int] = set(range(rules.min_cards, rules.max_cards + 1))
        self.object_cell: dict[str, int] = {}
        self.cell_colour: dict[int, str] = {}
        self.taken: set[int] = set()  # cells that hold a card of whatever colour
        self.object_colour: dict[str, str] = {}
        self.colour_cell: dict[str, int] = {}
        self.colour_count: dict[str, int] = {}
        self.links: list[tuple[str, str, str, str, str]] = []  # kind a, a, relation, kind b, b
        self.broken = False
        for fact in facts:
            for kind, value in zip(FORMS[fact.form], fact.values, strict=True):
                if kind == "object" and value not in self.objects:
                    self.objects.append(value)
                if kind == "colour" and value not in self.colours:
                    self.colours.append(value)
            self._add(fact, rules)
        self.broken |= len(set(self.object_cell.values())) < len(self.object_cell)

    def _set(self, table: dict, key: object, value: object) -> None:
        if table.setdefault(key, value) != value:
            self.broken = True

    def _add(self, fact: Fact, rules: Rules) -> None:
        form, values = fact.form, fact.values
        if form == "object is a category":
            self.broken |= rules.category[values[0]] != values[1]
        elif form == "object on the colour card":
            self._set(self.object_colour, *values)
            self._set(self.colour_count, values[1], 1)
        elif form == "object's card is colour":
            self._set(self.object_colour, *values)
        elif form == "object at position":
            self._set(self.object_cell, values[0], POSITIONS.index(values[1]))
        elif form == "the colour card at position":
            self._set(self.colour_count, values[0], 1)
            self._set(self.colour_cell, values[0], POSITIONS.index(values[1]))
            self._set(self.cell_colour, POSITIONS.index(values[1]), values[0])
        elif form == "card at position is colour":
            self._set(self.cell_colour, POSITIONS.index(values[0]), values[1])
        elif form == "number of cards":
            self.number &= {COUNTS.index(values[0]) + 1}
        elif form == "number of colour cards":
            self._set(self.colour_count, values[1], COUNTS.index(values[0]) + 1)
        elif form.startswith("only card"):
            self.number &= {1}
            if form == "only card is colour":
                self._set(self.colour_count, values[0], 1)
            elif form == "only card at position":
                self.taken.add(POSITIONS.index(values[0]))
        else:
            kind_a, _, kind_b = FORMS[form]
            self.links.append((kind_a, values[0], values[1], kind_b, values[2]))
            for kind, value in ((kind_a, values[0]), (kind_b, values[2])):
                if kind == "colour":
                    self._set(self.colour_count, value, 1)


def _possible(facts: Sequence[Fact], rules: Rules) -> bool:
    """Whether any scene fits all the facts."""
    wants = _Demands(facts, rules)
    if wants.broken or not wants.number:
        return False
    unnamed = len(rules.category) - len(wants.objects)
    fixed = set(wants.cell_colour) | wants.taken
    for cells in permutations(range(4), len(wants.objects)):
        where = dict(zip(wants.objects, cells, strict=True))
        if any(where[o] != cell for o, cell in wants.object_cell.items()):
            continue
        if any(not _lies(where[a], r, where[b]) for ka, a, r, kb, b in wants.links if ka == kb == "object"):
            continue
        free = [cell for cell in range(4) if cell not in cells]
        for count in wants.number:
            more = count - len(cells)
            if more < 0 or more > min(unnamed, len(free)):
                continue
            for extra in combinations(free, more):
                taken = (*cells, *extra)
                if fixed <= set(taken) and _colourable(taken, where, wants):
                    return True
    return False


def _lies(a: int, relation_name: str, b: int) -> bool:
    return a != b and relation(a, b) == relation_name


def _colourable(cells: tuple[int, ...], where: dict[str, int], wants: _Demands) -> bool:
    """Whether the cards at `cells` can be coloured so that all demands hold."""
    given: dict[int, str] = dict(wants.cell_colour)
    for name, colour in wants.object_colour.items():
        if given.setdefault(where[name], colour) != colour:
            return False
    for colour, cell in wants.colour_cell.items():
        if given.setdefault(cell, colour) != colour:
            return False
    open_cells = [cell for cell in cells if cell not in given]
    options = [*wants.colours, *([OTHER] if len(wants.colours) < len(COLOUR_NAMES) else [])]
    return _fill(open_cells, dict(given), options, where, wants)


def _fill(
    open_cells: list[int], colours: dict[int, str], options: list[str], where: dict[str, int], wants: _Demands
) -> bool:
    """Depth-first over the cells without a colour; counts prune, relations decide at the end."""
    counts = {colour: list(colours.values()).count(colour) for colour in wants.colour_count}
    missing = 0
    for colour, count in wants.colour_count.items():
        if counts[colour] > count:
            return False
        missing += count - counts[colour]
    if missing > len(open_cells):
        return False
    if not open_cells:
        return _links_hold(colours, where, wants)
    return any(_fill(open_cells[1:], {**colours, open_cells[0]: colour}, options, where, wants) for colour in options)


def _links_hold(colours: dict[int, str], where: dict[str, int], wants: _Demands) -> bool:
    for kind_a, a, name, kind_b, b in wants.links:
        cell_a = where[a] if kind_a == "object" else next(cell for cell, colour in colours.items() if colour == a)
        cell_b = where[b] if kind_b == "object" else next(cell for cell, colour in colours.items() if colour == b)
        if not _lies(cell_a, name, cell_b):
            return False
    return True
