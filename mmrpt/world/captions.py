"""Captions: which facts of a scene to tell, in which words, and which of those words the image must supply."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmrpt.types import Word
from mmrpt.world.draws import Draws
from mmrpt.world.grammar import fact_template, free_sentence
from mmrpt.world.logic import COUNTS, FORMS, Fact, Rules, needs_image, relation
from mmrpt.world.scene import Card, Scene

REPEAT = 0.12  # how often a fact may be about what another sentence already names
FAMILY_WEIGHTS = {"link": 0.62, "relation": 0.16, "count": 0.08, "colour count": 0.06, "category": 0.08}
Boxes = tuple[tuple[int, int, int, int], ...]  # (left, top, right, bottom) in pixels, right and bottom exclusive
_TOKEN = re.compile(r"\{(\d)\}|\[(\w+) ([^\]]+)\]")


class Piece(NamedTuple):
    """One sentence before it is set: its template, and the fact it tells (None for a sentence without a fact)."""

    template: str
    fact: Fact | None


class Caption(NamedTuple):
    """A text, the truth of each of its words, and for each word the fact and slot it fills (None elsewhere)."""

    text: str
    words: tuple[Word, ...]
    told: tuple[tuple[Fact, int] | None, ...]


@dataclass(frozen=True)
class Language:
    """What the captions of one world are made of.

    `forms` the kinds of the slots of every form of fact; `weights` how often each family of facts is told; `facts_of`
    a scene's facts by family; `most_facts` of a scene in one caption; `piece` sets a fact; `free_sentence` one that
    needs no image; `needs_image` says whether hiding a slot of one of the facts leaves more than one filler.
    """

    forms: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, float]
    facts_of: Callable[[Any], dict[str, list[Fact]]]
    most_facts: Callable[[Any], int]
    piece: Callable[[Fact, Draws], Piece]
    free_sentence: Callable[[Draws], str]
    needs_image: Callable[[Sequence[Fact], int, int], bool]


def drawn_language(rules: Rules) -> Language:
    """The language of the drawn world, for scenes of which a reader knows the rules."""
    return Language(
        FORMS,
        FAMILY_WEIGHTS,
        facts_of,
        lambda scene: len(scene.cards) + 2,
        _piece,
        free_sentence,
        lambda facts, which, slot: needs_image(facts, which, slot, rules),
    )


def write_caption(scene: Any, draws: Draws, language: Language, sentences: Sequence[float]) -> Caption:
    """A caption of the scene with the truth of each of its words.

    `sentences` are the weights of 3, 4, 5 and 6 sentences. At least one sentence tells what only the image knows and
    at least one needs no image.
    """
    while True:
        caption = _set_words(_compose(scene, draws, language, 3 + draws.weighted(sentences)), language)
        if any(word.needs_image for word in caption.words):
            return caption


def write_facts(scene: Any, draws: Draws, language: Language) -> Caption:
    """A caption of the scene that tells as many facts as one may, and nothing else."""
    facts = choose_facts(scene, draws, language, language.most_facts(scene))
    return _set_words([language.piece(fact, draws) for fact in facts], language)


def _compose(scene: Any, draws: Draws, language: Language, count: int) -> list[Piece]:
    telling = 1 + sum(draws.uniform() < 0.5 for _ in range(count - 2))
    facts = choose_facts(scene, draws, language, min(telling, language.most_facts(scene)))
    pieces = [language.piece(fact, draws) for fact in facts]
    free: set[str] = set()
    while len(pieces) + len(free) < count:
        free.add(language.free_sentence(draws))
    return draws.sample([*pieces, *(Piece(text, None) for text in sorted(free))], count)


def _piece(fact: Fact, draws: Draws) -> Piece:
    agreeing = fact.form.startswith("number of") and draws.uniform() < 0.5
    singular, plural = fact_template(draws, fact.form, agreeing)
    template = singular if fact.values[0] == "one" else plural
    return Piece(name_colours(template, fact, FORMS, "card"), fact._replace(agrees=agreeing))


def name_colours(template: str, fact: Fact, forms: Mapping[str, tuple[str, ...]], noun: str) -> str:
    """The template of a relation, in which what is named by its colour gets a noun: "the red card is left of ..."."""
    for slot, kind in enumerate(forms[fact.form]):
        if " relation " in fact.form and kind == "colour":
            template = template.replace(f"{{{slot}}}", f"{{{slot}}} {noun}")
    return template


def choose_facts(scene: Any, draws: Draws, language: Language, count: int) -> list[Fact]:
    """Different facts of a scene, mostly about things that the others do not name, so that each needs the image."""
    families = language.facts_of(scene)
    chosen: list[Fact] = []
    named: set[str] = set()
    while len(chosen) < count:
        names = [name for name, facts in families.items() if facts]
        if not names:
            break
        facts = families[names[draws.weighted([language.weights[name] for name in names])]]
        if draws.uniform() >= REPEAT:
            overlap = [sum(value in named for value in fact.values) for fact in facts]
            fact = draws.pick([f for f, o in zip(facts, overlap, strict=True) if o == min(overlap)])
        else:
            fact = draws.pick(facts)
        facts.remove(fact)
        chosen.append(fact)
        named.update(fact.values)
    return chosen


def facts_of(scene: Scene) -> dict[str, list[Fact]]:
    """Every fact the grammar can tell of a scene, by family. Each hidden word has exactly one right answer."""
    cards = scene.cards
    colours = [card.colour for card in cards]
    counts = {colour: colours.count(colour) for colour in colours}
    links = [fact for card in cards for fact in _links(card, counts[card.colour] == 1, len(cards) == 1)]
    relations = []
    for a in cards:
        for b in cards:
            if a is not b:
                name = relation(a.cell, b.cell)
                for kind_a, value_a in _handles(a, counts):
                    for kind_b, value_b in _handles(b, counts):
                        relations.append(Fact(f"{kind_a} relation {kind_b}", (value_a, name, value_b)))
    # "two cards are red" is told only when no other colour has two cards: the hidden colour has one answer.
    colour_counts = [
        Fact("number of colour cards", (COUNTS[n - 1], colour))
        for colour, n in counts.items()
        if list(counts.values()).count(n) == 1
    ]
    categories = [card.category for card in cards]
    kinds = [Fact("object is a category", (c.object, c.category)) for c in cards if categories.count(c.category) == 1]
    return {
        "link": links,
        "relation": relations,
        "count": [Fact("number of cards", (COUNTS[len(cards) - 1],))],
        "colour count": colour_counts if len(cards) > 1 else [],
        "category": kinds,
    }


def _handles(card: Card, counts: dict[str, int]) -> list[tuple[str, str]]:
    """How a card may be named: by its object, and by its colour when no other card has it."""
    return [("object", card.object)] + ([("colour", card.colour)] if counts[card.colour] == 1 else [])


def boxes_told(caption: Caption, things: Sequence[Any], forms: Mapping[str, tuple[str, ...]]) -> tuple[Boxes, ...]:
    """For each word of a true caption the boxes of the cards or solids that it speaks of; none for plain words.

    Of "the red card is left of the bear" that of the red card for "red", both for "left of", the bear's for "bear"; of
    a number the boxes of all that are counted.
    """
    return tuple(
        () if tells is None else tuple(thing.box for thing in _things_told(*tells, things, forms[tells[0].form]))
        for tells in caption.told
    )


def _things_told(fact: Fact, slot: int, things: Sequence[Any], kinds: Sequence[str]) -> list[Any]:
    def named(slot: int) -> list[Any]:
        return [thing for thing in things if getattr(thing, kinds[slot]) == fact.values[slot]]

    if kinds[0] == "count":
        return named(1) if len(kinds) > 1 else list(things)
    if "relation" in kinds:
        return [thing for end in ((0, 2) if slot == 1 else (slot,)) for thing in named(end)]
    return named(0)


def _links(card: Card, colour_is_unique: bool, alone: bool) -> list[Fact]:
    if alone:
        return [
            Fact("only card shows object", (card.object,)),
            Fact("only card is colour", (card.colour,)),
            Fact("only card at position", (card.position,)),
            Fact("object's card is colour", (card.object, card.colour)),
            Fact("object at position", (card.object, card.position)),
        ]
    facts = [Fact("object at position", (card.object, card.position))]
    if colour_is_unique:
        # Of two red cards, "the card with the ... is red" would have two right answers.
        facts.append(Fact("object's card is colour", (card.object, card.colour)))
        facts.append(Fact("card at position is colour", (card.position, card.colour)))
        facts.append(Fact("object on the colour card", (card.object, card.colour)))
        facts.append(Fact("the colour card at position", (card.colour, card.position)))
    return facts


def _set_words(pieces: Sequence[Piece], language: Language) -> Caption:
    """The caption's text, and a Word for each of its words; "top left" and "left of" are one Word each."""
    facts = [piece.fact for piece in pieces if piece.fact is not None]
    text = ""
    words: list[Word] = []
    told: list[tuple[Fact, int] | None] = []

    def add(word: str, kind: str, needs: bool, tells: tuple[Fact, int] | None = None) -> None:
        nonlocal text
        text += " " if text else ""
        words.append(Word(len(text), len(text) + len(word), kind, needs))
        told.append(tells)
        text += word

    which = -1
    for piece in pieces:
        which += piece.fact is not None
        place = 0
        for match in _TOKEN.finditer(piece.template):
            for word in piece.template[place : match.start()].split():
                add(word, "plain", False)
            if match.group(1) is None or piece.fact is None:
                add(match.group(3), match.group(2), False)
            else:
                slot = int(match.group(1))
                kind = language.forms[piece.fact.form][slot]
                needs = language.needs_image(facts, which, slot)
                add(piece.fact.values[slot], "object" if kind == "category" else kind, needs, (piece.fact, slot))
            place = match.end()
        for word in piece.template[place:].split():
            add(word, "plain", False)
        text += "."
    return Caption(text, tuple(words), tuple(told))
