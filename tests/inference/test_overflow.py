"""Networks whose scores overflow half precision: noticed, computed in single precision, and said."""

from __future__ import annotations

from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch

from nnunet_flare.cli import predict
from nnunet_flare.errors import CaseError
from nnunet_flare.images import write_volume
from nnunet_flare.inference.arrays import to_host
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.torch_runtime import TorchRuntime


def scale_first_convolution(folder: Path, factor: float) -> None:
    """What the first convolution gives is normalised afterwards, so that its scale changes nothing but the range."""
    for path in folder.glob("fold_*/checkpoint_final.pth"):
        checkpoint = torch.load(path, weights_only=False)
        weights = checkpoint["network_weights"]
        first = next(name for name in weights if name.endswith("conv.weight"))
        for name in (first, first.replace(".weight", ".bias")):
            weights[name].mul_(factor)
        for name in {n for n in weights if n.endswith(("conv.weight", "conv.bias")) and "stages.0.0.convs.0" in n}:
            weights[name] = weights[first] if name.endswith("weight") else weights[first.replace(".weight", ".bias")]
        torch.save(checkpoint, path)


@pytest.fixture
def overflowing(tmp_path) -> Path:
    folder = models.write_model(tmp_path / "model", folds=(0, 1))
    scale_first_convolution(folder, 1e5)
    return folder


@pytest.fixture
def half(monkeypatch) -> None:
    """The CPU in place of a GPU, in its half precision."""
    monkeypatch.setattr("nnunet_flare.inference.networks.choose_precision", lambda asked, device: asked)
    monkeypatch.setattr("nnunet_flare.inference.networks._on", lambda device, precision: precision)


def segmenter(folder: Path, precision: str, **options: object) -> Segmenter:
    return Segmenter.from_model_folder(folder, PredictionSettings(backend="torch", precision=precision, **options))


RESULTS = {
    "a label map": lambda predicts, scan: predicts.segment(scan)[0],
    "the members' label maps": lambda predicts, scan: np.stack(predicts.segment(scan, members=True)[1]),
    "a coarse label map": lambda predicts, scan: predicts.network_labels(scan),
    "logits": lambda predicts, scan: predicts.logits(scan.prepared.data),
    "members for pseudo-labels": lambda predicts, scan: predicts.predict_members(scan.prepared.data).mean_softmax,
}


@pytest.mark.parametrize("what", RESULTS)
def test_an_overflow_of_half_precision_gives_what_single_precision_gives(overflowing, half, caplog, what):
    scan = segmenter(overflowing, "fp32").prepare([scans.blobs((16, 36, 40))])
    expected = RESULTS[what](segmenter(overflowing, "fp32"), scan)
    assert len(np.unique(expected)) > 1 and np.isfinite(expected).all()
    np.testing.assert_array_equal(RESULTS[what](segmenter(overflowing, "fp16"), scan), expected)
    assert "image: scores overflow in fp16; predicted again in fp32" in caplog.text.replace(
        "preprocessed scan", "image"
    )


@pytest.mark.parametrize("options", [{"windows": "skip-empty"}, {"windows": "huang"}, {"tta": "mirror"}])
def test_an_overflow_is_noticed_whatever_the_windows_make_of_it(overflowing, half, options):
    """A window of NaN alone looks empty to a rule that leaves out empty windows."""
    scan = segmenter(overflowing, "fp32").prepare([scans.blobs((16, 36, 40))])
    expected = segmenter(overflowing, "fp32", **options).segment(scan)[0]
    np.testing.assert_array_equal(segmenter(overflowing, "fp16", **options).segment(scan)[0], expected)


def test_an_overflow_in_a_later_slab_takes_nothing_over_from_the_slabs_before(tmp_path, half, monkeypatch):
    folder = models.write_model(tmp_path / "model", folds=(0, 1))
    scan = segmenter(folder, "fp32").prepare([scans.blobs((30, 36, 40))])
    expected = segmenter(folder, "fp32").predict_members(scan.prepared.data)
    real, calls = TorchRuntime.__call__, []

    def call(runtime, window):
        scores = real(runtime, window)
        calls.append(runtime._precision)
        return scores if calls.count("fp16") < 9 or runtime._precision == "fp32" else scores / 0

    monkeypatch.setattr(TorchRuntime, "__call__", call)
    found = segmenter(folder, "fp16").predict_members(scan.prepared.data)
    assert calls.count("fp16") == 9 and calls.count("fp32") > 9
    np.testing.assert_array_equal(found.mean_softmax, expected.mean_softmax)


def test_half_precision_that_does_not_overflow_stays(tmp_path, half, caplog):
    folder = models.write_model(tmp_path / "model")
    predicts = segmenter(folder, "fp16")
    scan = predicts.prepare([scans.blobs((16, 36, 40))])
    exact = segmenter(folder, "fp32").logits(scan.prepared.data)
    scores = predicts.logits(scan.prepared.data)
    assert "overflow" not in caplog.text and not np.array_equal(scores, exact)
    assert np.abs(scores - exact).max() < 0.02 * exact.std()


def test_scores_that_are_infinite_in_single_precision_too_set_the_case_aside(tmp_path, monkeypatch, capsys):
    folder = models.write_model(tmp_path / "model")
    scale_first_convolution(folder, float("inf"))
    with pytest.raises(CaseError, match="even in fp32"):
        broken = segmenter(folder, "bf16")
        broken.segment(broken.prepare([scans.blobs((16, 36, 40))], "patient"))
    write_volume(tmp_path / "images" / "a_0000.nii.gz", scans.blobs((10, 36, 40)))
    words = ["-i", tmp_path / "images", "-o", tmp_path / "out", "-m", folder]
    assert predict.main([str(word) for word in words]) == 1
    assert "a: set aside: the network's scores are infinite or not a number" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_an_overflow_of_bfloat16_is_computed_in_single_precision(tmp_path, monkeypatch, backend):
    """Its range is that of single precision, so that the overflow is put in by hand."""
    pytest.importorskip("openvino")
    from nnunet_flare.inference.openvino_runtime import OpenVinoRuntime

    kind = TorchRuntime if backend == "torch" else OpenVinoRuntime
    folder, opened, real = models.write_model(tmp_path / "model"), {}, kind.__call__
    init = kind.__init__
    monkeypatch.setattr(
        kind, "__init__", lambda self, *a, **k: opened.update({self: k["precision"]}) or init(self, *a, **k)
    )
    predicts = Segmenter.from_model_folder(folder, PredictionSettings(backend=backend, precision="fp32"))
    scan = predicts.prepare([scans.blobs((16, 36, 40))])
    expected = predicts.segment(scan)[0]
    monkeypatch.setattr(
        kind, "__call__", lambda self, w: to_host(real(self, w)) * (np.inf if opened[self] == "bf16" else 1)
    )
    found = Segmenter.from_model_folder(folder, PredictionSettings(backend=backend, precision="bf16")).segment(scan)[0]
    np.testing.assert_array_equal(found, expected)
    assert list(opened.values()) == ["fp32", "bf16", "fp32"]
