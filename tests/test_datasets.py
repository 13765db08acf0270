"""A dataset is refused before training with all its problems at once, each with its file; a sound one passes."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_flare.cases import Case, write_table
from nnunet_flare.datasets import check_dataset, resolve_dataset
from nnunet_flare.errors import InputError
from nnunet_flare.images import Volume, write_labels, write_volume

LABELS = {"background": 0, "liver": 1, "spleen": 2}
SHAPE = (6, 8, 10)


def scan(seed: int = 0) -> Volume:
    array = np.random.default_rng(seed).integers(-1000, 400, SHAPE).astype(np.int16)
    return Volume(array, (3.0, 1.0, 1.5), (1.0, 2.0, 3.0))


def label_map() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2:5, 2:5], labels[4, 5, 5] = 1, 2
    return labels


def write_dataset_json(folder: Path, **changes: Any) -> None:
    document = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 3, "file_ending": ".nii.gz", **changes}
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A sound dataset of three cases."""
    folder = tmp_path / "Dataset007_Small"
    for index in range(3):
        image = scan(index)
        write_volume(folder / "imagesTr" / f"case_{index}_0000.nii.gz", image)
        write_labels(folder / "labelsTr" / f"case_{index}.nii.gz", label_map(), image)
    write_dataset_json(folder)
    return folder


def only_problem(dataset: Path) -> str:
    problems = check_dataset(dataset)
    assert len(problems) == 1, problems
    return problems[0]


def test_a_sound_dataset_has_no_problems(dataset: Path) -> None:
    assert check_dataset(dataset) == []
    write_table(dataset / "flare_cases.json", {"case_1": Case("partial", (1, 2)), "case_2": Case(weight=2.0)})
    assert check_dataset(dataset) == []


def test_all_problems_come_at_once(dataset: Path) -> None:
    (dataset / "labelsTr" / "case_0.nii.gz").unlink()
    (dataset / "imagesTr" / "case_1_0000.nii.gz").write_bytes(b"")
    write_table(dataset / "flare_cases.json", {"ghost": Case()})
    write_dataset_json(dataset, numTraining=4)
    problems = check_dataset(dataset)
    assert len(problems) == 4
    found = "\n".join(problems)
    assert "case_0.nii.gz: no such file" in found
    assert "case_1_0000.nii.gz: the file is empty" in found
    assert "['ghost'] are not in the dataset" in found
    assert "numTraining is 4, found 3 cases" in found


def nan(volume: Volume) -> Volume:
    array = volume.array.astype(np.float32)
    array[0, 0, 0] = np.nan
    return volume.with_array(array)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: Volume(v.array, (2.0, 1.0, 1.5), v.origin), "spacing (2.0, 1.0, 1.5) and (3.0, 1.0, 1.5)"),
        (lambda v: Volume(v.array[:5], v.spacing_mm, v.origin), "shape (z, y, x) (5, 8, 10) and (6, 8, 10)"),
        (lambda v: Volume(v.array, v.spacing_mm, (1.0, 2.0, 9.0)), "origin (1.0, 2.0, 9.0) and (1.0, 2.0, 3.0)"),
        (lambda v: Volume(v.array, v.spacing_mm, v.origin, (-1.0, 0, 0, 0, -1, 0, 0, 0, 1)), "direction (-1.0,"),
        (nan, "1 of 480 voxels are NaN or infinite"),
        (lambda v: v.with_array(np.zeros_like(v.array)), "all voxels are 0; the scan is empty"),
    ],
)
def test_a_spoiled_image_is_found(dataset: Path, change: Callable[[Volume], Volume], expected: str) -> None:
    write_volume(dataset / "imagesTr" / "case_1_0000.nii.gz", change(scan(1)))
    problem = only_problem(dataset)
    assert problem.startswith("case_1: ")
    assert expected in problem


def test_a_difference_within_rounding_is_no_problem(dataset: Path) -> None:
    image = scan(1)
    nearly = Volume(image.array, image.spacing_mm, (1.0, 2.0, 3.0 + 5e-4))
    write_volume(dataset / "imagesTr" / "case_1_0000.nii.gz", nearly)
    assert check_dataset(dataset) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, "holds the ids [7], which are not in the label set [0, 1, 2]"),
        (1.5, "holds fractions"),
        (-1, "negative id -1"),
    ],
)
def test_a_label_map_with_impossible_ids_is_found(dataset: Path, value: float, expected: str) -> None:
    labels = label_map().astype(np.float32)
    labels[0, 0, 0] = value
    write_volume(dataset / "labelsTr" / "case_2.nii.gz", scan().with_array(labels))
    assert expected in only_problem(dataset)


