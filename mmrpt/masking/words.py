"""Words of visual content that a plain list can name: colours, numbers, sides and relations.

Used twice: a reward must not forgive a wrong attribute, and masks should ask for each class, not only for the words
that a model looks at most. Lists instead of a tagger: no model, no download, any speed.
"""

from __future__ import annotations

import re
from functools import cache

COLOURS = frozenset(
    """
    red orange yellow green blue purple pink grey white black brown teal cyan magenta turquoise gold silver
    beige
    """.split()  # noqa: SIM905
)
NUMBERS = {
    w: n
    for n, w in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    )
}
SIDES = {"left": "x", "right": "x", "top": "y", "upper": "y", "bottom": "y", "lower": "y", "centre": "c", "middle": "c"}
RELATIONS = frozenset(
    """
    above across below under over beside behind inside outside near between
    """.split()  # noqa: SIM905
)
SYNONYMS = {"gray": "grey", "upper": "top", "lower": "bottom", "center": "centre", "violet": "purple", "under": "below"}

_ROWS = ("top", "bottom", "upper", "lower", "middle")
_COLUMNS = ("left", "right", "middle", "centre", "center")
# Prepositions of many uses ("over", "behind", "between") are left out: alone, they seldom are what an image tells.
PHRASES: dict[str, tuple[str, ...]] = {
    "colour": (*sorted(COLOURS), "gray", "violet"),
    "number": tuple(NUMBERS),
    "side": tuple(f"{row} {column}" for row in _ROWS for column in _COLUMNS) + (*sorted(SIDES), "center"),
    "relation": ("left of", "right of", "across from", "next to", "in front of", "above", "below", "under", "beside"),
}


def visual_phrases(text: str, start: int, end: int, *, max_words: int) -> list[tuple[int, int, str]]:
    """(start, end, class) of the listed phrases in text[start:end], the longest first where several match.

    Phrases of more than `max_words` words are not looked for.

    >>> visual_phrases("the red card left of it", 0, 23, max_words=2)
    [(4, 7, 'colour'), (13, 20, 'relation')]
    """
    found = _pattern(max_words).finditer(text, start, end)
    return [(match.start(), match.end(), _CLASS[match.group().casefold()]) for match in found]


_CLASS = {phrase: name for name, phrases in PHRASES.items() for phrase in phrases}


@cache
def _pattern(max_words: int) -> re.Pattern[str]:
    phrases = sorted((p for p in _CLASS if len(p.split()) <= max_words), key=len, reverse=True)
    return re.compile(r"(?<![\w'’-])(?:" + "|".join(map(re.escape, phrases)) + r")(?![\w'’-])", re.IGNORECASE)
