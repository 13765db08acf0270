"""A scan as NRRD is the scan that the NIfTI of the same voxels is: in a dataset, in a prediction, in a download."""

from __future__ import annotations

import json
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_flare.cli.doctor import main as doctor
from nnunet_flare.cli.predict import main as predict
from nnunet_flare.cli.pseudolabel import main as pseudolabel
from nnunet_flare.datasets import dataset_reader
from nnunet_flare.images import read_labels, read_volume

SHAPE = (8, 32, 36)
ENDINGS = (".nii.gz", ".nrrd")
TILTED = (0.0, 0.8, -0.6, 1.0, 0.0, 0.0, 0.0, 0.6, 0.8)


def write(path: Path, array: np.ndarray, *, shift_mm: float = 0.0) -> None:
    """Written by SimpleITK itself, compressed, on a grid with a place and a direction of its own."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.7, 2.3, 4.0))
    image.SetOrigin((-123.5 + shift_mm, 77.75, 1234.5))
    image.SetDirection(TILTED)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)


def voxels() -> np.ndarray:
    rng = np.random.default_rng(3)
    return (np.kron(rng.normal(size=(4, 8, 9)), np.ones((2, 4, 4))) * 150).astype(np.int16)


def dataset(raw: Path, number: int, ending: str, *, shift_mm: float = 0.0) -> Path:
    """One training case whose file ending is the dataset's."""
    folder = raw / f"Dataset{number:03d}_Scans"
    write(folder / "imagesTr" / f"a_0000{ending}", voxels())
    write(folder / "labelsTr" / f"a{ending}", (voxels() > 100).astype(np.uint8), shift_mm=shift_mm)
    document = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "numTraining": 1}
    (folder / "dataset.json").write_text(json.dumps({**document, "file_ending": ending}))
    return folder


def test_both_are_read_with_the_same_values_on_the_same_grid(tmp_path: Path) -> None:
    for ending in ENDINGS:
        write(tmp_path / f"a{ending}", voxels())
    nifti, nrrd = (read_volume(tmp_path / f"a{ending}") for ending in ENDINGS)
    np.testing.assert_array_equal(nrrd.array, voxels())
    np.testing.assert_array_equal(nifti.array, voxels())
    assert nrrd.array.dtype == nifti.array.dtype and nrrd.spacing_mm == (4.0, 2.3, 1.7)
    np.testing.assert_allclose(nrrd.matrix, nifti.matrix, rtol=0, atol=1e-5)  # NIfTI's is in single precision


def test_doctor_opens_a_dataset_of_it_with_the_reader_that_nnunet_takes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    sound, shifted = dataset(tmp_path, 501, ".nrrd"), dataset(tmp_path, 502, ".nrrd", shift_mm=9.0)
    doctor(["-d", "501"])
    assert f"{sound}: every image and label map can be used" in capsys.readouterr().out
    doctor(["-d", "502"])
    said = capsys.readouterr().out
    assert "every image and label map can be used" not in said
    assert "a.nrrd" in said and "origin" in said
    document = json.loads((shifted / "dataset.json").read_text())
    assert dataset_reader(shifted, document) == "SimpleITKIO"


def test_a_prediction_is_that_of_the_nifti_on_the_scans_grid(tmp_path: Path) -> None:
    model = models.write_model(tmp_path / "model")
    for ending in ENDINGS:
        write(tmp_path / ending / f"a_0000{ending}", voxels())
        words = ["-i", str(tmp_path / ending), "-o", str(tmp_path / "out"), "-m", str(model), "--backend", "torch"]
        assert predict([*words, "--precision", "fp32"]) == 0
    nifti, nrrd = (read_labels(tmp_path / "out" / f"a{ending}") for ending in ENDINGS)
    np.testing.assert_array_equal(nrrd.array, nifti.array)
    assert len(np.unique(nrrd.array)) > 1
    written, scan = (sitk.ReadImage(str(tmp_path / name)) for name in ("out/a.nrrd", ".nrrd/a_0000.nrrd"))
    for grid in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(written, grid)() == getattr(scan, grid)(), grid


@pytest.mark.parametrize("group", ["imagesTr", "labelsTr", "unlabelled"])
def test_prepare_names_one_in_a_download_and_takes_the_others(tmp_path, monkeypatch, capsys, group) -> None:
    """The challenges give NIfTI, and a dataset has one file ending: a scan of another is never left out unsaid."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    download = tmp_path / "FLARE22"
    for number in (1, 2):
        write(download / "imagesTr" / f"FLARE22_Tr_000{number}_0000.nii.gz", voxels() + number)
        write(download / "labelsTr" / f"FLARE22_Tr_000{number}.nii.gz", (voxels() > 100).astype(np.uint8))
    name = {"imagesTr": "FLARE22_Tr_0002_0000", "labelsTr": "FLARE22_Tr_0002", "unlabelled": "Case_00001_0000"}[group]
    (download / group / f"{name}.nii.gz").unlink(missing_ok=True)
    odd = download / group / f"{name}.nrrd"
    write(odd, voxels() if group != "labelsTr" else (voxels() > 100).astype(np.uint8))
    assert pseudolabel(["prepare", "--flare22", str(download)]) == 1
    assert f"not recognised: {odd}: " in capsys.readouterr().err
    taken = sorted(path.name for path in (tmp_path / "raw/Dataset022_FLARE22/imagesTr").iterdir())
    expected = [f"FLARE22_Tr_000{number}_0000.nii.gz" for number in ((1, 2) if group == "unlabelled" else (1,))]
    assert taken == expected
