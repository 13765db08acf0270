"""What only a real GPU can confirm of prediction; ``FLARE_GPU_TEST_DEVICE=cpu`` tries the tests themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch
from test_overflow import scale_first_convolution

from nnunet_flare.images import read_labels, write_volume
from nnunet_flare.inference.arrays import to_host
from nnunet_flare.inference.coarse_to_fine import RoiSegmenter
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.settings import PredictionSettings

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("FLARE_GPU_TEST_DEVICE", "cuda")
HALF = "fp16" if DEVICE == "cuda" else "bf16"

RESULTS = {
    "a label map": lambda segmenter, scan: segmenter.segment(scan)[0],
    "the members' label maps": lambda segmenter, scan: np.stack(segmenter.segment(scan, members=True)[1]),
    "members for pseudo-labels": lambda segmenter, scan: to_host(
        segmenter.predict_members(scan.prepared.data).mean_softmax
    ),
}
OPTIONS = {
    "plain": {},
    "mirrored": {"tta": "mirror"},
    "small steps": {"step_size": 0.5},
    "empty windows left out": {"windows": "skip-empty"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "model", folds=(0, 1))


def segmenter(folder: Path, device: str = DEVICE, **options: object) -> Segmenter:
    return Segmenter.from_model_folder(folder, PredictionSettings(device=device, backend="torch", **options))


def result(what: str, folder: Path, device: str, **options: object) -> np.ndarray:
    predicts = segmenter(folder, device, **options)
    return np.asarray(RESULTS[what](predicts, predicts.prepare([scans.blobs((30, 60, 70))])))


@pytest.mark.parametrize(
    ("what", "options"),
    [(what, options) for what in RESULTS for options in OPTIONS if what == "a label map" or "empty" not in options],
)
def test_single_precision_is_the_cpus_but_for_ties(model, what, options):
    expected = result(what, model, "cpu", precision="fp32", **OPTIONS[options])
    found = result(what, model, DEVICE, precision="fp32", **OPTIONS[options])
    if np.issubdtype(expected.dtype, np.floating):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    else:
        assert len(np.unique(expected)) > 1 and (found != expected).mean() < 1e-4


@pytest.mark.skipif(DEVICE != "cuda", reason="names and limits of a GPU")
@pytest.mark.parametrize("options", [{"device": "cuda:0"}, {"gpu_memory_gb": 2.0}])
def test_a_gpu_that_is_named_or_limited_gives_the_same(model, options):
    expected = result("a label map", model, "cpu", precision="fp32")
    try:
        found = result("a label map", model, **{"device": DEVICE, "precision": "fp32", **options})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (found != expected).mean() < 1e-4


def test_a_crop_that_is_cut_out_there_gives_the_same(model):
    """Coarse to fine, where the volume goes over once."""
    found = {}
    for device in ("cpu", DEVICE):
        both = [segmenter(model, device, precision="fp32") for _ in range(2)]
        with patch.object(RoiSegmenter, "box", lambda *_: ((4, 27), (8, 50), (10, 65))):
            roi = RoiSegmenter(*both)
            found[device] = roi.segment(roi.prepare([scans.blobs((30, 60, 70))]))[0]
    assert (found[DEVICE] != found["cpu"]).mean() < 1e-4 and len(np.unique(found["cpu"])) > 1


@pytest.mark.parametrize("what", ["a label map", "the members' label maps"])
def test_half_precision_changes_few_voxels_of_an_untrained_network(model, what):
    expected = result(what, model, "cpu", precision="fp32")
    assert (result(what, model, DEVICE, precision=HALF) != expected).mean() < 0.02


def test_an_overflow_of_half_precision_is_noticed(tmp_path):
    folder = models.write_model(tmp_path / "model")
    scale_first_convolution(folder, 1e5)
    expected = result("a label map", folder, "cpu", precision="fp32")
    assert (result("a label map", folder, DEVICE, precision=HALF) != expected).mean() < 0.02


def test_a_trained_network_finds_the_same_organs_in_half_precision(real_data, tmp_path, monkeypatch):
    maker = real_data / "flare25-student" / "make_model.py"
    if not maker.is_file():
        pytest.skip(f"no trained network: {maker}")
    monkeypatch.setenv("PYTHONPATH", str(maker.parent))
    student = tmp_path / "student"
    subprocess.run([sys.executable, str(maker), str(student)], check=True)
    scan = scans.crop(scans.real_ct("chaos3"), (30, 90), (0, 512), (0, 512))
    write_volume(tmp_path / "in" / "case_0000.nii.gz", scan)
    maps = {}
    for device, precision in (("cpu", "fp32"), (DEVICE, "auto")):
        command = [sys.executable, "-m", "nnunet_flare.cli.predict", "-i", tmp_path / "in", "-o", tmp_path / device]
        command += ["-m", student, "-device", device, "--precision", precision, "--backend", "torch"]
        subprocess.run([str(word) for word in [*command, "--trust-checkpoint"]], check=True)
        maps[precision] = read_labels(tmp_path / device / "case.nii.gz").array
        (tmp_path / device / "case.nii.gz").unlink()
    dice = []
    for organ in np.unique(maps["fp32"])[1:]:
        one, other = maps["fp32"] == organ, maps["auto"] == organ
        dice.append(2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other)))
    assert len(dice) > 5 and np.mean(dice) >= 0.995


@pytest.mark.skipif(DEVICE != "cuda", reason="the memory of a GPU")
def test_a_card_that_is_full_is_no_failure(model, caplog):
    """Its memory is taken by somebody else; the sums (22 MB) find no room in blocks that PyTorch holds."""
    on_cpu, predicts = segmenter(model, "cpu", precision="fp32"), segmenter(model, precision="fp32")
    volume = scans.blobs((12, 420, 420))
    expected = on_cpu.segment(on_cpu.prepare([volume]))[0]
    scan = predicts.prepare([volume])
    predicts.segment(scan)  # what the libraries want of the card is there
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**20) / total)
    try:
        found = predicts.segment(scan)[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (found != expected).mean() < 1e-4
    assert "out of GPU memory" in caplog.text


@pytest.mark.skipif(DEVICE != "cuda", reason="what PyTorch finds")
def test_auto_is_the_gpu_and_the_process_keeps_its_flags(model):
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    predicts = segmenter(model, "auto")
    predicts.segment(predicts.prepare([scans.blobs((30, 60, 70))]))
    assert str(predicts._networks.device) == "cuda" and flags == (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
    )
