"""The sentences of the rendered world: what differs from the grammar of the drawn one, and the facts of a scene."""

from __future__ import annotations

from collections import Counter
from itertools import product

from mmrpt.world import grammar
from mmrpt.world.captions import Language, Piece, name_colours
from mmrpt.world.draws import Draws
from mmrpt.world.logic import Fact
from mmrpt.world.rendered.logic import FORMS, VALUES, Rules, needs_image, truths
from mmrpt.world.rendered.scene import RenderedScene

# How a solid is named by its object, colour or position, and what is told of it. No article stands before a slot that
# would give its first letter away, and a slot's place tells its kind.
SUBJECTS = {"object": "the {0}", "colour": "the {0} solid", "position": "the solid at the {0}"}
PREDICATES: dict[str, tuple[str, ...]] = {
    "object": (
        "<solid> has the shape {1}",
        "the shape of <solid> is {1}",
        "in the picture <solid> has the shape {1}",
        "on the table <solid> has the shape {1}",
        "you can see that <solid> has the shape {1}",
        "we see that the shape of <solid> is {1}",
        "someone gave <solid> the shape {1}",
    ),
    "colour": (
        "<solid> is painted {1}",
        "<solid> has the colour {1}",
        "the colour of <solid> is {1}",
        "in the picture <solid> is painted {1}",
        "on the table <solid> has the colour {1}",
        "you can see that <solid> is painted {1}",
        "we see that the colour of <solid> is {1}",
        "someone painted <solid> {1}",
    ),
    "material": (
        "<solid> is made of {1}",
        "the material of <solid> is {1}",
        "in the picture <solid> is made of {1}",
        "on the table <solid> is made of {1}",
        "you can see that <solid> is made of {1}",
        "we see that <solid> is made of {1}",
        "someone made <solid> of {1}",
    ),
    "position": (
        "<solid> is at the {1}",
        "<solid> stands at the {1}",
        "at the {1} there is <solid>",
        "at the {1} you can see <solid>",
        "in the picture <solid> is at the {1}",
        "on the table <solid> stands at the {1}",
        "you can find <solid> at the {1}",
        "we see <solid> at the {1}",
        "someone put <solid> at the {1}",
        "there is <solid> at the {1}",
    ),
}
FAMILY_WEIGHTS = {"object": 0.2, "colour": 0.22, "material": 0.12, "position": 0.2, "relation": 0.24, "count": 0.12}

# The drawn world's words for what is not there: the same sentences speak of a table with solids on it.
INSTEAD = {"card": "solid", "cards": "solids", "page": "table", "paper": "cloth", "ink": "lamp", "back": "underside"}


def _translated(text: str) -> str:
    return " ".join(INSTEAD.get(word, word) for word in text.split())


FACT_TEMPLATES: dict[str, tuple[str, ...]] = {
    **{
        f"{subject} has {predicate}": tuple(text.replace("<solid>", name) for text in texts)
        for (subject, name), (predicate, texts) in product(SUBJECTS.items(), PREDICATES.items())
        if subject != predicate
    },
    "relation": tuple(map(_translated, grammar.FACT_TEMPLATES["relation"])),
    "number of solids": tuple(map(_translated, grammar.FACT_TEMPLATES["number of cards"])),
    "number of colour": tuple(map(_translated, grammar.FACT_TEMPLATES["number of colour cards"])),
}
for _kind, _told in {"object": "solids with the shape {1}", "material": "solids made of {1}"}.items():
    FACT_TEMPLATES[f"number of {_kind}"] = tuple(
        text.replace("{1} solids", _told) for text in FACT_TEMPLATES["number of colour"]
    )
# "behind" is a relation here, which no sentence that needs no image may hold outside a mark.
FREE_TEMPLATES = tuple((_translated(t), weight) for t, weight in grammar.FREE_TEMPLATES if not t.startswith("behind"))
FRAGMENTS = {name: tuple(map(_translated, texts)) for name, texts in grammar.FRAGMENTS.items()}
FRAGMENTS["known"] = (
    *(text for text in FRAGMENTS["known"] if "[relation" not in text),
    "a driver sits [relation behind] the wheel",
    "people sit [relation in front of] the stage",
    "a coin is made of [material metal]",
    "a tyre is made of [material rubber]",
    "a ball has the shape [object sphere]",
)


def rendered_language(rules: Rules) -> Language:
    """The language of the rendered world, for scenes of which a reader knows the rules."""
    return Language(
        FORMS,
        FAMILY_WEIGHTS,
        facts_of,
        lambda scene: len(scene.solids) + 2,
        _piece,
        lambda draws: grammar.free_sentence(draws, FREE_TEMPLATES, FRAGMENTS),
        lambda facts, which, slot: needs_image(facts, which, slot, rules),
    )


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can contain, without stops, sorted."""
    texts = [t for group in FACT_TEMPLATES.values() for t in group]
    texts += [t for t, _ in FREE_TEMPLATES] + [t for group in FRAGMENTS.values() for t in group]
    values = {word for values in VALUES.values() for value in values for word in value.split()}
    return tuple(sorted(grammar.words_outside_marks(texts) | values))


def facts_of(scene: RenderedScene) -> dict[str, list[Fact]]:
    """Every fact the grammar can tell of a scene, by family. Each hidden word has exactly one right answer: a fact
    that another filler of one of its slots would leave true is not told."""
    families: dict[str, list[Fact]] = {name: [] for name in FAMILY_WEIGHTS}
    for form, kinds in FORMS.items():
        family = next(kind for kind in ("relation", "count", kinds[-1]) if kind in kinds)
        true = truths(form, scene.solids)
        alike = Counter(rest for values in true for rest in _rests(values))
        families[family] += [Fact(form, values) for values in true if all(alike[rest] == 1 for rest in _rests(values))]
    return families


def _rests(values: tuple[str, ...]) -> list[tuple[str | None, ...]]:
    """The values with each slot hidden in turn."""
    return [(*values[:slot], None, *values[slot + 1 :]) for slot in range(len(values))]


def _piece(fact: Fact, draws: Draws) -> Piece:
    template = draws.pick(FACT_TEMPLATES["relation" if " relation " in fact.form else fact.form])
    return Piece(name_colours(template, fact, FORMS, "solid"), fact)
