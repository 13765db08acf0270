"""What happens on a GPU, on a pretended one: the CPU's results, what crosses over, waits and lack of memory."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch
from pretend_gpu import Gpu, gpu

from nnunet_flare.inference import memory, preprocessing, sliding, torch_planes, torch_resampling
from nnunet_flare.inference.arrays import to_host
from nnunet_flare.inference.cascade import CascadeSegmenter, open_any
from nnunet_flare.inference.coarse_to_fine import RoiSegmenter
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.export import labels_on_image_grid
from nnunet_flare.inference.scans import PreparedScan
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.torch_runtime import TorchRuntime
from nnunet_flare.inference.windows import window_starts
from nnunet_flare.rounds.stages.label import _fused
from nnunet_flare.rounds.stages.mapped import MappedLabeller

SHAPE = (12, 40, 44)
TALL = (20, 44, 50)
"""Several slabs on every plan's grid."""
MEMBERS = 2

Work = Callable[[Segmenter, PreparedScan], np.ndarray]

RESULTS: dict[str, Work] = {
    "a label map": lambda segmenter, scan: segmenter.segment(scan)[0],
    "the members' label maps": lambda segmenter, scan: np.stack(segmenter.segment(scan, members=True)[1]),
    "a coarse label map": lambda segmenter, scan: segmenter.network_labels(scan),
    "logits": lambda segmenter, scan: segmenter.logits(scan.prepared.data),
    "a pseudo-label": lambda segmenter, scan: pseudo_label(segmenter, scan.prepared.at(CPU), scan)[0],
    "its members' label maps": lambda segmenter, scan: np.stack(
        segmenter.predict_members(scan.prepared.at(CPU)).labels
    ),
    "the mean of its members": lambda segmenter, scan: to_host(
        segmenter.predict_members(scan.prepared.at(CPU), only=[1, 3]).mean_softmax
    ),
}


