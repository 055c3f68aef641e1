"""Sentences end where a person would end them; words are found in any script."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mmrpt.masking.sentences import sentence_spans
from mmrpt.masking.words import is_content, word_spans


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("the card is red. a dog eats.", ["the card is red.", "a dog eats."]),
        ("one! two? three.", ["one!", "two?", "three."]),
        ("it is 3.5 cm wide. ok", ["it is 3.5 cm wide.", "ok"]),
        ("Dr. Smith and Mrs. Jones met. They left.", ["Dr. Smith and Mrs. Jones met.", "They left."]),
        ("fruit, e.g. apples, etc. and more. end.", ["fruit, e.g. apples, etc. and more.", "end."]),
        ("at 5 p.m. The dog slept.", ["at 5 p.m.", "The dog slept."]),
        ("at 5 p.m. the dog slept.", ["at 5 p.m. the dog slept."]),
        ("J. S. Bach wrote it. So did I. Yes.", ["J. S. Bach wrote it.", "So did I.", "Yes."]),
        ("the answer is no. the dog left.", ["the answer is no.", "the dog left."]),
        ("see no. 5 and fig. 2 there. ok.", ["see no. 5 and fig. 2 there.", "ok."]),
        ('he said "stop." then he left...  and came back', ['he said "stop."', "then he left...", "and came back"]),
        ("  spaces   around.\n\nnew line ", ["spaces   around.", "new line"]),
        ("no stop at all", ["no stop at all"]),
        ("what?! yes.", ["what?!", "yes."]),
        ("", []),
        (" \n", []),
        # full-width stops need no space after them, closing quotes belong to their sentence, decimals do not break
        ("这是一只猫。它是红色的！真的吗？是", ["这是一只猫。", "它是红色的！", "真的吗？", "是"]),
        ("赤い車です。「青い。」次は３．５メートル．次", ["赤い車です。", "「青い。」", "次は３．５メートル．", "次"]),
        ("这是猫!那是狗?好. abc!def", ["这是猫!", "那是狗?", "好.", "abc!def"]),
        ("यह एक कार है। यह लाल है।", ["यह एक कार है।", "यह लाल है।"]),
        # lists
        ("Seen:\n- a red car\n* two dogs. One sits.\n• x", ["Seen:", "a red car", "two dogs.", "One sits.", "x"]),
        ("1. A cat\r\n2) A dog\n(3) 4 fish", ["A cat", "A dog", "4 fish"]),
        ("1. A cat sat. 2. A dog ran.", ["A cat sat.", "2. A dog ran."]),
        ("-5 degrees\n3.5 kg\n-", ["-5 degrees", "3.5 kg", "-"]),
    ],
)
def test_sentences_end_where_a_person_ends_them(caption: str, expected: list[str]) -> None:
    spans = sentence_spans(caption)
    assert [caption[a:b] for a, b in spans] == expected
    assert all(b <= c for (_, b), (c, _) in pairwise(spans))
    if "\n" not in caption.strip() and not caption.startswith("1. "):  # no marker of a list
        covered = {i for a, b in spans for i in range(a, b)}
        assert all(i in covered or c.isspace() for i, c in enumerate(caption))


@pytest.mark.parametrize(
    ("text", "words", "content"),
    [
        (
            "It's a well-known 3.5 kg (red) car!",
            "It's|a|well-known|3.5|kg|red|car",
            "It's|well-known|3.5|kg|red|car",
        ),
        ("一只红色的猫坐在沙发上。", "一只|红色|的|猫坐|在|沙发|上", "一只|红色|猫坐|沙发|上"),
        ("赤いカードの上に犬がいます", "赤|い|カード|の|上|に|犬|がいます", "赤|カード|上|犬"),
        ("고양이가 소파 위에 있다", "고양이가|소파|위에|있다", "고양이가|소파|위에|있다"),
        ("हिन्दी में लाल कार", "हिन्दी|में|लाल|कार", "हिन्दी|में|लाल|कार"),  # vowel signs are no letters to `re`
        ("ภาพแมวสีแดง", "ภาพแ|มวสีแ|ดง", "ภาพแ|มวสีแ|ดง"),
        ("e\u0301te\u0301 ... _ ・", "e\u0301te\u0301", "e\u0301te\u0301"),
    ],
)
def test_words_of_any_script(text: str, words: str, content: str) -> None:
    found = [text[a:b] for a, b in word_spans(text)]
    assert found == words.split("|")
    assert [word for word in found if is_content(word)] == content.split("|")


def test_no_clause_without_spaces_is_one_word() -> None:
    for clause in (
        "两只白色小狗站立于绿色草地",
        "ผู้หญิงสวมเสื้อสีแดง",
        "白い犬が緑の草の上に立っている",
        "កុមារកំពុងលេងបាល់នៅក្នុងវាល",
    ):
        spans = word_spans(clause)
        assert len(spans) >= 3 and all(b - a <= len(clause) / 2 for a, b in spans)
