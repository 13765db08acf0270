"""Memory as the system counts it: ``flare-predict`` in a process of its own, with and without a limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans

from nnunet_flare.images import Volume, read_volume, write_volume

pytestmark = pytest.mark.slow

LABELS = {"background": 0, **{f"organ{i}": i for i in range(1, 14)}}

PREDICT = """
import sys
from nnunet_flare.cli.predict import main
code = main(sys.argv[1:])
print("peak", next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""
"""The system's own mark; ``ru_maxrss`` begins with what the starting process had."""


def predict(*words: object) -> tuple[float, str]:
    """Peak resident memory in MB and what the command said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ("-device", "cpu", "--backend", "torch", "--precision", "fp32")
    command = [sys.executable, "-c", PREDICT, *map(str, words), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.rsplit("peak", 1)[1]), done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """14 classes, whose sums take 60 bytes a voxel, and a network of hardly any work."""
    plan = models.plans(spacing=(2.0, 2.0, 2.0), patch=(16, 96, 96), features=(2, 2))
    return models.write_model(tmp_path_factory.mktemp("model") / "model", plan=plan, labels=LABELS)


def test_a_limit_is_kept_with_the_same_labels(model, tmp_path):
    """The sums of the whole scan, which ``skip-empty`` wants, would need 0.5 GB: they are made in blocks instead."""
    noise = scans.blobs((400, 24, 24), seed=2).array
    body = np.kron(noise[:, ::2, ::2], np.ones((1, 12, 12), np.int16))
    write_volume(tmp_path / "long.nii.gz", Volume(body, (2.0, 2.0, 2.0)))
    words = ("-i", tmp_path / "long.nii.gz", "-m", model)
    blocks, _ = predict(*words, "-o", tmp_path / "blocks")
    whole, said = predict(*words, "-o", tmp_path / "whole", "--windows", "skip-empty")
    assert "predicted instead" not in said
    assert whole > blocks + 300
    limit = blocks + 150  # what libraries take at the first window is counted as of a large network
    kept, said = predict(
        *words, "-o", tmp_path / "kept", "--windows", "skip-empty", "--max_memory", f"{limit / 1024:.3f}"
    )
    assert "all windows are predicted instead" in said
    assert kept < limit
    expected, labels = (read_volume(tmp_path / name / "long.nii.gz").array for name in ("blocks", "kept"))
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(labels, expected)


def test_a_scan_of_1000_slices_and_14_classes_stays_under_8_gb(tmp_path):
    """512 x 512 x 1000 voxels on the grid of the FLARE22 winner's student, with a network of hardly any work."""
    plan = models.plans(spacing=(4.0, 1.2, 1.2), patch=(32, 128, 192), features=(2, 2))
    folder = models.write_model(tmp_path / "model", plan=plan, labels=LABELS)
    slices = scans.blobs((20, 512, 512), seed=1).array
    write_volume(tmp_path / "body.mha", Volume(np.tile(slices, (50, 1, 1)), (1.0, 0.8, 0.8)))
    peak, _ = predict("-i", tmp_path / "body.mha", "-o", tmp_path / "out", "-m", folder)
    assert read_volume(tmp_path / "out" / "body.mha").array.shape == (1000, 512, 512)
    assert peak < 8 * 1024
    assert peak < 3.5 * 1024, f"{peak:.0f} MB; it was 2 GB once"


WINDOW = """
import sys
from pathlib import Path
import numpy as np
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.settings import PredictionSettings

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

settings = PredictionSettings(backend=sys.argv[2], precision=sys.argv[3], max_memory_gb=64)
segmenter = Segmenter.from_model_folder(Path(sys.argv[1]), settings)
segmenter.load()
counted = segmenter.fitting.window_bytes(apart=False)
window = np.random.default_rng(0).normal(size=(1, 1, *segmenter.patch)).astype(np.float32)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
segmenter._forwards[0](window.copy())
print(counted, status("VmHWM") - before)
"""


def wide_model(folder: Path, network: str) -> Path:
    """A network with the features of nnU-Net's default plans at full resolution."""
    plan = models.plans(patch=(32, 128, 128), features=(32, 64, 128))
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    if network == "residual encoder":
        arguments = architecture["arch_kwargs"]
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        arguments["n_blocks_per_stage"] = [1, 2, 2]
        del arguments["n_conv_per_stage"]
    return models.write_model(folder, plan=plan, labels=LABELS)


@pytest.mark.parametrize("network", ["plain", "residual encoder"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_a_window_takes_what_was_counted(tmp_path, network, backend, precision):
    """The first one, which is the dearest, in a process of its own."""
    if backend == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed (extra: openvino)")
    folder = wide_model(tmp_path / "model", network)
    command = [sys.executable, "-c", WINDOW, str(folder), backend, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted, took = map(int, done.stdout.split())
    assert took <= counted <= 1.5 * took