def pseudo_label(segmenter: Segmenter, data: np.ndarray, scan: PreparedScan) -> tuple[np.ndarray, np.ndarray]:
    """As a loop labels a case: on the scan's grid, and on the network's."""
    prediction = segmenter.predict_members(data)
    managers = (segmenter.plans_manager, segmenter.configuration_manager, segmenter.label_manager)
    fused = _fused(prediction, labels=segmenter.labels)
    written = labels_on_image_grid(prediction.mean_softmax, scan.prepared.properties, *managers, probabilities=True)
    return written, fused


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mirrored": {"tta": "mirror"},
    "twice": {"tta": "crop-rotate"},
    "empty windows left out": {"windows": "skip-empty"},
    "by the winner's rule": {"windows": "huang"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model") / "model", folds=tuple(range(MEMBERS)), seed=2)


def opened(folder: Path, device: str, **options: Any) -> Segmenter:
    settings = PredictionSettings(device=device, backend="torch", precision="fp32", **options)
    return Segmenter.from_model_folder(folder, settings)


def predicted(folder: Path, device: str, work: Work, scan: Any = None, **options: Any) -> np.ndarray:
    segmenter = opened(folder, device, **options)
    volume = scans.blobs(SHAPE) if scan is None else scan
    return work(segmenter, segmenter.prepare([volume]))


def weights(folder: Path) -> int:
    """Tensors of all members' networks, each of which goes to the GPU once."""
    return sum(len(model.weights) for model in opened(folder, "cpu").models)  # type: ignore[attr-defined]


def assert_equal_but_for_ties(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype and len(np.unique(expected)) > 1
    if np.issubdtype(expected.dtype, np.floating):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    else:
        assert (found != expected).mean() < 1e-3


@pytest.mark.parametrize(
    ("what", "options"),
    [("a label map", options) for options in OPTIONS]
    + [(what, options) for what in RESULTS for options in ("plain", "mirrored") if what != "a label map"],
)
def test_results_are_the_cpus_but_for_ties(model: Path, what: str, options: str) -> None:
    expected = predicted(model, "cpu", RESULTS[what], **OPTIONS[options])
    with gpu():
        found = predicted(model, "cuda", RESULTS[what], **OPTIONS[options])
    assert_equal_but_for_ties(found, expected)


def crossings(folder: Path, shape: tuple[int, int, int] = SHAPE, **options: Any) -> tuple[Counter[str], Counter[str]]:
    """What crosses between the CPU and the GPU for a label map, without the networks' weights; and its bytes."""
    with gpu() as card:
        segmenter = opened(folder, "cuda", **options)
        segmenter.load()
        before, weighed = card.counts.copy(), card.bytes.copy()
        segmenter.segment(segmenter.prepare([scans.blobs(shape)]))
        return card.counts - before, card.bytes - weighed


@pytest.mark.parametrize("options", ["plain", "mirrored", "empty windows left out"])
def test_a_scan_goes_to_the_gpu_once_as_it_is_stored(model: Path, options: str) -> None:
    """Windows are cut out, flipped and shared by the members there; what resamples such scans is there after one."""
    crossings(model, **OPTIONS[options])
    counts, sizes = crossings(model, **OPTIONS[options])
    stored = 2 * int(np.prod(SHAPE))
    assert stored <= sizes["uploads"] < stored + 40_000  # 33 kB are the weights of a window's voxels
    assert counts["uploads"] <= 8


@pytest.mark.parametrize("plan", ["nearest between slices", "splines along all axes", "fewer slices, nearest"])
def test_the_label_map_comes_back_once_and_no_slice_is_waited_for(tmp_path: Path, plan: str) -> None:
    """Once a slab the program looks whether its scores are finite; nothing else of the GPU is waited for."""
    folder = models.write_model(tmp_path / "model", plan=models.plans(**PLANS[plan]), seed=2)
    counts, sizes = crossings(folder, TALL)
    slabs = len(window_starts(opened(folder, "cpu").prepare([scans.blobs(TALL)]).shape, (8, 32, 32), 0.9)[0])
    assert counts["downloads"] == 1 and sizes["downloads"] == int(np.prod(TALL))
    assert slabs < TALL[0] and counts["waits"] == slabs + 1


def test_a_pseudo_label_is_made_there(model: Path) -> None:
    """The scan goes over once for all members; what comes back are label maps, and no scores."""
    segmenter = opened(model, "cpu")
    scan = segmenter.prepare([scans.blobs(SHAPE)])
    written, fused = pseudo_label(segmenter, scan.prepared.data, scan)
    with gpu() as card:
        segmenter = opened(model, "cuda")
        segmenter.load()
        before, weighed = card.counts.copy(), card.bytes.copy()
        found = pseudo_label(segmenter, scan.prepared.data, scan)
        counts, sizes = card.counts - before, card.bytes - weighed
    assert_equal_but_for_ties(found[0], written)
    assert_equal_but_for_ties(found[1], fused)
    assert scan.prepared.data.nbytes <= sizes["uploads"] < scan.prepared.data.nbytes + 80_000
    assert counts["downloads"] == MEMBERS + 2
    assert sizes["downloads"] == (MEMBERS + 1) * fused.size + written.size


BOX = ((4, 17), (8, 40), (10, 45))
TILTED = (0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
STORED_OTHERWISE = {"transpose": (2, 0, 1), "spacing": (2.0, 4.0, 2.0), "reader": "NibabelIOWithReorient"}


def coarse_to_fine(tmp_path: Path, device: str, **plan: Any) -> RoiSegmenter:
    fine, coarse = tmp_path / "fine", tmp_path / "coarse"
    if not fine.is_dir():
        models.write_model(fine, plan=models.plans(**plan), seed=2)
        spacing = tuple(1.5 * step for step in plan.get("spacing", (4.0, 2.0, 2.0)))
        models.write_model(coarse, plan=models.plans(**{**plan, "spacing": spacing}))
    return RoiSegmenter(opened(coarse, device), opened(fine, device))


def cascade(folder: Path, device: str) -> CascadeSegmenter:
    found = open_any(folder, PredictionSettings(device=device, backend="torch", precision="fp32"))
    assert isinstance(found, CascadeSegmenter)
    return found


def voxels_uploaded(card: Gpu) -> list[int]:
    """Sizes of the arrays of int16 that go over from now on, which scans are and nothing else is."""
    sizes: list[int] = []
    real = card.upload

    def upload(tensor: torch.Tensor, dtype: torch.dtype, *, free: bool) -> Any:
        sizes.extend([tensor.numel()] if tensor.dtype == torch.int16 else [])
        return real(tensor, dtype, free=free)

    card.upload = upload  # type: ignore[method-assign]
    return sizes


@pytest.mark.parametrize("plan", [{}, STORED_OTHERWISE], ids=["as stored", "turned"])
def test_a_scan_goes_over_once_for_both_models(tmp_path: Path, plan: dict[str, Any]) -> None:
    """Coarse to fine, the crop is cut out there; however the models turn it."""
    volume = scans.blobs(SHAPE)
    volume = replace(volume, direction=TILTED) if plan else volume
    segmenter = coarse_to_fine(tmp_path, "cpu", **plan)
    with patch.object(RoiSegmenter, "box", lambda *_: BOX):
        expected = segmenter.segment(segmenter.prepare([volume]))[0]
        with gpu() as card:
            sizes = voxels_uploaded(card)
            segmenter = coarse_to_fine(tmp_path, "cuda", **plan)
            scan = segmenter.prepare([volume])
            found = segmenter.segment(scan)[0]
            assert sizes == [int(np.prod(SHAPE))]
            assert scan.there.part() is None, "it is no longer needed"
    assert_equal_but_for_ties(found, expected)


def test_a_scan_goes_over_once_for_both_stages_of_a_cascade(tmp_path: Path) -> None:
    volume, folder = scans.blobs(SHAPE), models.write_cascade(tmp_path)
    segmenter = cascade(folder, "cpu")
    expected = segmenter.segment(segmenter.prepare([volume]))[0]
    with gpu() as card:
        sizes = voxels_uploaded(card)
        segmenter = cascade(folder, "cuda")
        found = segmenter.segment(segmenter.prepare([volume]))[0]
        assert sizes == [int(np.prod(SHAPE))]
    assert_equal_but_for_ties(found, expected)


def test_a_scan_that_would_be_normalised_on_the_cpu_is_not_kept(tmp_path: Path) -> None:
    volume = scans.blobs(SHAPE)
    with gpu() as card, patch.object(RoiSegmenter, "box", lambda *_: BOX):
        sizes = voxels_uploaded(card)
        segmenter = coarse_to_fine(tmp_path, "cuda", normalisation="ZScoreNormalization")
        segmenter.segment(segmenter.prepare([volume]))
        assert sizes == []


def test_a_scan_that_is_kept_is_given_up_where_memory_is_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volume = scans.blobs(SHAPE)
    segmenter = coarse_to_fine(tmp_path, "cpu")
    box = lambda self, scan, told: (self.coarse.network_labels(scan.coarse), BOX)[1]  # noqa: E731
    with patch.object(RoiSegmenter, "box", box):
        expected = segmenter.segment(segmenter.prepare([volume]))[0]
        with gpu() as card:
            segmenter = coarse_to_fine(tmp_path, "cuda")
            segmenter.load()
            scan = segmenter.prepare([volume])
            kept = scan.there.part()
            assert kept is not None and kept[0].numel() == volume.array.size
            del kept
            card.fails_at = {card.allocations + 8}
            found = segmenter.segment(scan)[0]
            assert "out of GPU memory" in caplog.text and scan.there.part() is None
            card.room = card.live + 2 * volume.array.nbytes  # half of it is no room for a scan
            assert segmenter.prepare([volume]).there.part() is None
    assert_equal_but_for_ties(found, expected)


@pytest.mark.parametrize("windows", ["plain", "mirrored"])
def test_a_coarse_label_map_comes_back_once(model: Path, windows: str) -> None:
    with gpu() as card:
        segmenter = opened(model, "cuda", **OPTIONS[windows])
        scan = segmenter.prepare([scans.blobs(SHAPE)])
        labels = segmenter.network_labels(scan)
    assert card.counts["downloads"] == 1 and card.bytes["downloads"] == labels.size


def test_a_models_classes_are_mapped_there(model: Path) -> None:
    """``--init_map``: the softmax of merged classes is added where it lies."""
    ours = SimpleNamespace(num_segmentation_heads=3)
    id_map = SimpleNamespace(ids={1: 2, 2: 2, 3: 1})
    data = opened(model, "cpu").prepare([scans.blobs(SHAPE)]).prepared.data
    expected = MappedLabeller(opened(model, "cpu"), id_map, ours).predict_members(data)  # type: ignore[arg-type]
    with gpu() as card:
        found = MappedLabeller(opened(model, "cuda"), id_map, ours).predict_members(data)  # type: ignore[arg-type]
        assert card.counts["downloads"] == MEMBERS
        np.testing.assert_allclose(to_host(found.mean_softmax), expected.mean_softmax, atol=1e-5)


def test_slices_of_a_2d_network_go_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.write_model(tmp_path / "model", plan=models.plans(spacing=(2.0, 2.0), patch=(32, 32)), folds=(0, 1))
    for options in ({}, {"tta": "mirror"}, {"windows": "skip-empty"}, {"gaussian": False}):
        expected = predicted(folder, "cpu", RESULTS["logits"], **options)
        monkeypatch.setattr(sliding, "BATCH_VOXELS", 8 * 32 * 32)
        seen: list[int] = []
        real = TorchRuntime._scores
        noted = lambda self, window, real=real, seen=seen: (seen.append(window.shape[2]), real(self, window))[1]  # noqa: E731
        monkeypatch.setattr(TorchRuntime, "_scores", noted)
        with gpu():
            found = predicted(folder, "cuda", RESULTS["logits"], **options)
        monkeypatch.undo()
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert set(seen) == ({1} if "windows" in options else {8})


@pytest.mark.parametrize("slices", [3, 8, 9, 20])
def test_every_slice_is_told_of_once_however_many_go_together(tmp_path: Path, slices: int) -> None:
    folder = models.write_model(tmp_path / "model", plan=models.plans(spacing=(2.0, 2.0), patch=(32, 32)))
    volume, told = scans.blobs((slices, 40, 40)), []
    with gpu(), patch.object(sliding, "BATCH_VOXELS", 8 * 32 * 32):
        segmenter = opened(folder, "cuda")
        scan = segmenter.prepare([volume])
        found = segmenter.segment(scan, progress=told.append)[0]
    assert sum(told) == segmenter.windows(scan)
    assert_equal_but_for_ties(found, predicted(folder, "cpu", RESULTS["a label map"], volume))


@pytest.mark.parametrize("patch_size", [(8, 32, 32), (32, 32)])
def test_networks_are_warm_when_they_are_loaded(tmp_path: Path, patch_size: tuple[int, ...], monkeypatch) -> None:
    """One window of each, of the size that scans will have, and none at the first scan."""
    monkeypatch.setattr("nnunet_flare.inference.sliding.BATCH_VOXELS", 8 * 32 * 32)
    plan = models.plans(patch=patch_size, spacing=(4.0, 2.0, 2.0)[-len(patch_size) :], channels=2)
    folder = models.write_model(tmp_path / "model", plan=plan, channels=2, folds=(0, 1))
    seen: list[tuple[int, ...]] = []
    real = TorchRuntime._scores
    noted = lambda self, window: (seen.append(tuple(window.shape)), real(self, window))[1]  # noqa: E731
    with gpu(), patch.object(TorchRuntime, "_scores", noted):
        segmenter = opened(folder, "cuda", tta="mirror")
        segmenter.load()
        assert len(seen) == 2
        segmenter.load()
        assert len(seen) == 2, "twice the same"
        segmenter.segment(segmenter.prepare([scans.blobs(SHAPE), scans.blobs(SHAPE, seed=1)]))
    assert len(set(seen)) == 1
    with patch.object(TorchRuntime, "_scores", lambda *_: pytest.fail("a CPU has nothing to warm up")):
        opened(folder, "cpu").load()


def test_a_lack_of_memory_while_warming_up_is_none_later(model: Path) -> None:
    expected = predicted(model, "cpu", RESULTS["a label map"])
    with gpu() as card:
        segmenter = opened(model, "cuda")
        segmenter._networks.load()
        card.fails_at = {card.allocations + 5}
        segmenter.load()
        assert card.allocations == max(card.fails_at)
        found = segmenter.segment(segmenter.prepare([scans.blobs(SHAPE)]))[0]
    assert_equal_but_for_ties(found, expected)


PLANS = {
    "nearest between slices": {"spacing": (4.0, 1.2, 1.2)},
    "fewer slices, nearest": {"spacing": (9.0, 2.0, 2.0)},
    "more slices, nearest": {"spacing": (2.5, 0.8, 0.8), "force_separate_z": True},
    "splines along all axes": {"spacing": (3.0, 1.5, 1.5), "force_separate_z": False},
    "fewer slices": {"spacing": (5.0, 1.5, 1.5), "force_separate_z": False},
    "as many slices": {"spacing": (4.0, 1.5, 1.5), "force_separate_z": False},
    "other axis order": {"spacing": (2.0, 1.2, 4.0), "transpose": (2, 1, 0)},
    "not resampled": {"spacing": (4.0, 1.7, 2.3)},
    "stock's other resampling": {"spacing": (4.0, 1.2, 1.2), "resampling": "resample_torch_fornnunet"},
    "z-score": {"normalisation": "ZScoreNormalization", "masked": True},
    "as stored": {"normalisation": "NoNormalization"},
    "orientation of the reader": {"reader": "NibabelIOWithReorient"},
}


@pytest.mark.parametrize(
    ("plan", "kind"),
    [(plan, "int16") for plan in PLANS]
    + [("nearest between slices", kind) for kind in ("uint8", "uint16", "float64", ">i2")],
)
def test_a_scan_is_prepared_there_as_on_the_cpu(tmp_path: Path, plan: str, kind: str) -> None:
    folder = models.write_model(tmp_path / "model", plan=models.plans(**PLANS[plan]))
    volume = scans.blobs(SHAPE, pad=2)
    volume = volume.with_array((abs(volume.array) if kind[0] == "u" else volume.array).astype(kind))
    expected = opened(folder, "cpu").prepare([volume]).prepared
    with gpu():
        found = opened(folder, "cuda").prepare([volume]).prepared
        assert isinstance(found.data, np.ndarray) == ("stock" in plan)
        data = found.at(CPU)
    assert found.properties == expected.properties
    # normalised by a deviation of 140 HU, so that this is below 0.001 HU
    np.testing.assert_allclose(data, expected.data, atol=7e-6 * max(1, abs(expected.data).max()))
    assert expected.data.std() > 0


def test_preparing_waits_for_nothing(model: Path) -> None:
    with gpu() as card:
        segmenter = opened(model, "cuda")
        segmenter.prepare([scans.blobs(SHAPE)])
        assert card.counts["uploads"] > 0 and card.counts["waits"] == 0


def test_several_channels_are_prepared_there(tmp_path: Path) -> None:
    folder = models.write_model(tmp_path / "model", channels=2)
    volumes = [scans.blobs(SHAPE), scans.blobs(SHAPE, seed=1)]
    expected = opened(folder, "cpu").prepare(volumes).prepared.data
    with gpu():
        found = opened(folder, "cuda").prepare(volumes).prepared.at(CPU)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("windows", OPTIONS)
def test_scores_that_overflow_there_are_computed_in_single_precision(
    model: Path, windows: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows do not wait for the GPU, so that it is asked before scores are handed on; NaN alone looks empty."""
    expected = predicted(model, "cpu", RESULTS["a label map"], **OPTIONS[windows])
    real = TorchRuntime._scores

    def overflows(runtime: TorchRuntime, window: torch.Tensor) -> torch.Tensor:
        exact = runtime._precision == "fp32"
        return real(runtime, window) if exact else window.new_full((4, *window.shape[2:]), math.nan)

    settings = PredictionSettings(device="cuda", backend="torch", precision="fp16", **OPTIONS[windows])
    with gpu(), patch.object(TorchRuntime, "_scores", overflows):
        segmenter = Segmenter.from_model_folder(model, settings)
        found = segmenter.segment(segmenter.prepare([scans.blobs(SHAPE)]))[0]
    assert_equal_but_for_ties(found, expected)
    assert "scores overflow in fp16; predicted again in fp32" in caplog.text


# ------------------------------------------------------------------ memory


def test_a_scan_without_room_stays_on_the_cpu_and_goes_over_window_by_window(model: Path) -> None:
    expected = predicted(model, "cpu", RESULTS["a label map"])
    with gpu() as card:
        card.room = 1_200_000  # half of it holds the sums, not the scan beside them
        segmenter = opened(model, "cuda")
        segmenter.load()
        scan = segmenter.prepare([scans.blobs(SHAPE)])
        assert isinstance(scan.prepared.data, np.ndarray)
        before = card.counts["uploads"]
        found = segmenter.segment(scan)[0]
        assert segmenter.windows(scan) <= card.counts["uploads"] - before < 1.3 * segmenter.windows(scan) + 8
    assert_equal_but_for_ties(found, expected)


def test_a_gpu_without_room_for_a_context_sets_no_scan_aside(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan is prepared while the networks are being loaded, so that it may be the first to meet a full GPU."""

    def full(device: Any = None) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")

    with gpu():
        segmenter = opened(model, "cuda")
        monkeypatch.setattr(torch.cuda, "mem_get_info", full)
        assert isinstance(segmenter.prepare([scans.blobs(SHAPE)]).prepared.data, np.ndarray)


def held(image: Sequence[int], grid: Sequence[int], window: Sequence[int], *, heads: int) -> int:
    """Bytes on the card beside networks, by arithmetic: a scan, the next one while it is prepared, sums, label map."""
    stored = np.broadcast_to(np.int16(0), tuple(image))
    need = memory.need(grid, image, window, heads=heads, maps=1, whole_volume=False)
    scan, next_scan = 4 * math.prod(grid), preprocessing.bytes_needed([stored], grid)
    return scan + next_scan + need.sums + need.window + math.prod(image) + 4 * torch_planes.CHUNK_BYTES


def test_a_ct_of_300_slices_and_the_next_one_hold_a_gigabyte_of_the_card() -> None:
    """2.5 x 0.8 x 0.8 mm to 4 x 1.5 x 1.5 mm and 14 classes; prediction.md quotes this."""
    assert held((300, 512, 512), (188, 273, 273), (32, 128, 192), heads=14) == pytest.approx(1.1e9, abs=0.05e9)


@pytest.mark.parametrize("plan", ["nearest between slices", "splines along all axes"])
def test_no_more_is_held_than_the_arithmetic_says(tmp_path: Path, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that holds nothing: what is measured is what lies around it."""
    for module in (preprocessing, torch_planes, torch_resampling):
        monkeypatch.setattr(module, "CHUNK_BYTES", 2**16)
    scores = lambda self, window: window.new_zeros((4, *window.shape[2:]))  # noqa: E731
    monkeypatch.setattr(TorchRuntime, "_scores", scores)
    folder = models.write_model(tmp_path / "model", plan=models.plans(**PLANS[plan]))
    volume = scans.blobs((60, 90, 90))
    with gpu() as card:
        segmenter = opened(folder, "cuda")
        segmenter.load()
        networks = card.live
        scan = segmenter.prepare([volume])
        card.peak = 0
        waits = segmenter.prepare([volume])
        segmenter.segment(scan)
        expected = held(volume.array.shape, waits.shape, segmenter.patch, heads=4)
        assert 0.4 * expected < card.peak - networks <= expected


@pytest.mark.parametrize("what", RESULTS)
def test_out_of_memory_at_any_time_gives_the_same(model: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever array finds no room: the scan, what is made of it on the way, sums, weights, scores, labels."""
    expected = predicted(model, "cpu", RESULTS[what])
    with gpu() as card:
        segmenter = opened(model, "cuda")

        def arrays_made() -> int:
            before = card.allocations
            found = RESULTS[what](segmenter, segmenter.prepare([scans.blobs(SHAPE)]))
            assert_equal_but_for_ties(found, expected)
            return card.allocations - before

        arrays_made()  # networks, and what is kept from scan to scan
        count = arrays_made()
        assert not caplog.text
        for number in (1, 7, count // 3, 2 * count // 3, count):
            caplog.clear()
            card.fails_at = {card.allocations + number}
            arrays_made()
            assert "out of GPU memory" in caplog.text, f"array {number} of {count}"


def test_a_scan_that_was_prepared_there_leaves_when_memory_is_short(model: Path) -> None:
    with gpu() as card:
        segmenter = opened(model, "cuda")
        segmenter.load()
        scan = segmenter.prepare([scans.blobs(SHAPE)])
        held = card.live
        volume = scan.prepared.data.numel() * 4
        card.fails_at = {card.allocations + 20}
        segmenter.segment(scan)
        assert isinstance(scan.prepared.data, np.ndarray)
        assert card.live <= held - volume


def test_a_limit_of_the_card_holds_for_scans_too(model: Path) -> None:
    """Of 0.6 GB, 0.5 are CUDA's: half of the rest is not enough for a scan of 60 MB on its way to the network."""
    with gpu() as card:
        free, tight = opened(model, "cuda"), opened(model, "cuda", gpu_memory_gb=0.6)
        assert free.fitting.device_for(60 * 2**20).type == "cuda"
        assert tight.fitting.device_for(60 * 2**20).type == "cpu"
        assert isinstance(card, Gpu)


@pytest.mark.slow
def test_what_only_a_gpu_confirms_can_be_asked(tmp_path: Path) -> None:
    """The tests marked ``gpu``, which nobody sees fail where there is none."""
    here = Path(__file__).parent
    environment = {**os.environ, "FLARE_GPU_TEST_DEVICE": "cuda", "PYTHONPATH": str(here), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "on_a_pretended_gpu", "-p", "no:cacheprovider", "-m", "gpu"]
    command += [str(here / "test_gpu_prediction.py"), "--basetemp", str(tmp_path / "tests")]
    done = subprocess.run(command, cwd=here.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d+ passed, 1 skipped", done.stdout), done.stdout[-1000:]
