"""Every further output at once, of every kind of model: each says what the label map says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
from small_series import write_patient_series

from nnunet_flare.cli import export, predict
from nnunet_flare.images import Volume, read_volume
from nnunet_flare.labels import drawn_parts

highdicom = pytest.importorskip("highdicom", reason="highdicom (extra: dicom) is not installed")
pydicom = pytest.importorskip("pydicom", reason="pydicom (extra: dicom) is not installed")
pytest.importorskip("openvino", reason="OpenVINO is not installed (extra: openvino)")

ALL = (
    "--statistics",
    "--preview",
    "--save_probabilities",
    "--uncertainty",
    "--rtstruct",
    "--dicom_seg",
    "--save_members",
)

EXACT = ("--precision", "fp32")


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Models of every kind, and a DICOM series."""
    folder = tmp_path_factory.mktemp("together")
    plan = models.plans()
    models.write_model(folder / "T__nnUNetPlans__3d_fullres", plan=plan, folds=(0, 1))
    models.write_model(folder / "T__nnUNetPlans__3d_lowres", plan=models.plans(spacing=(8.0, 4.0, 4.0)), seed=3)
    models.write_model(folder / "regions", labels=models.REGIONS, folds=(0, 1))
    models.write_cascade(folder / "cascade")
    models.write_cascade(folder / "of_regions", labels=models.REGIONS)
    volume = scans.blobs((12, 36, 40), spacing=(4.0, 2.0, 2.0))
    write_patient_series(folder / "in" / "patient", Volume(volume.array, volume.spacing_mm, (3.0, -20.0, 7.0)))
    return folder


KINDS = {
    "exported, coarse to fine": ("T__nnUNetPlans__3d_fullres", True, ("--roi", "3d_lowres", "--roi_margin", 4)),
    "regions": ("regions", False, ()),
    "exported cascade": (f"cascade/nnUNetTrainer__nnUNetPlans__{models.CASCADE}", True, ()),
    "cascade of regions": (f"of_regions/nnUNetTrainer__nnUNetPlans__{models.CASCADE}", False, ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_further_output_says_what_the_label_map_says(room, tmp_path, kind):
    name, is_exported, words = KINDS[kind]
    model, out = room / name, tmp_path / "out"
    dataset = json.loads((model / "dataset.json").read_text())
    if is_exported:
        asked = [str(word) for word in ("-m", model, "-o", tmp_path / "exported", *EXACT, *words)]
        assert export.main(asked) == 0
        model, words = tmp_path / "exported", ()
    asked = ["-i", room / "in", "-o", out, "-m", model, *ALL, *EXACT, *words]
    assert predict.main([str(word) for word in asked]) == 0
    labels = read_volume(out / "patient.nii.gz").array
    assert len(np.unique(labels)) > 2
    parts = drawn_parts(dataset)
    masks = {label: np.isin(labels, ids) for label, ids in parts.items()}
    names = dict(zip(parts, [n for n in dataset["labels"] if n != "background"], strict=True))

    rows = {row["organ"]: row for row in csv.DictReader((out / "statistics.csv").open())}
    image = np.stack([s.pixel_array for s in sorted_slices(room / "in" / "patient")])
    for label, mask in masks.items():
        row = rows[names[label]]
        assert (int(row["id"]), int(row["voxels"])) == (label, np.count_nonzero(mask))
        assert float(row["volume_ml"]) == pytest.approx(np.count_nonzero(mask) * 0.016)
        assert float(row["mean_hu"]) == pytest.approx(image[mask].mean(), abs=1e-3)

    probabilities = np.load(out / "patient.npz")["probabilities"].reshape(-1, *labels.shape)
    if "regions_class_order" in dataset:
        decided = np.zeros_like(labels)
        for label, probability in zip(dataset["regions_class_order"], probabilities, strict=True):
            decided[probability > 0.5] = label
    else:
        decided = probabilities.argmax(0)
    assert (decided != labels).mean() < 1e-3
    unsure = read_volume(out / "uncertainty" / "patient.nii.gz").array
    assert unsure.shape == labels.shape and 0 < unsure.max() <= 255

    segments = highdicom.seg.segread(out / "patient.dcm")
    uids = [s.SOPInstanceUID for s in sorted_slices(room / "in" / "patient")]
    written = segments.get_pixels_by_source_instance(uids, combine_segments=False, ignore_spatial_locations=True)
    described = [segments.get_segment_description(number).segment_label for number in segments.segment_numbers]
    for at, label in enumerate(sorted(masks)):
        assert described[at] == names[label]
        np.testing.assert_array_equal(written[..., at] != 0, masks[label])
    regions = pydicom.dcmread(out / "rtstruct" / "patient.dcm")
    assert [roi.ROIName for roi in regions.StructureSetROISequence] == described
    enclosed = [len(roi.ContourSequence) for roi in regions.ROIContourSequence]
    assert [n > 0 for n in enclosed] == [bool(masks[label].any()) for label in sorted(masks)]

    assert (out / "patient.png").stat().st_size > 1000
    assert all(read_volume(out / "members" / k / "patient.nii.gz").array.shape == labels.shape for k in "01")


def sorted_slices(series: Path) -> list:
    return sorted((pydicom.dcmread(path) for path in series.iterdir()), key=lambda s: s.ImagePositionPatient[2])


REFUSED = {
    ("--save_probabilities", "--windows", "skip-empty"): "--save_probabilities needs --windows all",
    ("--uncertainty", "--windows", "huang"): "--uncertainty needs --windows all",
    ("--uncertainty", "disagreement", "-f", "0"): "so there is no disagreement",
    ("--save_members", "--windows", "skip-empty"): "--save_members needs --windows all",
    ("--uncertainty", "disagreement", "--windows", "skip-empty"): "needs --windows all",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_does_not_go_together_is_refused_before_anything_starts(room, tmp_path, capsys, words):
    asked = ["-i", room / "in", "-o", tmp_path / "out", "-m", room / KINDS["exported cascade"][0], *words]
    assert predict.main([str(word) for word in asked]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert REFUSED[words] in line
    assert not list(tmp_path.glob("out/*"))


def test_what_stays_of_an_earlier_prediction_beside_new_label_maps_is_said(room, tmp_path, caplog):
    """And statistics of the earlier label map are not taken for those of the new one."""
    out, other = tmp_path / "out", models.write_model(tmp_path / "other", seed=5)
    words = ["-i", room / "in", "-o", out, *EXACT, "--backend", "torch"]

    def warned(model: Path, *more: object) -> str:
        caplog.clear()
        assert predict.main([str(word) for word in (*words, "-m", model, *more)]) == 0
        return "".join(record.message for record in caplog.records if "earlier prediction" in record.message)

    first = room / "T__nnUNetPlans__3d_fullres"
    assert warned(first, *ALL) == ""
    assert warned(first, *ALL) == ""
    said = warned(first, *ALL, "-f", 0)
    assert str(out / "members" / "1" / "patient.nii.gz") in said and "members/0" not in said
    said = warned(other)
    assert str(out / "members" / "0" / "patient.nii.gz") in said and "and 6 more" in said
    assert warned(other, *(one for one in ALL if one not in ("--statistics", "--save_members"))).count(str(out)) == 3
    warned(other, "--continue_prediction", "--statistics")
    labels = read_volume(out / "patient.nii.gz").array
    rows = list(csv.DictReader((out / "statistics.csv").open()))
    assert {int(row["id"]): int(row["voxels"]) for row in rows} == {n: np.count_nonzero(labels == n) for n in (1, 2, 3)}
