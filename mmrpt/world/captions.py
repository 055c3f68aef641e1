"""Captions: which facts of a scene to tell, in which words, and which of those words the image must supply."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from mmrpt.types import Word
from mmrpt.world.draws import Draws
from mmrpt.world.grammar import fact_template, free_sentence
from mmrpt.world.logic import COUNTS, FORMS, Fact, Rules, needs_image, relation
from mmrpt.world.scene import Card, Scene

REPEAT = 0.12  # how often a fact may be about what another sentence already names
FAMILY_WEIGHTS = {"link": 0.62, "relation": 0.16, "count": 0.08, "colour count": 0.06, "category": 0.08}
_TOKEN = re.compile(r"\{(\d)\}|\[(\w+) ([^\]]+)\]")


class Piece(NamedTuple):
    """One sentence before it is set: its template, and the fact it tells (None for a sentence without a fact)."""

    template: str
    fact: Fact | None


def write_caption(scene: Scene, draws: Draws, rules: Rules, sentences: Sequence[float]) -> tuple[str, tuple[Word, ...]]:
    """A caption of the scene with the truth of each of its words.

    `sentences` are the weights of 3, 4, 5 and 6 sentences. At least one sentence tells what only the image knows and
    at least one needs no image.
    """
    while True:
        pieces = _compose(scene, draws, 3 + draws.weighted(sentences))
        text, words = _set_words(pieces, rules)
        if any(word.needs_image for word in words):
            return text, words


def _compose(scene: Scene, draws: Draws, count: int) -> list[Piece]:
    telling = 1 + sum(draws.uniform() < 0.5 for _ in range(count - 2))
    pieces = []
    for fact in choose_facts(scene, draws, min(telling, len(scene.cards) + 2)):
        agreeing = fact.form.startswith("number of") and draws.uniform() < 0.5
        singular, plural = fact_template(draws, fact.form, agreeing)
        template = singular if fact.values[0] == "one" else plural
        for slot, kind in enumerate(FORMS[fact.form]):
            if " relation " in fact.form and kind == "colour":
                template = template.replace(f"{{{slot}}}", f"{{{slot}}} card")
        pieces.append(Piece(template, fact._replace(agrees=agreeing)))
    free: set[str] = set()
    while len(pieces) + len(free) < count:
        free.add(free_sentence(draws))
    return draws.sample([*pieces, *(Piece(text, None) for text in sorted(free))], count)


def choose_facts(scene: Scene, draws: Draws, count: int) -> list[Fact]:
    """Different facts of a scene, mostly about things that the others do not name, so that each needs the image."""
    families = facts_of(scene)
    chosen: list[Fact] = []
    named: set[str] = set()
    while len(chosen) < count:
        names = [name for name, facts in families.items() if facts]
        if not names:
            break
        facts = families[names[draws.weighted([FAMILY_WEIGHTS[name] for name in names])]]
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


def _set_words(pieces: Sequence[Piece], rules: Rules) -> tuple[str, tuple[Word, ...]]:
    """The caption's text, and a Word for each of its words; "top left" and "left of" are one Word each."""
    facts = [piece.fact for piece in pieces if piece.fact is not None]
    text = ""
    words: list[Word] = []

    def add(word: str, kind: str, needs: bool) -> None:
        nonlocal text
        text += " " if text else ""
        words.append(Word(len(text), len(text) + len(word), kind, needs))
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
                kind = FORMS[piece.fact.form][slot]
                needs = needs_image(facts, which, slot, rules)
                add(piece.fact.values[slot], "object" if kind == "category" else kind, needs)
            place = match.end()
        for word in piece.template[place:].split():
            add(word, "plain", False)
        text += "."
    return text, tuple(words)
