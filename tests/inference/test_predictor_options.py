"""The Python API's options: a coarse model first, fixed-size models, windows, test-time augmentation, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch

from nnunet_flare.cli import predict
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import read_volume, write_volume
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.members import Member
from nnunet_flare.inference.predictor import FlarePredictor
from nnunet_flare.inference.scans import PreparedScan

EXACT = {"precision": "fp32", "backend": "torch"}

FIXED_SIZE = (16, 24, 20)


def results_folder(tmp_path: Path, name: str) -> Path:
    return tmp_path / "Dataset022_Abdomen" / f"nnUNetTrainer__nnUNetPlans__{name}"


def patient() -> scans.Volume:
    """A body with something bright in it, and much air on one side."""
    array = np.full((24, 60, 140), -1000, np.int16)
    array[4:20, 10:50, 8:62] = scans.blobs((16, 40, 54), seed=3).array.clip(-150, 200)
    array[9:13, 20:32, 40:52] = 1500
    return scans.Volume(array, (4.0, 1.7, 2.3))


def bright_is_organ(self: Segmenter, scan: PreparedScan, *, progress: object = None) -> np.ndarray:
    """In place of a coarse network, which untrained calls everything an organ."""
    data = scan.prepared.data[0]
    return (data > 0.5 * data.max()).astype(np.uint8)


@pytest.fixture
def fine(tmp_path: Path) -> Path:
    return models.write_model(results_folder(tmp_path, "3d_fullres"))


@pytest.fixture
def coarse(tmp_path: Path) -> Path:
    plan = models.plans(spacing=(8.0, 6.0, 6.0), patch=(8, 16, 16))
    return models.write_model(results_folder(tmp_path, "3d_lowres"), plan=plan, seed=5)


@pytest.fixture
def fixed_fine(tmp_path: Path) -> Path:
    """A model of crops resized to one size, as ``nnUNetPlannerFlareFine`` plans it."""
    plan: dict[str, Any] = models.plans(
        patch=FIXED_SIZE,
        reader="SimpleITKIOWithReorient",
        normalisation="FlareClip500Normalization",
        force_separate_z=False,
    )
    configuration = plan["configurations"]["3d_fullres"]
    configuration["preprocessor_name"] = "FlareFixedSizePreprocessor"
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}_kwargs"]["order"] = 1
    return models.write_model(tmp_path / "fixed", plan=plan)


def by_command(tmp_path: Path, model: Path, *options: object) -> np.ndarray:
    """What ``flare-predict`` writes for the patient."""
    write_volume(tmp_path / "patient.nii.gz", patient())
    words = ["-i", tmp_path / "patient.nii.gz", "-o", tmp_path / "out", "-m", model]
    words += ["--backend", "torch", "--precision", "fp32", *options]
    assert predict.main([str(word) for word in words]) == 0
    return read_volume(tmp_path / "out" / "patient.nii.gz").array


@pytest.mark.parametrize("kind", ["folder", "name", "predictor"])
def test_a_coarse_model_first_as_the_command_does(fine, coarse, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Segmenter, "network_labels", bright_is_organ)
    expected = by_command(tmp_path, fine, "--roi", coarse, "--roi_rule", "sztu", "--roi_margin", 4)
    assert (expected != by_command(tmp_path, fine)).any(), "the box is the whole scan, which proves nothing"
    roi = {
        "folder": lambda: coarse,
        "name": lambda: "3d_lowres",
        "predictor": lambda: FlarePredictor.from_model_folder(coarse, **EXACT),
    }[kind]()
    predictor = FlarePredictor.from_model_folder(fine, roi=roi, roi_rule="sztu", roi_margin_mm=4, **EXACT)
    np.testing.assert_array_equal(predictor.predict(patient()), expected)


def test_a_fixed_size_model_behind_a_coarse_one(fixed_fine, coarse, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, "network_labels", bright_is_organ)
    expected = by_command(tmp_path, fixed_fine, "--roi", coarse, "--roi_margin", 0)
    predictor = FlarePredictor.from_model_folder(fixed_fine, roi=coarse, roi_margin_mm=0, **EXACT)
    labels = predictor.predict(patient())
    assert labels.shape == patient().array.shape
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(labels, expected)


def test_a_predictor_with_a_coarse_model_takes_no_preprocessed_scan(fine, coarse):
    predictor = FlarePredictor.from_model_folder(fine, roi=coarse, **EXACT)
    data = predictor.segmenter.prepare([patient()]).prepared.data
    for call in (
        lambda: predictor.predict_members(data),
        lambda: predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)),
        lambda: predictor.predict_sliding_window_return_logits(torch.from_numpy(data)),
        lambda: predictor.predict_single_npy_array(
            patient().array[None].astype(np.float32), {"spacing": [4, 1.7, 2.3]}
        ),
    ):
        with pytest.raises(InputError, match="open the model without roi="):
            call()


def test_what_the_coarse_model_cannot_be_is_refused(fine, coarse, tmp_path):
    with pytest.raises(InputError, match="is not a trained model's folder"):
        FlarePredictor.from_model_folder(fine, roi=tmp_path / "nowhere", **EXACT)
    with pytest.raises(InputError, match="expected one of union, fosun, sztu"):
        FlarePredictor.from_model_folder(fine, roi=coarse, roi_rule="all", **EXACT)


@pytest.mark.parametrize(
    ("keywords", "options"),
    [
        ({"windows": "skip-empty"}, ("--windows", "skip-empty")),
        ({"windows": "huang"}, ("--windows", "huang")),
        ({"tta": "mirror"}, ("--tta", "mirror")),
        ({"tta": "crop-rotate"}, ("--tta", "crop-rotate")),
        ({"step_size": 0.4}, ("-step_size", 0.4)),
    ],
)
def test_options_do_what_they_do_in_the_command(fine, tmp_path, keywords, options):
    expected = by_command(tmp_path, fine, *options)
    assert (expected != by_command(tmp_path, fine)).any(), "the option changes nothing here, which proves nothing"
    np.testing.assert_array_equal(
        FlarePredictor.from_model_folder(fine, **keywords, **EXACT).predict(patient()), expected
    )
    if keywords != {"step_size": 0.4}:
        members = FlarePredictor.from_members([Member(fine, 0)], **keywords, **EXACT)
        np.testing.assert_array_equal(members.predict(patient()), expected)


def test_memory_limit_and_unknown_options_are_said(fine):
    with pytest.raises(CaseError, match=r"--max_memory allows 0.001 GB"):
        FlarePredictor.from_model_folder(fine, max_memory_gb=0.001, **EXACT).predict(patient())
    with pytest.raises(InputError, match="expected one of all, skip-empty, huang"):
        FlarePredictor.from_model_folder(fine, windows="some", **EXACT)
    with pytest.raises(InputError, match="-device cuda"):
        FlarePredictor.from_model_folder(fine, gpu_memory_gb=2, **EXACT)
