"""``flare_cases.json``: what a table means, which one a training uses, and every wrong entry told with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_flare.cases import ROLES, Case, CaseTable, find_table, read_table, table_name, write_table
from nnunet_flare.errors import InputError
from nnunet_flare.organs import FLARE22, dataset_labels

LABELS = dataset_labels(FLARE22)
IDS = st.integers(1, 13)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    role = draw(st.sampled_from(ROLES))
    annotated = tuple(sorted(draw(st.sets(IDS, min_size=1)))) if role == "partial" else None
    weight = draw(st.floats(0, 100, allow_nan=False))
    return Case(role, annotated, draw(st.integers(0, 9)), weight)  # type: ignore[arg-type]


def written(folder: Path, entries: Any, **more: Any) -> Path:
    path = folder / "flare_cases.json"
    path.write_text(json.dumps({"version": 1, "cases": entries, **more}))
    return path


def problems(path: Path) -> str:
    with pytest.raises(InputError) as refusal:
        read_table(path, labels=LABELS)
    assert refusal.value.exit_code == 2
    assert str(refusal.value).startswith(str(path))
    return str(refusal.value)


@given(table=st.dictionaries(st.text(min_size=1), cases()))
def test_written_and_read_again_it_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, Case]
) -> None:
    path = tmp_path_factory.mktemp("table") / "flare_cases.json"
    write_table(path, table)
    assert dict(read_table(path, labels=LABELS).cases) == table


def test_short_entries_mean_the_defaults(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, {"a": {}, "b": {"role": "pseudo", "round": 2, "weight": 0.5}}))
    assert table["a"] == Case("labelled", None, 0, 1.0)
    assert table["b"] == Case("pseudo", None, 2, 0.5)


def test_defaults_are_not_written(tmp_path: Path) -> None:
    write_table(tmp_path / "t.json", {"b": Case("partial", (2, 1), 3, 2.0), "a": Case()})
    assert json.loads((tmp_path / "t.json").read_text()) == {
        "version": 1,
        "cases": {"a": {"role": "labelled"}, "b": {"role": "partial", "annotated": [2, 1], "round": 3, "weight": 2.0}},
    }


def test_annotated_organs_are_sorted_and_unique(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, {"a": {"role": "partial", "annotated": [3, 1, 3]}}))
    assert table["a"].annotated == (1, 3)


def test_filled_and_positive_organs_are_kept_and_no_validation_counts_filled_ones(tmp_path: Path) -> None:
    case = Case("partial", (1, 2), filled=(2,), positive=(3,))
    write_table(tmp_path / "t.json", {"a": case})
    assert read_table(tmp_path / "t.json")["a"] == case
    assert case.validated == (1,) and not case.is_complete
    assert Case("pseudo").is_complete and Case("pseudo").validated is None


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("labelled", "cases.liver_7: expected an object, found str"),
        ({"kind": "pseudo"}, "unknown keys ['kind'], allowed are annotated, filled, positive, role, round, weight"),
        ({"role": "pseudo", "annotated": [1], "filled": [2]}, "'filled' organs must be among 'annotated'"),
        ({"role": "pseudo", "annotated": [1], "positive": [1]}, "'positive' ones must not"),
        ({"role": "pseudo", "positive": [14]}, "cases.liver_7.positive: labels [14] are not in dataset.json"),
        (
            {"role": "teacher"},
            "cases.liver_7.role: found 'teacher', expected one of labelled, pseudo, partial, unlabelled",
        ),
        ({"role": "partial"}, "cases.liver_7: a partial case needs 'annotated'"),
        ({"role": "partial", "annotated": []}, "cases.liver_7: a partial case needs 'annotated'"),
        ({"role": "partial", "annotated": [1, 14]}, "cases.liver_7.annotated: labels [14] are not in dataset.json"),
        (
            {"role": "partial", "annotated": [0]},
            "cases.liver_7.annotated: found [0], expected a list of label ids, each above 0",
        ),
        ({"role": "partial", "annotated": "liver"}, "cases.liver_7.annotated: found 'liver'"),
        ({"role": "partial", "annotated": [True]}, "cases.liver_7.annotated: found [True]"),
        ({"round": -1}, "cases.liver_7.round: found -1, expected a whole number >= 0"),
        ({"round": 1.5}, "cases.liver_7.round: found 1.5"),
        ({"round": True}, "cases.liver_7.round: found True"),
        ({"weight": -0.1}, "cases.liver_7.weight: found -0.1, expected a number >= 0"),
        ({"weight": "2"}, "cases.liver_7.weight: found '2'"),
        ({"weight": True}, "cases.liver_7.weight: found True"),
        ({"weight": float("inf")}, "cases.liver_7.weight: found inf"),
        ({"weight": float("nan")}, "cases.liver_7.weight: found nan"),
    ],
)
def test_a_wrong_entry_is_told_with_its_place(tmp_path: Path, entry: Any, says: str) -> None:
    assert says in problems(written(tmp_path, {"fine": {}, "liver_7": entry}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected an object with 'version' and 'cases', found list"),
        ('{"cases": {}}', "version: found None, expected 1"),
        ('{"version": 2, "cases": {}}', "version: found 2, expected 1"),
        ('{"version": 1}', "cases: expected an object of case ids, found NoneType"),
        ('{"version": 1, "cases": {}, "case": {}}', "unknown keys ['case'], allowed are 'version' and 'cases'"),
    ],
)
def test_a_wrong_document_is_told(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "flare_cases.json"
    path.write_text(text)
    assert says in problems(path)


def test_a_table_that_is_not_text_or_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert "not readable as JSON" in problems(tmp_path / "binary.json")
    assert "no such file" in problems(tmp_path / "absent.json")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": {"role": "x"}, "b": {"weight": -1, "round": -1}, "c": {}}, extra=1)
    assert "4 problem(s): unknown keys" in problems(path)


def test_annotated_organs_are_checked_against_the_labels_only_where_these_are_given(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": {"role": "partial", "annotated": [99]}})
    assert read_table(path)["a"].annotated == (99,)
    assert "[99] are not in dataset.json" in problems(path)


def test_region_labels_of_a_dataset_are_no_obstacle(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": {"role": "partial", "annotated": [2]}})
    assert read_table(path, labels={"background": 0, "organs": [1, 2], "spleen": 2})["a"].annotated == (2,)


def test_a_case_without_entry_is_labelled_except_in_a_rounds_table() -> None:
    assert CaseTable({"a": Case("pseudo")})["b"] == Case("labelled")
    strict = CaseTable({"a": Case("pseudo")}, Path("flare_cases.r1.json"), strict=True)
    assert strict["a"].role == "pseudo"
    with pytest.raises(
        InputError, match=r"flare_cases\.r1\.json: case 'b' is in the training data but not in this table"
    ):
        strict["b"]


def test_counts_and_roles() -> None:
    table = CaseTable({"a": Case("pseudo"), "b": Case("partial", (1,)), "c": Case("pseudo")})
    assert table.counts(["c", "a", "b", "x"]) == {"labelled": 1, "pseudo": 2, "partial": 1}
    assert list(table.counts(["c", "x"])) == ["labelled", "pseudo"], "in the order of the roles"
    assert table.with_role(["c", "x", "b", "a"], "pseudo", "partial") == ["c", "b", "a"]


class TestWhichTableATrainingUses:
    """The round's own first, else that of the dataset; two that differ stop the training."""

    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        preprocessed, raw = tmp_path / "preprocessed", tmp_path / "raw"
        preprocessed.mkdir()
        raw.mkdir()
        return preprocessed, raw

    def test_none_at_all(self, folders: tuple[Path, Path]) -> None:
        table = find_table(*folders, "3d_fullres", is_round=False)
        assert (dict(table.cases), table.source, table.strict) == ({}, None, False)

    @pytest.mark.parametrize("place", [0, 1])
    def test_one_of_the_dataset(self, folders: tuple[Path, Path], place: int) -> None:
        write_table(folders[place] / "flare_cases.json", {"a": Case("pseudo")})
        table = find_table(*folders, "3d_fullres", is_round=False)
        assert table["a"].role == "pseudo"
        assert table["b"].role == "labelled"
        assert table.source == folders[place] / "flare_cases.json"

    def test_raw_folder_unknown(self, folders: tuple[Path, Path]) -> None:
        write_table(folders[0] / "flare_cases.json", {"a": Case("pseudo")})
        assert find_table(folders[0], None, "3d_fullres", is_round=False)["a"].role == "pseudo"

    def test_both_and_equal_though_written_otherwise(self, folders: tuple[Path, Path]) -> None:
        write_table(folders[0] / "flare_cases.json", {"a": Case()})
        written(folders[1], {"a": {"role": "labelled", "weight": 1}})
        assert find_table(*folders, "3d_fullres", is_round=False).source == folders[0] / "flare_cases.json"

    def test_both_and_different(self, folders: tuple[Path, Path]) -> None:
        write_table(folders[0] / "flare_cases.json", {"a": Case()})
        write_table(folders[1] / "flare_cases.json", {"a": Case(weight=2)})
        with pytest.raises(InputError) as refusal:
            find_table(*folders, "3d_fullres", is_round=False)
        assert str(folders[0] / "flare_cases.json") in str(refusal.value)
        assert str(folders[1] / "flare_cases.json") in str(refusal.value)
        assert "differ" in str(refusal.value)

    def test_a_rounds_own_comes_first_and_must_be_complete(self, folders: tuple[Path, Path]) -> None:
        write_table(folders[0] / "flare_cases.json", {"a": Case()})
        write_table(folders[0] / "flare_cases.3d_fullres_u_r1.json", {"a": Case("pseudo", round=1)})
        table = find_table(*folders, "3d_fullres_u_r1", is_round=True)
        assert table["a"].role == "pseudo"
        assert table.strict
        assert find_table(*folders, "3d_fullres", is_round=False)["a"].role == "labelled"

    def test_a_round_without_one_is_refused(self, folders: tuple[Path, Path]) -> None:
        write_table(folders[0] / "flare_cases.json", {"a": Case()})
        with pytest.raises(InputError, match=r"flare_cases\.3d_fullres_u_r1\.json: is missing, but configuration"):
            find_table(*folders, "3d_fullres_u_r1", is_round=True)

    def test_wrong_labels_are_found_in_every_table(self, folders: tuple[Path, Path]) -> None:
        wrong = {"a": Case("partial", (14,))}
        write_table(folders[0] / table_name("r1"), wrong)
        write_table(folders[1] / table_name(), wrong)
        for configuration in ("r1", "base"):
            with pytest.raises(InputError, match=r"labels \[14\] are not in dataset\.json"):
                find_table(*folders, configuration, is_round=False, labels=LABELS)
