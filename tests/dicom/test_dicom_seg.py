"""``--dicom_seg``: the label map of a DICOM series as a DICOM segmentation that reads back equal."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
from small_series import write_patient_series

from nnunet_flare.cli import predict
from nnunet_flare.dicom.segmentation import write_dicom_seg
from nnunet_flare.dicom.series import ordered_files, read_series
from nnunet_flare.errors import CaseError
from nnunet_flare.images import Volume, read_volume, write_volume
from nnunet_flare.labels import label_names

pydicom = pytest.importorskip("pydicom", reason="pydicom (extra: dicom) is not installed")
highdicom = pytest.importorskip("highdicom", reason="highdicom (extra: dicom) is not installed")

NAMES = label_names(models.dataset_json())
SHAPE = (6, 20, 24)


@pytest.fixture
def series(tmp_path) -> Path:
    volume = scans.blobs(SHAPE, spacing=(4.0, 1.5, 2.0))
    turned = Volume(volume.array, volume.spacing_mm, (3.0, -20.0, 7.0), (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0))
    return write_patient_series(tmp_path / "in" / "patient", turned)


def read_back(path: Path, series: Path) -> tuple[np.ndarray, dict[int, str]]:
    """The label map in the series' slice order, and the names of its segments."""
    document = highdicom.seg.segread(path)
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in ordered_files(series, "case")]
    labels = document.get_pixels_by_source_instance(uids, combine_segments=True, ignore_spatial_locations=True)
    named = {number: document.get_segment_description(number).segment_label for number in document.segment_numbers}
    return labels, named


def run(*words: object) -> int:
    return predict.main([str(word) for word in (*words, "--backend", "torch", "--precision", "fp32")])


@pytest.mark.parametrize("with_meta", [True, False])
def test_a_series_with_slices_without_preamble_is_referred_to(series, tmp_path, with_meta):
    labels = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 3).astype(np.uint8)
    for path in list(series.iterdir())[:2]:
        data = path.read_bytes()
        meta = 132 + 12 + int.from_bytes(data[140:144], "little")  # preamble, letters, the length of the meta group
        path.write_bytes(data[132:] if with_meta else data[meta:])
    write_dicom_seg(tmp_path / "seg.dcm", labels, series, {1: "liver", 2: "spleen"}, "patient")
    document = highdicom.seg.segread(tmp_path / "seg.dcm")
    sources = [pydicom.dcmread(file, force=True).SOPInstanceUID for file in ordered_files(series, "patient")]
    back = document.get_pixels_by_source_instance(sources, combine_segments=True, ignore_spatial_locations=True)
    np.testing.assert_array_equal(back, labels)


def test_the_segmentation_reads_back_equal(series, tmp_path):
    model = models.write_model(tmp_path / "model")
    assert run("-i", series.parent, "-o", tmp_path / "out", "-m", model, "--dicom_seg") == 0
    labels = read_volume(tmp_path / "out" / "patient.nii.gz").array
    back, named = read_back(tmp_path / "out" / "patient.dcm", series)
    assert len(np.unique(labels)) > 2
    np.testing.assert_array_equal(back, labels)
    assert named == {1: "liver", 2: "kidney", 3: "spleen"}
    document = highdicom.seg.segread(tmp_path / "out" / "patient.dcm")
    assert document.PatientID == "7"
    types = [document.get_segment_description(number).segmented_property_type.meaning for number in (1, 2, 3)]
    assert types == ["Liver", "Kidney", "Spleen"]


def test_continuing_makes_a_missing_segmentation(series, tmp_path, capsys):
    model = models.write_model(tmp_path / "model")
    command = ("-i", series, "-o", tmp_path / "out", "-m", model, "--continue_prediction")
    assert run(*command) == 0
    assert run(*command, "--dicom_seg") == 0
    assert (tmp_path / "out" / "patient.dcm").is_file()
    assert run(*command, "--dicom_seg") == 0
    assert "0 written, 1 already there" in capsys.readouterr().out


