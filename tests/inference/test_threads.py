"""Predictors that several threads use at once: each thread gets the label map of its own scan, as if it were alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch

from nnunet_flare.inference.held import BENCHMARK, EXACT
from nnunet_flare.inference.predictor import FlarePredictor
from nnunet_flare.inference.runtimes import choose_backend

REPEATS = 8

needs_openvino = pytest.mark.skipif(
    choose_backend("auto", torch.device("cpu")) != "openvino", reason="OpenVINO is not installed (extra: openvino)"
)


def in_two_threads(one, other, repeats):
    """Results of both functions from two threads that start every repetition together."""
    start = threading.Barrier(2)

    def repeated(function):
        results = []
        for _ in range(repeats):
            start.wait(60)
            results.append(function())
        return results

    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(repeated, f) for f in (one, other)]]


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize("options", [{}, {"tta": "mirror"}], ids=["plain", "mirrored"])
def test_two_threads_predict_two_scans_as_one_after_the_other(tmp_path, backend, options):
    folder = models.write_model(tmp_path / "model", folds=(0, 1))
    first, second = scans.blobs((16, 40, 40)), scans.blobs((20, 36, 44))
    second = second.with_array(np.ascontiguousarray(second.array[::-1, :, ::-1]))
    predictor = FlarePredictor.from_model_folder(folder, backend=backend, precision="fp32", **options)
    alone = predictor.predict(first), predictor.predict(second)
    assert all(len(np.unique(labels)) > 1 for labels in alone)
    fresh = FlarePredictor.from_model_folder(folder, backend=backend, precision="fp32", **options)
    together = in_two_threads(lambda: fresh.predict(first), lambda: fresh.predict(second), REPEATS)
    for expected, results in zip(alone, together, strict=True):
        sums = np.bincount(expected.ravel(), minlength=4)
        for labels in results:
            np.testing.assert_array_equal(np.bincount(labels.ravel(), minlength=4), sums)
            np.testing.assert_array_equal(labels, expected)


@needs_openvino
def test_two_threads_get_the_members_of_their_own_scan(tmp_path):
    folder = models.write_model(tmp_path / "model", folds=(0, 1))
    predictor = FlarePredictor.from_model_folder(folder, backend="openvino", precision="fp32")
    data = [predictor.segmenter.prepare([scans.blobs(shape)]).prepared.data for shape in ((16, 40, 40), (12, 44, 36))]
    alone = [predictor.predict_members(one) for one in data]
    together = in_two_threads(*[lambda one=one: predictor.predict_members(one) for one in data], REPEATS)
    for expected, results in zip(alone, together, strict=True):
        for found in results:
            np.testing.assert_array_equal(found.mean_softmax, expected.mean_softmax)
            assert all(map(np.array_equal, found.labels, expected.labels))


def test_networks_are_built_once_for_two_threads_that_come_together(tmp_path, monkeypatch):
    from nnunet_flare.inference.model import Model

    built, network = [], Model.network
    monkeypatch.setattr(Model, "network", lambda model: built.append(1) or network(model))
    folder = models.write_model(tmp_path / "model")
    predictor = FlarePredictor.from_model_folder(folder, backend="torch")
    in_two_threads(predictor.segmenter.load, predictor.segmenter.load, 1)
    assert len(built) == 1


def test_settings_of_the_process_are_what_they_were_after_predictions_that_overlap():
    """The one that came first goes first, so that each restores what it found only if that is nobody else's."""
    settings = {
        BENCHMARK: lambda: torch.backends.cudnn.benchmark,
        EXACT: lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
    }
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        before = {held: read() for held, read in settings.items()}
        for held, read in settings.items():
            one, other = held.hold(), held.hold()
            one.__enter__()
            other.__enter__()
            assert read() != before[held]
            one.__exit__(None, None, None)
            assert read() != before[held]  # someone still needs it
            other.__exit__(None, None, None)
            assert read() == before[held]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
