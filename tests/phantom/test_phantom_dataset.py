"""The phantom data set on disk: nnU-Net's layout, partial labels, junk, and being asked for twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nnunet_flare.cases import read_table
from nnunet_flare.errors import InputError
from nnunet_flare.images import geometry_difference, read_labels, read_volume
from nnunet_flare.organs import FLARE22, FLARE23, dataset_labels
from nnunet_flare.phantom import DATASET, dataset, write_phantom

SIZE = (16, 24, 32)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "out"
    write_phantom(out, labelled=3, partial=2, lesions=True, unlabelled=4, test=2, size=SIZE, junk=1)
    return out


def test_layout(phantom: Path) -> None:
    raw = phantom / "nnUNet_raw" / DATASET
    training = [f"FLAREPhantom_{part}_{i:04d}" for part, n in (("Pa", 2), ("Tr", 3)) for i in range(n)]
    assert sorted(p.name for p in (raw / "imagesTr").iterdir()) == [f"{c}_0000.nii.gz" for c in training]
    assert sorted(p.name for p in (raw / "labelsTr").iterdir()) == [f"{c}.nii.gz" for c in training]
    assert len(list((phantom / "unlabelled").glob("*_0000.nii.gz"))) == 4
    assert len(list((phantom / "unlabelled_truth").glob("*.nii.gz"))) == 4
    assert len(list((phantom / "test" / "images").glob("*_0000.nii.gz"))) == 2
    assert len(list((phantom / "test" / "labels").glob("*.nii.gz"))) == 2
    document = json.loads((raw / "dataset.json").read_text())
    assert document["labels"] == dataset_labels(FLARE23)
    assert document["channel_names"] == {"0": "CT"}
    assert document["numTraining"] == 5
    assert document["file_ending"] == ".nii.gz"


def test_images_and_labels_share_their_grid(phantom: Path) -> None:
    for label_path in phantom.rglob("*.nii.gz"):
        if label_path.parent.name in ("labelsTr", "labels"):
            images = label_path.parent.parent / {"labelsTr": "imagesTr", "labels": "images"}[label_path.parent.name]
            image = read_volume(images / label_path.name.replace(".nii.gz", "_0000.nii.gz"))
            assert geometry_difference(image, read_labels(label_path)) is None


def test_partial_cases_hold_their_annotated_organs_only(phantom: Path) -> None:
    raw = phantom / "nnUNet_raw" / DATASET
    table = read_table(raw / "flare_cases.json", labels=dataset_labels(FLARE23))
    assert table.counts(table.cases) == {"labelled": 3, "partial": 2}
    annotated = [table["FLAREPhantom_Pa_0000"].annotated, table["FLAREPhantom_Pa_0001"].annotated]
    assert annotated == [(14,), (1,)]
    for case, entry in table.cases.items():
        found = set(np.unique(read_labels(raw / "labelsTr" / f"{case}.nii.gz").array).tolist()) - {0}
        if entry.role == "partial":
            assert found <= set(entry.annotated or ())
        else:
            assert len(found) >= 11
    assert 1 in read_labels(raw / "labelsTr" / "FLAREPhantom_Pa_0001.nii.gz").array


def test_labelled_cases_are_narrow_and_all_others_wide(phantom: Path) -> None:
    cases = json.loads((phantom / "phantom.json").read_text())["cases"].values()
    assert {(c["group"], c["domain"]) for c in cases} == {
        ("labelled", "narrow"), ("partial", "wide"), ("unlabelled", "wide"), ("test", "wide")
    }  # fmt: skip


def test_the_record_tells_junk_and_true_volumes(phantom: Path) -> None:
    record = json.loads((phantom / "phantom.json").read_text())
    junk = [case for case, entry in record["cases"].items() if entry["junk"]]
    assert len(junk) == 1
    assert record["cases"][junk[0]]["group"] == "unlabelled"
    lost = (read_volume(phantom / "unlabelled" / f"{junk[0]}_0000.nii.gz").array == -1024).all(axis=(1, 2))
    assert lost.mean() > 0.25
    truth = read_labels(phantom / "unlabelled_truth" / f"{junk[0]}.nii.gz").array
    voxels = record["cases"][junk[0]]["voxels"]
    assert {organ.name: int((truth == organ.id).sum()) for organ in FLARE23} == voxels


def test_all_labelled_data_set_has_no_case_table(tmp_path: Path) -> None:
    write_phantom(tmp_path / "p", labelled=1, unlabelled=0, test=0, size=SIZE)
    raw = tmp_path / "p" / "nnUNet_raw" / DATASET
    assert not (raw / "flare_cases.json").exists()
    assert json.loads((raw / "dataset.json").read_text())["labels"] == dataset_labels(FLARE22)


def test_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_phantom(tmp_path / name, labelled=1, unlabelled=1, test=1, size=SIZE, seed=seed)
    one, same, other = (files(tmp_path / name) for name in "abc")
    assert one == same
    assert all(one[name] != other[name] for name in one if name.endswith("_0000.nii.gz"))


def test_more_cases_of_one_group_leave_the_others_as_they_were(tmp_path: Path) -> None:
    write_phantom(tmp_path / "few", labelled=1, unlabelled=1, test=1, size=SIZE)
    write_phantom(tmp_path / "many", labelled=2, unlabelled=3, test=1, size=SIZE)
    few, many = files(tmp_path / "few"), files(tmp_path / "many")
    images = [name for name in few if name.endswith(".nii.gz")]
    assert {name: few[name] for name in images}.items() <= many.items()


def test_a_phantom_that_is_there_is_kept(phantom: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in phantom.rglob("*") if p.is_file()}
    write_phantom(phantom, labelled=3, partial=2, lesions=True, unlabelled=4, test=2, size=SIZE, junk=1)
    assert {p: p.stat().st_mtime_ns for p in phantom.rglob("*") if p.is_file()} == before


def test_other_settings_in_the_same_folder_are_refused(phantom: Path) -> None:
    with pytest.raises(InputError, match=r"other settings \(labelled 3\).*another folder"):
        write_phantom(phantom, labelled=2, partial=2, lesions=True, unlabelled=4, test=2, size=SIZE, junk=1)


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match=r"is not empty and has no phantom\.json"):
        write_phantom(tmp_path, size=SIZE)
    assert files(tmp_path) == {"mine.txt": b"keep"}


def test_an_interrupted_phantom_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"labelled": 1, "unlabelled": 2, "test": 1, "size": SIZE}
    real, calls = dataset.make_phantom, []

    def dies_at_the_third(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset, "make_phantom", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "p", **settings)  # type: ignore[arg-type]
    (tmp_path / "p" / "nnUNet_raw" / DATASET / "imagesTr" / ".tmp-0123-half_0000.nii.gz").write_bytes(b"half")
    monkeypatch.setattr(dataset, "make_phantom", real)
    write_phantom(tmp_path / "p", **settings)  # type: ignore[arg-type]
    write_phantom(tmp_path / "q", **settings)  # type: ignore[arg-type]
    assert files(tmp_path / "p") == files(tmp_path / "q")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labelled": 0}, "training needs at least 1"),
        ({"labelled": -1}, "labelled is -1"),
        ({"unlabelled": 1, "junk": 2}, "2 junk scans do not fit among 1"),
        ({"domain": "huge"}, "'huge' is unknown"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_phantom(tmp_path / "p", size=SIZE, **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "p").exists()


def test_stock_nnunet_accepts_the_data_set(phantom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    verify_dataset_integrity(str(phantom / "nnUNet_raw" / DATASET), num_processes=1)
    assert "verify_dataset_integrity Done" in capsys.readouterr().out
