"""What the text of a caption of the rendered world determines: its facts as data, and whether a scene fits them.

As in `mmrpt.world.logic`, a word needs the image when, with the word hidden, another filler still fits: there is a
scene in which all the other facts and the completed one are true. Shapes may repeat here, so a fact names its solids by
what only they have: "the cube" and "the red solid" say that there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from mmrpt.world.logic import Fact
from mmrpt.world.rendered.scene import COLOUR_NAMES, MATERIALS, POSITIONS, SHAPES, Solid

COUNTS = ("one", "two", "three", "four", "five")
RELATIONS = ("left of", "right of", "behind", "in front of")
VALUES: dict[str, tuple[str, ...]] = {
    "object": SHAPES,
    "colour": COLOUR_NAMES,
    "material": MATERIALS,
    "position": POSITIONS,
    "relation": RELATIONS,
    "count": COUNTS,
}
LOOKS = ("object", "colour", "material")

# Kinds of the slots of every form of fact. In "colour has object" the colour names the solid and is its alone; the
# object is what is told of it.
FORMS: dict[str, tuple[str, ...]] = {
    **{f"{a} has {b}": (a, b) for a in ("object", "colour", "position") for b in (*LOOKS, "position") if a != b},
    **{f"{a} relation {b}": (a, "relation", b) for a, b in product(("object", "colour"), repeat=2)},
    "number of solids": ("count",),
    **{f"number of {kind}": ("count", kind) for kind in LOOKS},
}


class Rules(NamedTuple):
    """What a reader of captions knows about every scene: how many solids there are."""

    least: int
    most: int


def lies(a: int, b: int, relation: str) -> bool:
    """Whether a solid of cell `a` is `relation` one of cell `b`. Left and right compare columns, whatever the rows."""
    (row_a, column_a), (row_b, column_b) = divmod(a, 3), divmod(b, 3)
    return {
        "left of": column_a < column_b,
        "right of": column_a > column_b,
        "behind": row_a < row_b,
        "in front of": row_a > row_b,
    }[relation]


def named(solids: Sequence[Solid], kind: str, value: str) -> list[Solid]:
    """The solids that have a value: one, where "the cube" may be said."""
    return [solid for solid in solids if getattr(solid, kind) == value]


def truths(form: str, solids: Sequence[Solid]) -> list[tuple[str, ...]]:
    """The values of every fact of a form that is true of a scene."""
    kinds = FORMS[form]
    if kinds == ("count",):
        return [(COUNTS[len(solids) - 1],)]
    if kinds[0] == "count":
        counts = Counter(getattr(solid, kinds[1]) for solid in solids)
        return [(COUNTS[count - 1], value) for value, count in counts.items()]
    first = _alone(solids, kinds[0])
    if kinds[1] != "relation":
        return [(name, getattr(solid, kinds[1])) for name, solid in first.items()]
    pairs = product(first.items(), _alone(solids, kinds[2]).items())
    return [(a, r, b) for (a, one), (b, two) in pairs for r in RELATIONS if lies(one.cell, two.cell, r)]


def _alone(solids: Sequence[Solid], kind: str) -> dict[str, Solid]:
    """Each value of a kind that one solid alone has, with that solid."""
    counts = Counter(getattr(solid, kind) for solid in solids)
    return {value: solid for solid in solids if counts[value := getattr(solid, kind)] == 1}


def needs_image(facts: Sequence[Fact], which: int, slot: int, rules: Rules) -> bool:
    """Whether hiding one slot of one fact leaves more than one filler that fits the rest."""
    form, values, _ = facts[which]
    others = (value for value in VALUES[FORMS[form][slot]] if value != values[slot])
    refilled = (Fact(form, (*values[:slot], value, *values[slot + 1 :])) for value in others)
    return any(possible([*facts[:which], fact, *facts[which + 1 :]], rules) for fact in refilled)


def possible(facts: Sequence[Fact], rules: Rules) -> bool:
    """Whether any scene fits all the facts.

    Solids that are named stand in some cells: all ways are tried. Then each look is a matter of numbers alone, since
    facts that name no solid only count: it is possible where the solids without a value of it can take those that are
    missing, and a value that is not counted if there are more of them.
    """
    demands = _Demands(facts, rules)
    if demands.broken:
        return False
    return any(
        demands.related(where) and any(demands.counted(looks, number) for number in demands.numbers)
        for where, looks in demands.placements()
    )


class _Demands:
    """The facts sorted by what they ask of a scene. `broken` when they contradict each other on their face."""

    def __init__(self, facts: Sequence[Fact], rules: Rules) -> None:
        self.numbers = set(range(rules.least, rules.most + 1))
        self.counts: dict[tuple[str, str], int] = {}  # of (kind, value): so many solids have it
        self.told: dict[tuple[str, str], list[tuple[str, str]]] = {}  # of the solid named so: what it has besides
        self.links: list[tuple[tuple[str, str], str, tuple[str, str]]] = []
        self.broken = False
        for fact in facts:
            kinds, values = FORMS[fact.form], fact.values
            if kinds == ("count",):
                self.numbers &= {COUNTS.index(values[0]) + 1}
            elif kinds[0] == "count":
                self._count(kinds[1], values[1], COUNTS.index(values[0]) + 1)
            elif kinds[1] == "relation":
                ends = ((kinds[0], values[0]), (kinds[2], values[2]))
                for end in ends:
                    self._name(*end)
                self.links.append((ends[0], values[1], ends[1]))
            else:
                self._name(kinds[0], values[0]).append((kinds[1], values[1]))

    def _count(self, kind: str, value: str, number: int) -> None:
        self.broken |= self.counts.setdefault((kind, value), number) != number

    def _name(self, kind: str, value: str) -> list[tuple[str, str]]:
        if kind != "position":  # which belongs to one solid in any case
            self._count(kind, value, 1)
        return self.told.setdefault((kind, value), [])

    def placements(self) -> Iterator[tuple[dict[tuple[str, str], int], dict[int, dict[str, str]]]]:
        """(cell of each named solid, looks by cell): every way in which what is told of them agrees."""
        names = sorted(self.told, key=lambda name: name[0] != "position")  # those of one cell first: fewer ways

        def extend(
            where: dict[tuple[str, str], int], looks: dict[int, dict[str, str]]
        ) -> Iterator[tuple[dict[tuple[str, str], int], dict[int, dict[str, str]]]]:
            if len(where) == len(names):
                yield where, looks
                return
            name = names[len(where)]
            for cell, position in enumerate(POSITIONS):
                has = {"position": position, **looks.get(cell, {})}
                if all(has.setdefault(kind, value) == value for kind, value in (name, *self.told[name])):
                    yield from extend({**where, name: cell}, {**looks, cell: has})

        return extend({}, {})

    def related(self, where: dict[tuple[str, str], int]) -> bool:
        return all(lies(where[a], where[b], relation) for a, relation, b in self.links)

    def counted(self, looks: dict[int, dict[str, str]], number: int) -> bool:
        """Whether `number` solids, those with `looks` among them, can have every value as often as is told."""
        if number < len(looks):
            return False
        for kind in LOOKS:
            have = Counter(has[kind] for has in looks.values() if kind in has)
            missing = {value: n - have[value] for (k, value), n in self.counts.items() if k == kind}
            rest = number - have.total() - sum(missing.values())
            if min(missing.values(), default=0) < 0 or rest < 0 or (rest and len(missing) == len(VALUES[kind])):
                return False
        return True