def test_unreadable_label_map_is_found(dataset: Path) -> None:
    path = dataset / "labelsTr" / "case_2.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    assert "case_2.nii.gz: is truncated" in only_problem(dataset)


def test_a_label_map_without_image_is_found(dataset: Path) -> None:
    shutil.copy(dataset / "labelsTr" / "case_0.nii.gz", dataset / "labelsTr" / "lonely.nii.gz")
    assert "lonely.nii.gz: label map without images" in only_problem(dataset)


@pytest.mark.parametrize("name", ["notes.nii.gz", "._case_0_0000.nii.gz"])
def test_a_stray_file_that_nnunet_would_take_for_a_scan_is_found(dataset: Path, name: str) -> None:
    (dataset / "imagesTr" / name).write_bytes(b"x")
    assert re.search(rf"{re.escape(name)}: expected <case>_0000\.nii\.gz", only_problem(dataset))


def test_other_files_in_the_folders_are_nobodys_business(dataset: Path) -> None:
    (dataset / "imagesTr" / "readme.txt").write_text("hello")
    assert check_dataset(dataset) == []


def test_channels_must_be_those_of_dataset_json(dataset: Path) -> None:
    shutil.copy(dataset / "imagesTr" / "case_0_0000.nii.gz", dataset / "imagesTr" / "case_0_0001.nii.gz")
    assert "case_0: found the channels ['case_0_0000.nii.gz', 'case_0_0001.nii.gz']" in only_problem(dataset)
    (dataset / "imagesTr" / "case_0_0001.nii.gz").unlink()
    write_dataset_json(dataset, channel_names={"0": "CT", "1": "PET"})
    assert len(check_dataset(dataset)) == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": None}, "labels missing; required are channel_names, labels, numTraining, file_ending"),
        ({"labels": []}, "labels is [], expected an object"),
        ({"file_ending": ".png"}, "file_ending is '.png', expected one of .nii.gz"),
        ({"labels": {"liver": 1, "spleen": 2}}, "'background' is None, expected 0"),
        ({"labels": {"background": 0, "liver": 1, "spleen": 2, "aorta": 4}}, "ids [0, 1, 2, 4], expected 0, 1, 2,"),
        ({"labels": {"background": 0, "liver": "one"}}, "expected whole numbers"),
    ],
)
def test_a_wrong_dataset_json_is_told(dataset: Path, changes: dict[str, Any], expected: str) -> None:
    write_dataset_json(dataset, **changes)
    assert expected in only_problem(dataset)


def test_regions_and_ignore_are_labels_too(dataset: Path) -> None:
    labels = {"background": 0, "organs": [1, 2], "spleen": 2, "ignore": 3}
    write_dataset_json(dataset, labels=labels, regions_class_order=[1, 2])
    assert check_dataset(dataset) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "no such file"), ("{", "not readable as JSON"), ("[]", "expected an object, found list")],
)
def test_a_missing_or_broken_dataset_json_is_told(dataset: Path, text: str | None, expected: str) -> None:
    (dataset / "dataset.json").unlink()
    if text is not None:
        (dataset / "dataset.json").write_text(text)
    assert expected in only_problem(dataset)


def test_missing_folders_are_told(dataset: Path) -> None:
    shutil.rmtree(dataset / "labelsTr")
    write_dataset_json(dataset, numTraining=0)
    assert "labelsTr: no such folder" in only_problem(dataset)


def test_a_partial_case_holds_its_annotated_organs_only(dataset: Path) -> None:
    write_table(dataset / "flare_cases.json", {"case_1": Case("partial", (1,))})
    assert "holds [2], but flare_cases.json says that only [1] are annotated" in only_problem(dataset)


def test_a_broken_case_table_is_told(dataset: Path) -> None:
    (dataset / "flare_cases.json").write_text('{"version": 1, "cases": {"case_1": {"role": "teacher"}}}')
    assert "cases.case_1.role: found 'teacher'" in only_problem(dataset)


