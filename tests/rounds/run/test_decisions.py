"""The decisions CSV: what is read, and that every mistake is named with its line."""

from __future__ import annotations

import pytest

from nnunet_flare.errors import InputError
from nnunet_flare.rounds.run.decisions import Review, read_reviews

CASES = ("a", "b", "c")
ORGANS = ("liver", "spleen")


def read(tmp_path, text: str, encoding: str = "utf-8") -> list[Review]:
    path = tmp_path / "decisions.csv"
    path.write_bytes(text.encode(encoding))
    return read_reviews(path, CASES, ORGANS)


def test_accept_reject_and_wrong_organs_are_read_with_their_comments(tmp_path):
    text = 'case,decision,organ,comment\na,accept,,\nb,reject,,"stent, in the aorta"\nc,organ-wrong,liver,\n'
    text += "c,organ-wrong,spleen,two parts\n"
    assert read(tmp_path, text) == [
        Review("a", "accept"),
        Review("b", "reject", (), "stent, in the aorta"),
        Review("c", "organ-wrong", ("liver", "spleen"), "two parts"),
    ]


@pytest.mark.parametrize("word", ["organ-wrong", "organ wrong", "Organ_Wrong"])
def test_words_may_be_typed_by_hand(tmp_path, word):
    assert read(tmp_path, f"case,decision,organ\na,{word},liver\n") == [Review("a", "organ-wrong", ("liver",))]


def test_a_spreadsheets_byte_order_mark_and_line_ends_are_taken(tmp_path):
    assert read(tmp_path, "case,decision\r\na,reject\r\n", "utf-8-sig") == [Review("a", "reject")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("d,accept,,", "line 2: 'd' is not an unlabelled case of this run"),
        ("a,maybe,,", "line 2: a: decision 'maybe', expected one of accept, reject, organ-wrong"),
        ("a,organ-wrong,,", "line 2: a: organ '', expected one of liver, spleen"),
        ("a,organ-wrong,heart,", "line 2: a: organ 'heart', expected one of liver, spleen"),
        ("a,accept,,\na,reject,,", "line 3: a: decided twice (accept and reject)"),
        ("a,accept,,\na,organ-wrong,liver,", "line 3: a: decided twice (accept and organ-wrong)"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, row, problem):
    with pytest.raises(InputError) as caught:
        read(tmp_path, f"case,decision,organ,comment\n{row}\n")
    assert problem in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path):
    with pytest.raises(InputError, match="2 problem"):
        read(tmp_path, "case,decision\nd,accept\na,no\nb,accept\n")


def test_files_that_are_no_such_table_are_refused(tmp_path):
    with pytest.raises(InputError, match="line 1: no column case, decision"):
        read(tmp_path, "case;decision\n")
    with pytest.raises(InputError, match="not CSV in UTF-8"):
        read(tmp_path, "case,decision\nä,accept\n", "latin-1")
    with pytest.raises(InputError, match="no such file"):
        read_reviews(tmp_path / "missing.csv", CASES, ORGANS)


def test_the_reason_says_what_was_decided():
    assert Review("a", "accept").reason == "reviewed: accepted"
    assert Review("a", "reject", (), "stent").reason == "reviewed: rejected (stent)"
    assert Review("a", "organ-wrong", ("liver", "spleen")).reason == "reviewed: liver, spleen wrong"
