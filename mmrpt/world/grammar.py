"""The sentences of the world: templates for facts, and a small grammar for sentences that no image can tell.

Rules that keep the truth of words clean:
- no article before an object or colour word, since "an" would give the next letter away;
- a slot's place in its sentence tells its kind, so that a hidden word's kind is never in doubt;
- no word outside the slots is the name of an object, a colour, a position or a relation, except between marks;
- both classes share their opening words, so the first word does not tell whether the image is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from mmrpt.world.draws import Draws

_MARK = re.compile(r"\{[^}]*\}|<[^>]*>|\[[^\]]*\]")

# {0}, {1}, {2} are the slots of the form, in the order of logic.FORMS.
FACT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "object on the colour card": (
        "the {1} card shows the {0}",
        "the {1} card holds the {0}",
        "the {0} is on the {1} card",
        "the {0} sits on the {1} card",
        "on the {1} card you can see the {0}",
        "on the {1} card there is the {0}",
        "in the picture the {1} card shows the {0}",
        "you can find the {0} on the {1} card",
        "we see the {0} on the {1} card",
        "someone put the {0} on the {1} card",
        "there is the {0} on the {1} card",
    ),
    "object's card is colour": (
        "the card with the {0} is {1}",
        "the card of the {0} is painted {1}",
        "the {0} has a card that is {1}",
        "the paper behind the {0} is {1}",
        "behind the {0} the card is {1}",
        "on the page the card with the {0} is {1}",
        "in the picture the {0} has paper that is {1}",
        "someone gave the {0} paper that is {1}",
        "you can see that the card of the {0} is {1}",
        "we see that the paper behind the {0} is {1}",
    ),
    "object at position": (
        "the {0} is at the {1}",
        "the {0} sits in the {1} corner",
        "the card at the {1} shows the {0}",
        "the card in the {1} corner holds the {0}",
        "at the {1} you can see the {0}",
        "at the {1} there is the {0}",
        "in the {1} corner is the {0}",
        "on the page the {0} is at the {1}",
        "you can find the {0} at the {1}",
        "we see the {0} in the {1} corner",
        "someone put the {0} in the {1} corner",
        "there is the {0} in the {1} corner",
    ),
    "the colour card at position": (
        "the {0} card is at the {1}",
        "the {0} card lies in the {1} corner",
        "at the {1} there is the {0} card",
        "in the {1} corner is the {0} card",
        "on the page the {0} card is at the {1}",
        "you can find the {0} card at the {1}",
        "we see the {0} card in the {1} corner",
        "someone put the {0} card at the {1}",
    ),
    "card at position is colour": (
        "the card at the {0} is {1}",
        "the card in the {0} corner is painted {1}",
        "the paper at the {0} is {1}",
        "at the {0} the card is {1}",
        "in the {0} corner the paper is {1}",
        "on the page the card at the {0} is {1}",
        "you can see that the card at the {0} is {1}",
        "we see that the paper at the {0} is {1}",
    ),
    "only card shows object": (
        "the card shows the {0}",
        "the only card holds the {0}",
        "the {0} sits on the only card",
        "on the only card you can see the {0}",
        "in the picture the card shows the {0}",
        "you can find the {0} on the only card",
        "we see the {0} on the only card",
        "someone put the {0} on the only card",
        "there is the {0} on the only card",
    ),
    "only card is colour": (
        "the only card is {0}",
        "the card is painted {0}",
        "the paper of the only card is {0}",
        "in the picture the only card is {0}",
        "on the page the only card is {0}",
        "you can see that the only card is {0}",
        "we see that the only card is {0}",
    ),
    "only card at position": (
        "the only card is at the {0}",
        "the card lies in the {0} corner",
        "at the {0} there is the only card",
        "in the {0} corner is the only card",
        "on the page the only card is at the {0}",
        "you can find the only card at the {0}",
        "someone put the only card at the {0}",
    ),
    "number of cards": (
        "the number of cards is {0}",
        "the count of cards here is {0}",
        "in the picture the number of cards is {0}",
        "on the page the number of cards is {0}",
        "you can see that the count of cards is {0}",
    ),
    "number of colour cards": (
        "the number of {1} cards is {0}",
        "the count of {1} cards here is {0}",
        "in the picture the number of {1} cards is {0}",
        "on the page the count of {1} cards is {0}",
        "you can see that the number of {1} cards is {0}",
    ),
    "relation": (
        "the {0} is {1} the {2}",
        "the {0} sits {1} the {2}",
        "the {0} lies {1} the {2}",
        "in the picture the {0} is {1} the {2}",
        "on the page the {0} is {1} the {2}",
        "you can find the {0} {1} the {2}",
        "we see the {0} {1} the {2}",
        "someone put the {0} {1} the {2}",
    ),
    "object is a category": (
        "the {0} is a kind of {1}",
        "the {0} here is a kind of {1}",
        "you can see that the {0} is a kind of {1}",
        "we know that the {0} is a kind of {1}",
        "in the picture the {0} is a kind of {1}",
    ),
}

# Forms whose grammar agrees with the count: singular first, plural second.
AGREEING_TEMPLATES: dict[str, tuple[tuple[str, str], ...]] = {
    "number of cards": (
        ("there is {0} card here", "there are {0} cards here"),
        ("you can count {0} card", "you can count {0} cards"),
        ("in the picture there is {0} card", "in the picture there are {0} cards"),
        ("on the page you can see {0} card", "on the page you can see {0} cards"),
        ("{0} card lies on the page", "{0} cards lie on the page"),
    ),
    "number of colour cards": (
        ("{0} of the cards is {1}", "{0} of the cards are {1}"),
        ("there is {0} card in {1}", "there are {0} cards in {1}"),
        ("on the page {0} card is {1}", "on the page {0} cards are {1}"),
        ("you can see {0} card in {1}", "you can see {0} cards in {1}"),
    ),
}

# Sentences that need no image. <name> is replaced by one of FRAGMENTS; [kind word] marks a word of a visual kind that
# common knowledge fixes.
FREE_TEMPLATES: tuple[tuple[str, float], ...] = (
    ("the <thing> was <made> <how>", 3.0),
    ("the <thing> was <made> <once>", 3.0),
    ("the <thing> feels <feel> <touch>", 1.5),
    ("the <source> came from <region>", 2.0),
    ("the <thing> has a <feel> edge", 1.0),
    ("the <thing> was kept in <room>", 2.0),
    ("the weather was <weather> <once>", 1.5),
    ("the cards come from <region>", 1.0),
    ("there is <mark> on the back of the page", 1.5),
    ("there is <stuff> in <room>", 2.0),
    ("there are many such cards in <region>", 1.0),
    ("on the back of the card is <mark>", 1.5),
    ("on <weather> days people stay <inside>", 1.0),
    ("on the page the paper feels <feel>", 1.5),
    ("in <region> you can buy such cards", 1.0),
    ("in <season> the paper feels <feel>", 1.5),
    ("in the picture the ink came from <region>", 1.0),
    ("at home there is <stuff>", 0.7),
    ("at school children <like> such <things>", 1.0),
    ("you can <use> the <thing> <when>", 1.5),
    ("you can see such cards in <region>", 1.0),
    ("you can find <stuff> in <room>", 1.0),
    ("we know that the <source> is old", 0.7),
    ("we know that <truth>", 2.0),
    ("we see such cards in <region>", 1.0),
    ("someone put the <thing> in <room>", 1.5),
    ("someone <made> the <thing> <once>", 1.5),
    ("behind the paper there is <mark>", 1.0),
    ("many people <like> such <things>", 1.0),
    ("children <like> such <things> <when>", 1.0),
    ("<truth>", 8.0),
    ("<known>", 3.0),
)

FRAGMENTS: dict[str, tuple[str, ...]] = {
    "thing": ("card", "paper", "page", "picture"),
    "source": ("card", "paper", "page", "picture", "ink", "frame"),
    "things": ("cards", "pictures", "games"),
    "made": ("cut", "made", "painted", "dried", "folded", "pressed"),
    "how": ("by hand", "with care", "for a school", "for a friend", "by a machine", "without any haste"),
    "once": ("last summer", "last winter", "in the evening", "in the morning", "on a quiet day", "after lunch"),
    "when": ("in summer", "in winter", "in the evening", "in the morning", "on a quiet day", "after lunch"),
    "feel": ("smooth", "rough", "thin", "soft", "warm", "dry", "clean"),
    "touch": ("to the touch", "in the hand", "after the rain"),
    "region": ("a small shop", "an old school", "a quiet village", "the north", "a far city"),
    "room": ("a small shop", "an old school", "a dry room", "a quiet room"),
    "weather": ("cold", "warm", "rainy", "windy", "quiet"),
    "inside": ("at home", "in a dry room", "with a friend"),
    "mark": ("a name", "a small stamp", "a short note", "a date"),
    "stuff": ("dust", "good paper", "old ink", "soft light"),
    "season": ("summer", "winter", "spring", "autumn"),
    "like": ("like", "share", "keep", "collect", "sort"),
    "use": ("keep", "share", "fold", "sell", "paint"),
    "truth": (
        "an animal needs food and water",
        "an animal can feel hunger",
        "a bird lays eggs in spring",
        "a bird builds a nest",
        "an insect has a short life",
        "a plant needs light and water",
        "a plant can not walk",
        "a fruit has seeds inside",
        "a fruit can be eaten",
        "a vegetable grows on a farm",
        "a vegetable is good for people",
        "warm food smells good",
        "food is kept in a dry room",
        "a sweet is bad for teeth",
        "a sweet is made with sugar",
        "a drink helps after work",
        "a building keeps people warm and dry",
        "a building needs a roof",
        "the beauty of nature is old",
        "a vehicle moves people from place to place",
        "a vehicle needs some care",
        "a toy is made for children",
        "a treasure is kept in a safe place",
        "good clothing keeps people warm",
        "an instrument makes sound",
        "an instrument needs much practice",
        "a tool helps with work",
        "a tool is used by hand",
        "stationery is used at school",
        "a device needs power",
        "furniture is made for a room",
        "the wind is cold in winter",
        "rain can fall in every season",
        "people sleep in the evening",
    ),
    "known": (
        "fresh grass is [colour green]",
        "the grass on a farm is [colour green]",
        "human blood is [colour red]",
        "the sky is [colour blue] on warm days",
        "in autumn the sky can turn [colour grey]",
        "a triangle has [count three] sides",
        "the year has [count four] seasons",
        "you can see that a square has [count four] sides",
        "there are [count two] eyes in a face",
        "people have [count two] hands and [count two] feet",
        "in the evening the sky is [relation above] the roof",
        "the roof is [relation above] the room",
        "the floor is [relation below] the roof",
    ),
}


def free_sentence(
    draws: Draws,
    templates: Sequence[tuple[str, float]] = FREE_TEMPLATES,
    fragments: Mapping[str, Sequence[str]] = FRAGMENTS,
) -> str:
    """A sentence that needs no image, marks kept."""
    template = templates[draws.weighted([weight for _, weight in templates])][0]
    while "<" in template:
        start, end = template.index("<"), template.index(">")
        template = template[:start] + draws.pick(fragments[template[start + 1 : end]]) + template[end + 1 :]
    return template


def fact_template(draws: Draws, form: str, agreeing: bool) -> tuple[str, str]:
    """A template of a form, for a count of one and for more; equal where the form has no agreement."""
    if agreeing:
        return draws.pick(AGREEING_TEMPLATES[form])
    template = draws.pick(FACT_TEMPLATES["relation" if " relation " in form else form])
    return template, template


def plain_words() -> set[str]:
    """Every word of the templates and fragments, marked words and slots left out."""
    texts = [t for group in FACT_TEMPLATES.values() for t in group]
    texts += [t for group in AGREEING_TEMPLATES.values() for pair in group for t in pair]
    texts += [t for t, _ in FREE_TEMPLATES] + [t for group in FRAGMENTS.values() for t in group]
    return words_outside_marks(texts)


def words_outside_marks(texts: Iterable[str]) -> set[str]:
    """The words of templates, without {slots}, <fragments> and [marked words]."""
    return {word for text in texts for word in _MARK.sub(" ", text).split()}
