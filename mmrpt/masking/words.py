"""Words: where they stand in a text of any script, which of them carry content, and which name an attribute.

Attributes (colours, numbers, sides and relations) are used twice: a reward must not forgive a wrong one, and masks
should ask for each class, not only for the words that a model looks at most. Lists and rules instead of a tagger: no
model, no download, any speed.
"""

from __future__ import annotations

import re
import sys
import unicodedata
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
SIDES = frozenset("left right top upper bottom lower centre middle".split())  # noqa: SIM905
DEPTHS = frozenset(("front", "back"))  # sides as in "front left", and words of many other uses when alone
RELATIONS = frozenset(
    """
    above across below under over beside behind inside outside near between
    """.split()  # noqa: SIM905
)
SYNONYMS = {"gray": "grey", "upper": "top", "lower": "bottom", "center": "centre", "violet": "purple", "under": "below"}

_ROWS = ("top", "bottom", "upper", "lower", "middle", *sorted(DEPTHS))
_COLUMNS = ("left", "right", "middle", "centre", "center")
# Prepositions of many uses ("over", "behind", "between") are left out: alone, they seldom are what an image tells.
PHRASES: dict[str, tuple[str, ...]] = {
    "colour": (*sorted(COLOURS), "gray", "violet"),
    "number": tuple(NUMBERS),
    "side": tuple(f"{row} {column}" for row in _ROWS for column in _COLUMNS) + (*sorted(SIDES), "center"),
    "relation": ("left of", "right of", "across from", "next to", "in front of", "above", "below", "under", "beside"),
}


# Words that carry no visual content by themselves.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any each every all both no not nor and or but so as if than then too
    very also only just there here it its they them their he she his her him we us our you your i my me who whom
    whose which what when where why how is are was were be been being am do does did has have had having can
    could may might must shall should will would of to in on at by for from with without into onto upon about
    over through during before after again once one's 's
    """.split()  # noqa: SIM905
)
# Chinese particles, pronouns and prepositions of one character: they also end the word before them.
_HAN_FUNCTION = "的地得了着在是有和与及或也都就而被把这那之其它他她们你我很不"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff々"
# Thai, Lao, Myanmar and Khmer: no spaces between words either.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_HIRAGANA = re.compile("[\u3041-\u309f]+")
_UNSPACED = re.compile(f"[{_HAN}{_NO_SPACES}\u3041-\u30ff]")


def word_spans(text: str, start: int = 0, end: int = sys.maxsize) -> list[tuple[int, int]]:
    """(start, end) of each word of text[start:end], punctuation left out.

    Scripts without spaces are cut by a plain rule, so that a clause is never one word: Han characters into pairs, anew
    after each particle; kana where the script changes; Thai, Lao, Myanmar and Khmer into four letters.

    >>> [text[a:b] for text in ["A well-known, red car: 一只红色的猫"] for a, b in word_spans(text)]
    ['A', 'well-known', 'red', 'car', '一只', '红色', '的', '猫']
    """
    return [match.span() for match in _word_pattern().finditer(text, start, end)]


def is_content(word: str) -> bool:
    """Whether a word says something by itself: no article, preposition, pronoun or the like.

    >>> [is_content(word) for word in ("The", "card", "的", "では")]
    [False, True, False, False]
    """
    # Japanese writes particles and endings in hiragana, and most of what can be seen in other scripts.
    return not (word.casefold() in FUNCTION_WORDS or word in _HAN_FUNCTION or _HIRAGANA.fullmatch(word))


def letters_and_words(text: str) -> list[str]:
    """What two texts are compared by: words in one case, and single letters of scripts without spaces.

    >>> letters_and_words("The Card: 红色")
    ['the', 'card', '红', '色']
    """
    words = [text[start:end].casefold() for start, end in word_spans(text)]
    return [part for word in words for part in (word if _UNSPACED.match(word) else [word])]


def has_letters(text: str) -> bool:
    """Whether there is a letter in it: else it is a number or decoration, and no sentence."""
    return any(character.isalpha() for character in text)


@cache
def _word_pattern() -> re.Pattern[str]:
    marks = "".join(chr(code) for code in range(0x300, 0xFE00) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
    alone = f"{_HAN}{_NO_SPACES}\u3041-\u30ff"
    letter = rf"(?:[^\W_{alone}]|(?![{alone}])[{marks}])"
    pair = f"(?![{_HAN_FUNCTION}])[{_HAN}]"
    return re.compile(
        rf"\d+(?:[.,]\d+)+|[{_HAN_FUNCTION}]|{pair}(?:{pair})?|[\u30a1-\u30fa\u30fc-\u30ff]+|[\u3041-\u309f]+"
        rf"|(?:(?=[^\W_])[{_NO_SPACES}][{marks}]*){{1,4}}"
        rf"|{letter}+(?:['’-]{letter}+)*"
    )


def visual_phrases(text: str, start: int, end: int, *, max_words: int) -> list[tuple[int, int, str]]:
    """(start, end, class) of the listed phrases in text[start:end], the longest first where several match.

    Phrases of more than `max_words` words are not looked for.

    >>> visual_phrases("the red card left of it", 0, 23, max_words=2)
    [(4, 7, 'colour'), (13, 20, 'relation')]
    """
    found = _pattern(max_words).finditer(text, start, end)
    return [(match.start(), match.end(), _CLASS[match.group().casefold()]) for match in found]


def word_class(text: str) -> str:
    """The class of a listed phrase; of any other text "other".

    >>> [word_class(text) for text in ("Red", "top left", "kite")]
    ['colour', 'side', 'other']
    """
    return _CLASS.get(text.casefold(), "other")


_CLASS = {phrase: name for name, phrases in PHRASES.items() for phrase in phrases}


@cache
def _pattern(max_words: int) -> re.Pattern[str]:
    phrases = sorted((p for p in _CLASS if len(p.split()) <= max_words), key=len, reverse=True)
    return re.compile(r"(?<![\w'’-])(?:" + "|".join(map(re.escape, phrases)) + r")(?![\w'’-])", re.IGNORECASE)
