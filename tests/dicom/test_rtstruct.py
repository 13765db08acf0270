"""``--rtstruct``: the label map of a DICOM series as contours that lie where its voxels do."""

from __future__ import annotations

from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
from small_series import write_patient_series

from nnunet_flare.cli import predict
from nnunet_flare.dicom.rtstruct import write_rtstruct
from nnunet_flare.dicom.series import ordered_files, read_series
from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, read_volume, write_volume
from nnunet_flare.labels import label_names

pydicom = pytest.importorskip("pydicom", reason="pydicom (extra: dicom) is not installed")
skimage = pytest.importorskip("skimage.draw", reason="draws the contours independently")

NAMES = label_names(models.dataset_json())
SHAPE = (6, 20, 24)
TILTED = (0.8, 0.0, 0.6, 0.0, -1.0, 0.0, 0.6, 0.0, -0.8)


@pytest.fixture
def series(tmp_path) -> Path:
    volume = scans.blobs(SHAPE, spacing=(4.0, 1.5, 2.0))
    return write_patient_series(
        tmp_path / "in" / "patient", Volume(volume.array, volume.spacing_mm, (3.0, -20.0, 7.0), TILTED)
    )


def read_back(path: Path, series: Path) -> tuple[np.ndarray, dict[int, str], float]:
    """The label map that the contours enclose, the regions' names, and the contours' area in mm2."""
    document, volume = pydicom.dcmread(path), read_series(series, "case")
    slices = {pydicom.dcmread(f).SOPInstanceUID: z for z, f in enumerate(ordered_files(series, "case"))}
    to_index = np.linalg.inv(volume.matrix)
    labels, total = np.zeros(volume.array.shape, np.uint8), 0.0
    for region in document.ROIContourSequence:
        for contour in region.ContourSequence:
            points = np.reshape(np.asarray(contour.ContourData, float), (-1, 3))
            assert contour.NumberOfContourPoints == len(points)
            x, y, z = (to_index @ np.c_[points, np.ones(len(points))].T)[:3]
            at = slices[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            np.testing.assert_allclose(z, at, atol=1e-3)
            rows, columns = skimage.polygon(y, x, volume.array.shape[1:])
            labels[at, rows, columns] = region.ReferencedROINumber
            total += abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 * np.prod(volume.spacing_mm[1:])
    return labels, {int(roi.ROINumber): roi.ROIName for roi in document.StructureSetROISequence}, total


def test_contours_enclose_the_label_map(series, tmp_path, capsys):
    model = models.write_model(tmp_path / "model")
    words = ["-i", series.parent, "-o", tmp_path / "out", "-m", model, "--rtstruct", "--dicom_seg", "--preview"]
    words = [str(word) for word in (*words, "--statistics", "--backend", "torch", "--precision", "fp32")]
    assert predict.main(words) == 0
    assert f"structure sets: {tmp_path / 'out' / 'rtstruct' / 'patient.dcm'}" in capsys.readouterr().out
    labels, names, mm2 = read_back(tmp_path / "out" / "rtstruct" / "patient.dcm", series)
    expected = read_volume(tmp_path / "out" / "patient.nii.gz").array
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(labels, expected)
    assert names == NAMES
    assert mm2 == pytest.approx(np.count_nonzero(expected) * 3.0, rel=0.1)  # half a pixel of each piece is cut off
    assert predict.main([*words, "--continue_prediction"]) == 0
    assert "0 written, 1 already there" in capsys.readouterr().out


def test_area_is_that_of_the_voxels_but_for_half_a_pixel_a_piece(series, tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[:, 2:14, 3:20] = 1
    labels[1:3, 5:9, 6:9] = 0  # a hole
    labels[:, 16:19, 4:9] = 3
    write_rtstruct(tmp_path / "a.dcm", labels, series, NAMES, "patient")
    found, _, mm2 = read_back(tmp_path / "a.dcm", series)
    np.testing.assert_array_equal(found, labels)
    pieces, rings = 12, 2
    assert mm2 == pytest.approx((np.count_nonzero(labels) - pieces / 2 + rings / 2) * 1.5 * 2.0)


def test_it_refers_to_the_series_and_keeps_the_patient(series, tmp_path):
    write_rtstruct(tmp_path / "a.dcm", np.zeros(SHAPE, np.uint8), series, NAMES, "patient")
    document, source = pydicom.dcmread(tmp_path / "a.dcm"), pydicom.dcmread(ordered_files(series, "c")[0])
    assert document.SOPClassUID == pydicom.uid.RTStructureSetStorage and document.Modality == "RTSTRUCT"
    for name in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert document[name].value == source[name].value
    assert document.SeriesInstanceUID != source.SeriesInstanceUID
    frame = document.ReferencedFrameOfReferenceSequence[0]
    inside = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert inside.SeriesInstanceUID == source.SeriesInstanceUID
    assert len(inside.ContourImageSequence) == SHAPE[0]
    assert all(len(region.ContourSequence) == 0 for region in document.ROIContourSequence)


def test_a_series_without_a_frame_of_reference_is_set_aside(series, tmp_path):
    path = next(series.iterdir())
    document = pydicom.dcmread(path)
    del document.FrameOfReferenceUID
    document.save_as(path)
    with pytest.raises(CaseError, match="FrameOfReferenceUID"):
        write_rtstruct(tmp_path / "a.dcm", np.zeros(SHAPE, np.uint8), series, NAMES, "patient")


def test_images_that_are_no_series_are_refused_at_once(tmp_path, capsys):
    write_volume(tmp_path / "in" / "a_0000.nii.gz", scans.blobs(SHAPE))
    model = models.write_model(tmp_path / "model")
    words = ["-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--rtstruct"]
    assert predict.main([str(word) for word in words]) == 2
    assert "is not a folder of a DICOM series" in capsys.readouterr().err


def test_names_that_the_series_character_set_cannot_hold_are_kept_in_regions(series, tmp_path):
    for path in series.iterdir():
        one = pydicom.dcmread(path)
        one.SpecificCharacterSet, one.PatientName = "ISO_IR 100", "Müller^Jörg"
        one.save_as(path)
    names = {1: "肝脏", 2: "Nebenhöhle"}
    write_rtstruct(tmp_path / "one.dcm", np.ones(SHAPE, np.uint8), series, names, "case")
    document = pydicom.dcmread(tmp_path / "one.dcm")
    assert [one.ROIName for one in document.StructureSetROISequence] == list(names.values())
    assert document.PatientName == "Müller^Jörg"


def test_a_contour_of_thousands_of_points_is_read_as_numbers(tmp_path):
    """A lung has a hole for each of its vessels, all in one line."""
    sieve = (np.random.default_rng(0).random((2, 100, 100)) < 0.85).astype(np.uint8)
    series = write_patient_series(tmp_path / "in", Volume(scans.blobs(sieve.shape).array, (3.0, 0.7, 0.7)))
    write_rtstruct(tmp_path / "one.dcm", sieve, series, {1: "lung"}, "case")
    document = pydicom.dcmread(tmp_path / "one.dcm")
    contour = max(document.ROIContourSequence[0].ContourSequence, key=lambda one: one.NumberOfContourPoints)
    assert contour.NumberOfContourPoints > 2500
    labels, _, _ = read_back(tmp_path / "one.dcm", series)
    np.testing.assert_array_equal(labels, sieve)
