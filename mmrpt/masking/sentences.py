"""Where the sentences of a caption begin and end: one rule for drawn and real captions, plain enough to predict."""

from __future__ import annotations

import re

# A full stop after one of these does not end a sentence. Lower case, without the stop.
ABBREVIATIONS = frozenset(
    [
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "sr",
        "jr",
        "vs",
        "etc",
        "e.g",
        "i.e",
        "inc",
        "ltd",
        "co",
        "approx",
        "a.m",
        "p.m",
        "u.s",
        "u.k",
        "ca",
        "cf",
        "al",
    ]
)
# Never the last word of a sentence, so the stop after them is part of a name or of what follows.
_NEVER_LAST = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "e.g", "i.e", "approx", "ca", "cf", "vs"])
# Abbreviations only before a number ("no. 5"), ordinary words otherwise ("the answer is no.").
_BEFORE_NUMBER = frozenset(["no", "nos", "fig", "figs", "p", "pp", "vol"])
# Scripts that are written without spaces: a stop of theirs ends a sentence whatever follows.
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CLOSING = "[\"'”’)\\]」』）】》〉]*"
_END = re.compile(
    rf"(?:[。！？｡]+|．(?!\d)){_CLOSING}"  # full-width stops
    rf"|(?<=[{_NO_SPACES}])[.!?]+{_CLOSING}(?=[{_NO_SPACES}])"
    rf"|[.!?…؟۔।॥]+{_CLOSING}(?=\s|$)"
)
# What begins a line of a list; it belongs to no sentence, so that nothing is asked about it.
_LIST_MARKER = re.compile(r"\s*(?:[-*•‣·–—]|\(?\d{1,3}[.)])\s+(?=\S)|\s*•\s*(?=\S)|\s*\d{1,3}[、．]\s*(?=\S)")


def sentence_spans(caption: str) -> tuple[tuple[int, int], ...]:
    """Character spans (start, end), end exclusive, of the sentences of a caption, in order.

    A sentence ends after ".", "!" or "?" (with closing quotes or brackets) that white space or the end of the text
    follows, so decimals (3.5) never break; after a full-width stop (。！？); and at the end of a line. A full stop
    after a common abbreviation or a single initial does not break unless what follows starts a sentence ("at 5 p.m. The
    dog"), and then only where the abbreviation can be last. Spans hold no white space at either end. Every character
    lies in exactly one span, but for white space and the marker of a list ("- ", "• ", "2. ") at the start of a line.

    >>> sentence_spans("a cat. it weighs 3.5 kg!")
    ((0, 6), (7, 24))
    """
    spans: list[tuple[int, int]] = []
    for line in re.finditer(r"[^\n\r\v\f\u0085\u2028\u2029]+", caption):
        marker = _LIST_MARKER.match(line.group())
        start = line.start() + (marker.end() if marker else 0)
        for match in _END.finditer(caption, start, line.end()):
            if _breaks(caption[start : match.start()], match.group(), caption[match.end() : line.end()].lstrip()):
                _append(spans, caption, start, match.end())
                start = match.end()
        _append(spans, caption, start, line.end())
    return tuple(spans)


def sentence_at(text: str, position: int) -> str:
    """The sentence of `text` that holds character `position`.

    >>> sentence_at("a cat. it weighs 3.5 kg!", 10)
    'it weighs 3.5 kg!'
    """
    return next(text[start:end] for start, end in sentence_spans(text) if position < end)


def _append(spans: list[tuple[int, int]], caption: str, start: int, end: int) -> None:
    text = caption[start:end]
    stripped = text.strip()
    if stripped:
        begin = start + text.index(stripped[0])
        spans.append((begin, begin + len(stripped)))


def _breaks(before: str, stop: str, rest: str) -> bool:
    """Whether a stop ends the sentence that begins with `before`; `rest` of the line follows."""
    words = before.split()
    if stop != "." or not words:
        return True
    word = words[-1].lstrip("(\"'“‘[")
    initial = len(word) == 1 and word.isalpha() and word.isupper() and word != "I"
    if word.lower() in _BEFORE_NUMBER and rest[:1].isdigit():
        return False
    if len(words) == 1 and word.isdigit():  # "2." of a list within a line
        return not rest
    if initial or word.lower() in _NEVER_LAST:
        return not rest
    if word.lower() in ABBREVIATIONS:
        return not rest or rest[0].isupper()
    return True
