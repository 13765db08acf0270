"""``flare-pseudolabel merge`` on folders of label maps."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.cli.pseudolabel import main
from nnunet_flare.images import Volume, geometry_difference, read_labels, write_labels

GRID = Volume(
    np.zeros((2, 3, 4), np.uint8),
    (5.0, 0.8, 0.7),
    (-12.5, 30.25, 7.0),
    (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0),
)


def labels(*values: int) -> np.ndarray:
    """A map whose first voxels have these values."""
    array = np.zeros(GRID.array.size, np.uint8)
    array[: len(values)] = values
    return array.reshape(GRID.array.shape)


@pytest.fixture
def folders(tmp_path: Path):
    """Write ``<folder>/<case>.nii.gz`` maps on one oblique grid."""

    def write(name: str, **cases: np.ndarray) -> str:
        for case, array in cases.items():
            write_labels(tmp_path / name / f"{case}.nii.gz", array, GRID)
        return str(tmp_path / name)

    return write


def merged(tmp_path: Path, case: str, count: int = 5) -> list[int]:
    return read_labels(tmp_path / "out" / f"{case}.nii.gz").array.ravel()[:count].tolist()


def rows(tmp_path: Path) -> dict[str, dict[str, str]]:
    with open(tmp_path / "out" / "merge.csv", newline="") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def merge(tmp_path: Path, *words: str) -> int:
    return main(["merge", "-o", str(tmp_path / "out"), "-np", "1", *words])


def test_tumours_are_added_and_the_geometry_is_kept(tmp_path: Path, folders) -> None:
    base = folders("pseudo", a=labels(1, 1, 2), b=labels(3, 3))
    truth = folders("truth", a=labels(0, 14))
    assert merge(tmp_path, "--base", base, "--partial", truth, "--annotated", "14") == 0
    assert merged(tmp_path, "a", 3) == [1, 14, 2]
    assert merged(tmp_path, "b", 2) == [3, 3], "a case without ground truth keeps its pseudo-label"
    assert geometry_difference(GRID, read_labels(tmp_path / "out" / "a.nii.gz")) is None
    assert rows(tmp_path)["a"]["from_truth"] == "1"


def test_a_label_map_of_an_earlier_merge_is_named(tmp_path: Path, folders, caplog) -> None:
    first = folders("first", a=labels(1, 1, 2), b=labels(3, 3))
    second = folders("second", b=labels(3, 3))
    teacher = folders("teacher", a=labels(1, 1, 2), b=labels(3, 3))
    assert merge(tmp_path, "--base", first, "--teacher", teacher) == 0
    assert not caplog.text
    assert merge(tmp_path, "--base", second, "--teacher", teacher) == 0
    assert "a.nii.gz: not of this merge" in caplog.text and set(rows(tmp_path)) == {"b"}


def test_teachers_with_other_ids_must_agree(tmp_path: Path, folders, capsys) -> None:
    base = folders("pseudo", a=labels(1, 2, 12, 14, 5))
    btcv = folders("btcv", a=labels(6, 6, 0, 0, 8))
    amos = folders("amos", a=labels(6, 2, 13, 0, 8))
    words = ("--base", base, "--teacher", btcv, amos, "--id_map", "btcv", "amos", "--protect", "14")
    assert merge(tmp_path, *words) == 0
    assert merged(tmp_path, "a") == [1, 15, 12, 14, 5]
    assert rows(tmp_path)["a"]["ignored"] == "1"
    assert "value 15" in capsys.readouterr().out
    assert merge(tmp_path, *words, "--on_disagree", "zero") == 0
    assert merged(tmp_path, "a") == [1, 0, 12, 14, 5]
    assert "value 15" not in capsys.readouterr().out
    assert merge(tmp_path, *words, "--on_disagree", "first") == 0
    assert merged(tmp_path, "a") == [1, 2, 12, 14, 5]


def test_union_of_some_organs(tmp_path: Path, folders) -> None:
    base, teacher = folders("a80", a=labels(1, 1, 5)), folders("a84", a=labels(14, 2, 0))
    assert merge(tmp_path, "--base", base, "--teacher", teacher, "--union", "14") == 0
    assert merged(tmp_path, "a", 3) == [14, 1, 5]


def test_each_case_has_its_own_annotated_organs_in_a_case_table(tmp_path: Path, folders, capsys) -> None:
    base = folders("pseudo", a=labels(1, 2, 3), b=labels(1, 2, 3), c=labels(1, 2), d=labels(1, 2))
    truth = folders("truth", a=labels(0, 1), b=labels(0, 2), c=labels(3, 0), d=labels(1))
    table = tmp_path / "flare_cases.json"
    entries = {
        "a": {"role": "partial", "annotated": [1]},
        "b": {"role": "partial", "annotated": [2]},
        "d": {"role": "unlabelled"},
    }
    table.write_text(json.dumps({"version": 1, "cases": entries}))
    assert merge(tmp_path, "--base", base, "--partial", truth, "--annotated", str(table)) == 1
    assert merged(tmp_path, "a", 3) == [0, 1, 3]
    assert merged(tmp_path, "b", 3) == [1, 2, 3]
    assert merged(tmp_path, "c", 2) == [3, 0], "not in the table: labelled, so all organs are annotated"
    assert "d: " in capsys.readouterr().err


def test_constant_maps_are_dropped_listed_and_leave_no_old_file(tmp_path: Path, folders, capsys) -> None:
    base, teacher = folders("one", a=labels(1, 2), b=labels(1)), folders("two", a=labels(2, 1), b=labels(1))
    words = ("--base", base, "--teacher", teacher, "--on_disagree")
    assert merge(tmp_path, *words, "first") == 0
    assert (tmp_path / "out" / "a.nii.gz").is_file()
    assert merge(tmp_path, *words, "zero") == 0
    assert "dropped: a" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.nii.gz", "merge.csv"]
    assert rows(tmp_path)["a"]["result"] == "dropped"


def test_unusable_cases_are_set_aside_with_their_reason(tmp_path: Path, folders, capsys) -> None:
    good = labels(1, 2)
    base = folders("pseudo", good=good, grid=good, ids=good, absent=good, extra=good)
    teacher = folders("teacher", good=good, ids=labels(99), extra=good)
    moved = Volume(GRID.array, (5.0, 0.8, 0.9), GRID.origin, GRID.direction)
    write_labels(Path(teacher) / "grid.nii.gz", good, moved)
    truth = folders("truth", extra=labels(7), alone=labels(14))
    words = ("--base", base, "--teacher", teacher, "--partial", truth, "--annotated", "14")
    assert merge(tmp_path, *words) == 1
    errors = capsys.readouterr().err
    for reason in (
        "grid: " + base,
        "differ in spacing",
        "holds the ids [99]",
        f"absent: no label map in {teacher}",
        "holds the ids [7], but only [14] are annotated",
        f"alone: no label map in {base}",
    ):
        assert reason in errors
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.nii.gz", "merge.csv"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to merge"),
        (["--annotated", "14"], "--partial and --annotated belong together"),
        (["--partial", "{truth}", "--annotated", "15"], "--annotated 15: expected ids"),
        (["--partial", "{truth}", "--annotated", "14", "--protect", "14"], "--protect needs --teacher"),
        (["--partial", "{truth}", "--annotated", "14", "--on_disagree", "zero"], "--on_disagree needs --teacher"),
        (["--teacher", "{truth}", "--union", "5", "--on_disagree", "zero"], "give only one of"),
        (["--teacher", "{truth}", "--union", "77"], "--union [77]: not in the label set"),
        (["--teacher", "{truth}", "--id_map", "amos", "btcv"], "2 maps for 1 teachers"),
        (["--teacher", "{truth}", "--id_map", "words"], "no id map 'words'"),
        (["--teacher", "{truth}/none"], "no such folder"),
        (["--teacher", "{out}"], "is one of the folders to merge"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_written(tmp_path: Path, folders, capsys, words, message) -> None:
    base, truth = folders("pseudo", a=labels(1)), folders("truth", a=labels(14))
    (tmp_path / "out").mkdir()
    filled = [word.format(truth=truth, out=tmp_path / "out") for word in words]
    assert merge(tmp_path, "--base", base, *filled) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_real_label_map_keeps_its_grid_and_takes_the_liver_of_the_truth(tmp_path: Path, real_data: Path) -> None:
    """The same map is base and teacher; the ground truth is its liver, moved by one slice."""
    volume = read_labels(real_data / "ts_torso3mm_flare13.nii.gz")
    truth = np.roll((volume.array == 1).astype(np.uint8), 1, axis=0)
    for name, array in (("base", volume.array), ("teacher", volume.array), ("truth", truth)):
        write_labels(tmp_path / name / "torso.nii.gz", array, volume)
    words = ["--base", str(tmp_path / "base"), "--teacher", str(tmp_path / "teacher")]
    assert merge(tmp_path, *words, "--partial", str(tmp_path / "truth"), "--annotated", "1") == 0
    result = read_labels(tmp_path / "out" / "torso.nii.gz")
    assert geometry_difference(volume, result) is None
    assert np.array_equal(result.array == 1, truth == 1)
    elsewhere = (truth == 0) & (volume.array != 1)
    assert np.array_equal(result.array[elsewhere], volume.array[elsewhere])


def test_a_case_whose_name_is_no_text_is_merged_and_listed(tmp_path: Path, folders) -> None:
    name = os.fsdecode(b"M\xfcller")
    base = folders("pseudo", **{name: labels(1, 1, 2)}, a=labels(3))
    truth = folders("truth", **{name: labels(0, 14)})
    assert merge(tmp_path, "--base", base, "--partial", truth, "--annotated", "14") == 0
    assert merged(tmp_path, name, 3) == [1, 14, 2]
    assert set(rows(tmp_path)) == {"a", "M\\udcfcller"}