def test_cases_listed_in_dataset_json_are_checked_where_they_lie(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_LABELS", str(tmp_path / "elsewhere"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(dataset / "imagesTr" / "case_0_0000.nii.gz", elsewhere / "scan.nii.gz")
    shutil.move(dataset / "labelsTr" / "case_0.nii.gz", elsewhere / "label.nii.gz")
    listed = {"first": {"images": ["../elsewhere/scan.nii.gz"], "label": "$MY_LABELS/label.nii.gz"}}
    write_dataset_json(dataset, dataset=listed, numTraining=1)
    assert check_dataset(dataset) == []
    (elsewhere / "label.nii.gz").unlink()
    assert re.search(r"first: .*label\.nii\.gz: no such file", only_problem(dataset))
    write_dataset_json(dataset, dataset={"first": ["scan"]}, numTraining=0)
    assert any("dataset.first: expected 'images' (a list) and 'label'" in problem for problem in check_dataset(dataset))


@pytest.mark.parametrize("name", ["7", "007", 7, "Dataset007_Small"])
def test_a_dataset_is_found_by_id_and_name(dataset: Path, name: str | int) -> None:
    assert resolve_dataset(name, dataset.parent) == dataset


def test_a_dataset_is_found_by_path(dataset: Path, tmp_path: Path) -> None:
    assert resolve_dataset(str(dataset), tmp_path / "other") == dataset


def test_an_unknown_or_ambiguous_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset 8: .* holds Dataset007_Small"):
        resolve_dataset("8", tmp_path)
    (tmp_path / "Dataset007_Twin").mkdir()
    with pytest.raises(InputError, match="holds Dataset007_Small and Dataset007_Twin; ids must be unique; rename one"):
        resolve_dataset(7, tmp_path)
    assert resolve_dataset("Dataset007_Small", tmp_path) == dataset
    with pytest.raises(InputError, match="no such folder"):
        resolve_dataset(7, tmp_path / "nowhere")


def doubtful(path: Path, kind: str) -> None:
    """Change a file's header so that SimpleITK and nibabel read it differently, or nnU-Net's nibabel reader refuses."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    if kind == "mirrored":
        row = struct.unpack_from("<4f", data, 280)
        struct.pack_into("<4f", data, 280, *(-number for number in row))
        struct.pack_into("<2h", data, 252, 1, 2)
    elif kind == "metres":
        struct.pack_into("<B", data, 123, 1)
    elif kind == "slope 0":
        struct.pack_into("<2f", data, 112, 0, -1024)
    elif kind == "one more axis":
        struct.pack_into("<5h", data, 40, 4, *SHAPE[::-1], 1)
    path.write_bytes(gzip.compress(bytes(data)))


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("kind", ["mirrored", "metres", "slope 0", "one more axis"])
def test_files_that_the_datasets_reader_reads_otherwise_are_no_all_clear(dataset: Path, kind: str, reader: str) -> None:
    write_dataset_json(dataset, overwrite_image_reader_writer=reader)
    assert check_dataset(dataset) == []
    doubtful(dataset / "imagesTr" / "case_1_0000.nii.gz", kind)
    problems = check_dataset(dataset)
    if kind == "one more axis" and reader == "SimpleITKIO":
        assert problems == []  # stock trains on it as it is
        return
    assert problems and all(line.startswith("case_1: ") for line in problems)
    told = ("cannot read the file", "the spacing is wrong")
    assert any(("SimpleITK" in line and "nibabel" in line) or any(word in line for word in told) for line in problems)


def test_a_pair_that_only_the_datasets_own_reader_takes_apart_is_found(dataset: Path) -> None:
    """The label map's sform is mirrored, its qform is not: SimpleITK sees one grid."""
    write_dataset_json(dataset, overwrite_image_reader_writer="NibabelIO")
    doubtful(dataset / "labelsTr" / "case_1.nii.gz", "mirrored")
    assert any("case_1.nii.gz" in line and "nibabel reads the axes" in line for line in check_dataset(dataset))


@pytest.mark.parametrize(
    ("origin", "direction"),
    [
        ((1.0, 2.0, 3.004), (1.0, 0, 0, 0, 1, 0, 0, 0, 1)),
        ((1.0, 2.0, 3.0), (1.0, 0.0015, 0, -0.0015, 1, 0, 0, 0, 1)),
    ],
)
def test_a_label_map_whose_header_is_rounded_otherwise_is_taken_with_a_warning(
    dataset: Path, caplog: pytest.LogCaptureFixture, origin: Any, direction: Any
) -> None:
    write_labels(
        dataset / "labelsTr" / "case_1.nii.gz", label_map(), Volume(scan(1).array, (3.0, 1.0, 1.5), origin, direction)
    )
    assert check_dataset(dataset) == []
    assert "nearly the grid of case_1_0000.nii.gz" in caplog.text