def test_frames_lie_where_the_slices_lie(series, tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[4, 3:9, 5:11] = 2
    write_dicom_seg(tmp_path / "seg.dcm", labels, series, NAMES, "case")
    document = pydicom.dcmread(tmp_path / "seg.dcm")
    positions = [f.PlanePositionSequence[0].ImagePositionPatient for f in document.PerFrameFunctionalGroupsSequence]
    grid = read_series(series, "case")
    expected = np.asarray(grid.origin) + np.reshape(grid.direction, (3, 3))[:, 2] * 4 * grid.spacing_mm[0]
    np.testing.assert_allclose(np.asarray(positions, float), [expected], atol=1e-4)
    np.testing.assert_array_equal(document.pixel_array.reshape(SHAPE[1:]), labels[4] == 2)


def test_ids_with_gaps_and_regions_keep_their_names(series, tmp_path):
    assert label_names({"labels": {"background": 0, "b": 7, "a": 3, "ignore": 8}}) == {3: "a", 7: "b"}
    assert label_names(models.dataset_json(labels=models.REGIONS)) == {1: "organ", 2: "lesion"}
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2:9, 2:9], labels[3:5, 2:9, 2:9] = 3, 7
    write_dicom_seg(tmp_path / "seg.dcm", labels, series, {3: "pancreas tumour", 7: "thing"}, "case")
    back, named = read_back(tmp_path / "seg.dcm", series)
    np.testing.assert_array_equal(back, np.select([labels == 3, labels == 7], [1, 2]))
    assert named == {1: "pancreas tumour", 2: "thing"}


@pytest.mark.parametrize("name", ["lesion", "liver_tumor", "pancreas tumour"])
def test_an_organs_lesion_has_the_code_of_a_lesion(series, tmp_path, name):
    write_dicom_seg(tmp_path / "seg.dcm", np.ones(SHAPE, np.uint8), series, {1: name, 2: "pancreas"}, "case")
    found = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence
    assert [one.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for one in found] == ["Lesion", "Pancreas"]
    assert "Abnormal" in found[0].SegmentedPropertyCategoryCodeSequence[0].CodeMeaning


def test_names_that_the_series_character_set_cannot_hold_are_kept_in_segments(series, tmp_path):
    for path in series.iterdir():
        one = pydicom.dcmread(path)
        one.SpecificCharacterSet, one.PatientName = "ISO_IR 100", "Müller^Jörg"
        one.save_as(path)
    names = {1: "肝脏", 2: "Nebenhöhle"}
    write_dicom_seg(tmp_path / "one.dcm", np.ones(SHAPE, np.uint8), series, names, "case")
    document = pydicom.dcmread(tmp_path / "one.dcm")
    assert [one.SegmentLabel for one in document.SegmentSequence] == list(names.values())
    assert document.PatientName == "Müller^Jörg"


def test_a_map_without_organs_is_written_too(series, tmp_path):
    write_dicom_seg(tmp_path / "seg.dcm", np.zeros(SHAPE, np.uint8), series, NAMES, "case")
    back, _ = read_back(tmp_path / "seg.dcm", series)
    assert not back.any()


def test_a_series_without_frame_of_reference_is_set_aside(series, tmp_path):
    for path in series.iterdir():
        slice_ = pydicom.dcmread(path)
        del slice_.FrameOfReferenceUID
        slice_.save_as(path)
    with pytest.raises(CaseError, match="a DICOM segmentation cannot refer to it"):
        write_dicom_seg(tmp_path / "seg.dcm", np.zeros(SHAPE, np.uint8), series, NAMES, "case")
    assert not list(tmp_path.glob("*seg.dcm"))


def test_input_that_is_no_dicom_is_refused_before_anything_is_predicted(tmp_path, capsys):
    model = models.write_model(tmp_path / "model")
    write_volume(tmp_path / "in" / "a_0000.nii.gz", scans.blobs((8, 20, 20)))
    assert run("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--dicom-seg") == 2
    assert "a_0000.nii.gz is not a folder of a DICOM series" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_without_the_extra_the_command_that_installs_it_is_named(series, tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "highdicom" else real(name, *a))
    model = models.write_model(tmp_path / "model")
    assert run("-i", series, "-o", tmp_path / "out", "-m", model, "--dicom_seg") == 2
    assert "pip install 'nnunet-flare[dicom]'" in capsys.readouterr().err
