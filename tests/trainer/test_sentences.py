"""Sentences that end where a person would end them."""

from __future__ import annotations

import pytest

from mmrpt.masking.sentences import sentence_spans


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
    ],
)
def test_sentences_end_where_a_person_ends_them(caption: str, expected: list[str]) -> None:
    spans = sentence_spans(caption)
    assert [caption[a:b] for a, b in spans] == expected
    covered = {i for a, b in spans for i in range(a, b)}
    assert all(i in covered or c.isspace() for i, c in enumerate(caption))
