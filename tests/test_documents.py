"""Tables and documents: no name becomes a formula, everything comes back as it was, what is damaged is named."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.documents import csv_text, load_rows
from nnunet_flare.errors import InputError
from nnunet_flare.evaluation.efficiency import EXTRA_COLUMNS, OFFICIAL_COLUMNS, add_row, check_table
from nnunet_flare.evaluation.structures import Structure
from nnunet_flare.evaluation.table import CaseRow, ScoreTable, read_csv
from nnunet_flare.files import read_json, write_csv
from nnunet_flare.rounds.stages.score_tables import write_scores
from nnunet_flare.shapes import mismatch

FORMULAS = ("=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "＝1", "=cmd|' /C calc'!A0")

cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
attacks = st.tuples(st.sampled_from(("", "'", "''")), st.sampled_from(FORMULAS)).map("".join)


def stored(text: str) -> list[list[str]]:
    """What a spreadsheet sees."""
    return list(csv.reader(io.StringIO(text, newline="")))


@given(st.lists(st.lists(cells | attacks, min_size=1, max_size=4), max_size=4))
def test_every_text_comes_back_and_none_is_stored_as_a_formula(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    write_csv(path, rows)
    assert [row for _, row in load_rows(path)] == rows
    for row in stored(path.read_bytes().decode()):
        for cell in row:
            assert not cell.startswith(("=", "@", "\t", "\r")), "a spreadsheet would run it"
            if cell.startswith(("+", "-")):
                float(cell)


@pytest.mark.parametrize("number", [-1, -0.5, "-0.2500", "+3", "-1e-05", "-inf", "nan", 7, None])
def test_numbers_stay_numbers(number):
    assert stored(csv_text([["case", number]])) == [["case", "" if number is None else str(number)]]


def test_a_table_of_scores_comes_back_with_names_that_start_a_formula(tmp_path):
    structures = (Structure(1, "=liver", "=liver", (1,), 2.0), Structure(2, "-spleen", "-spleen", (2,), 2.0))
    scores = {1: 0.5, 2: 0.25}
    table = ScoreTable(structures, (CaseRow("@case.nii.gz", scores, scores), CaseRow("-5.nii.gz", scores, scores)))
    table.write_csv(tmp_path / "t.csv")
    assert stored((tmp_path / "t.csv").read_text())[1][0] == "'@case.nii.gz"
    assert read_csv(tmp_path / "t.csv", structures).rows == table.rows
    table.write_summary_csv(tmp_path / "s.csv")
    assert [row[0] for row in stored((tmp_path / "s.csv").read_text())[1:]] == ["'=liver", "'-spleen"] * 2


def test_scores_of_a_round_are_selected_by_hand_with_names_that_start_a_formula(tmp_path):
    write_scores(tmp_path / "scores.csv", ["=case", "+case"], [[0.95], [0.2]], ["@liver"], [2, 2])
    words = ["select", "-i", tmp_path / "scores.csv", "-o", tmp_path / "selection.csv", "--per_organ", "@liver=0.9"]
    assert main([str(word) for word in words]) == 0
    assert [row[:2] for _, row in load_rows(tmp_path / "selection.csv")] == [
        ["case", "taken"], ["=case", "1"], ["+case", "0"]
    ]  # fmt: skip
    assert "\n'=case,1" in (tmp_path / "selection.csv").read_text()


def test_a_row_of_efficiency_figures_is_found_again_and_replaced(tmp_path):
    row = dict.fromkeys((*OFFICIAL_COLUMNS, *EXTRA_COLUMNS), -1.5)
    for seconds in (1.0, 2.0):
        add_row(tmp_path / "e.csv", {**row, "Name": "=tool", "Time": seconds})
    ((name, seconds, *others),) = check_table(tmp_path / "e.csv")
    assert (name, seconds, set(others)) == ("=tool", "2.0", {"-1.5"})
    assert "\n'=tool,2.0,-1.5" in (tmp_path / "e.csv").read_text()


# ------------------------------------------------------------------ shapes

RUN = {"version": {1, 2}, "cases": [{"case": str, "size": int, "score": (float, None), "note?": str}], "of": {str: int}}
GOOD = {"version": 1, "cases": [{"case": "a", "size": 1, "score": 1}], "of": {"x": 1}, "more": "is allowed"}


def test_a_document_of_the_right_shape_is_given(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert read_json(tmp_path / "a.json", RUN) == GOOD


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "found a list, expected an object"),
        (None, "found null, expected an object"),
        ({**GOOD, "version": 3}, "version: found 3, expected 1 or 2"),
        ({**GOOD, "version": True}, "version: found true or false, expected 1 or 2"),
        ({"version": 1, "of": {}}, "'cases' is missing"),
        ({**GOOD, "cases": {}}, "cases: found an object, expected a list"),
        ({**GOOD, "cases": ["a"]}, "cases[0]: found 'a', expected an object"),
        ({**GOOD, "cases": [{"case": "a", "size": "1", "score": 1}]}, "cases[0].size: found '1', expected a whole"),
        ({**GOOD, "cases": [{"case": "a", "size": 1.5, "score": 1}]}, "cases[0].size: found 1.5, expected a whole"),
        ({**GOOD, "cases": [{"case": "a", "size": 1, "score": "x"}]}, "cases[0].score: found 'x', expected null"),
        ({**GOOD, "cases": [{"case": "a", "size": 1, "score": float("nan")}]}, "cases[0].score: found nan"),
        ({**GOOD, "cases": [{"case": "a", "size": 1}]}, "cases[0].score: is missing"),
        ({**GOOD, "cases": [{"case": "a", "size": 1, "score": 1, "note": 2}]}, "cases[0].note: found 2, expected text"),
        ({**GOOD, "of": {"x": None}}, "of.x: found null, expected a whole number"),
    ],
)
def test_the_first_place_that_is_wrong_is_named(tmp_path, wrong, said):
    (tmp_path / "a.json").write_text(json.dumps(wrong))
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / "a.json", RUN, remedy="remove it")
    assert f"{tmp_path / 'a.json'}: {said}" in str(caught.value)
    assert str(caught.value).endswith("; the file is damaged: remove it")


@pytest.mark.parametrize("content", [b"", b'{"version": 1', b"\x00" * 40, b"\xff\xfe{}", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_is_said_in_one_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json: .*the file is damaged: restore it") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_file_is_not_called_damaged(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: no such file$"):
        read_json(Path(tmp_path / "a.json"))


def test_any_shape_takes_what_python_calls_so():
    assert mismatch(1, float) is None and mismatch(True, int) is not None and mismatch("x", object) is None
