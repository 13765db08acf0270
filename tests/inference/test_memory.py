"""Memory: what is estimated, what is refused, and that long scans need no more for their scores."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
import torch
from pretend_gpu import gpu

from nnunet_flare.cli import predict
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import write_volume
from nnunet_flare.inference import memory, torch_memory, torch_runtime
from nnunet_flare.inference.arrays import HOST
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.torch_runtime import TorchRuntime
from nnunet_flare.inference.windows import slide

PATCH = (40, 224, 192)


def test_a_long_scan_of_14_classes_stays_under_8_gb():
    wanted = memory.need((250, 341, 341), (1000, 512, 512), PATCH, heads=14, maps=1, whole_volume=False)
    image = 1000 * 512 * 512
    scan_and_network_input = 2 * image + 4 * 250 * 341 * 341
    assert wanted.total + 2 * scan_and_network_input < 8 * memory.GIGABYTE


def test_scores_need_the_same_for_any_number_of_slices():
    short, long = (
        memory.need((n, 341, 341), (n, 512, 512), PATCH, heads=14, maps=1, whole_volume=False) for n in (100, 400)
    )
    assert short.sums == long.sums
    assert long.labels - short.labels < 2 * 300 * 2**20


def whole(array: np.ndarray) -> np.ndarray:
    """The array that a view looks at."""
    return array if array.base is None else whole(array.base)


def test_sums_really_cover_one_patch_depth():
    """The largest array of scores that is handed on at once is one patch deep, however long the scan."""
    depths = []
    slide(
        np.zeros((1, 200, 24, 24), np.float32),
        lambda window: np.zeros((3, *window.shape[2:]), np.float32),
        lambda block: depths.append((block.shape[1], whole(block).nbytes)),
        heads=3,
        patch=(8, 24, 24),
        step_size=0.5,
        device=torch.device("cpu"),
    )
    assert sum(depth for depth, _ in depths) == 200
    assert max(size for _, size in depths) == 3 * 8 * 24 * 24 * 4


MADE = {
    "by rows of windows": ((8, 40, 40), {}),
    "by rows, thinner than a window": ((5, 40, 30), {}),
    "one row of windows": ((8, 20, 40), {}),
    "slab by slab": ((20, 40, 40), {}),
    "by the winner's rule": ((8, 40, 40), {"windows": "huang"}),
    "near foreground": ((5, 40, 30), {"windows": "skip-empty"}),
    "near foreground, padded": ((20, 20, 40), {"windows": "skip-empty"}),
}


@pytest.mark.parametrize("what", MADE)
def test_the_estimate_of_the_sums_is_what_is_really_made(tmp_path, monkeypatch, what):
    shape, options = MADE[what]
    folder = models.write_model(tmp_path / "model", plan=models.plans(spacing=(4.0, 2.0, 2.0), patch=(8, 32, 32)))
    settings = PredictionSettings(backend="torch", precision="fp32", max_memory_gb=64, **options)
    segmenter, needs, made, zeros = Segmenter.from_model_folder(folder, settings), [], [], HOST.zeros
    scan = segmenter.prepare([scans.blobs(shape, spacing=(4.0, 2.0, 2.0))])
    assert scan.shape == shape
    noted = lambda case, limit, policies, wanted: (needs.append(wanted(policies[0])), policies[0])[1]  # noqa: E731
    monkeypatch.setattr("nnunet_flare.inference.fitting.affordable", noted)
    monkeypatch.setattr(type(HOST), "zeros", lambda self, shape: (made.append(tuple(shape)), zeros(shape))[1])
    segmenter.segment(scan)
    sums = max(made, key=len)
    total = max(4 * int(np.prod(one)) for one in made if len(one) == 3)
    assert sum(len(one) == 4 for one in made) == 1
    assert 4 * int(np.prod(sums)) + total <= needs[0].sums <= 1.02 * (4 * int(np.prod(sums)) + total)


WIDE = (32, 64)
"""Features of a network whose intermediate results are most of what its windows take."""


def limited(folder, **options) -> Segmenter:
    settings = PredictionSettings(max_memory_gb=64, **{"backend": "torch", "precision": "fp32", **options})
    return Segmenter.from_model_folder(folder, settings)


def needed(segmenter: Segmenter, scan, monkeypatch) -> memory.Need:
    """What is compared with the limit when a scan is predicted, and the scan predicted."""
    needs = []
    noted = lambda case, limit, policies, wanted: (needs.append(wanted(policies[0])), policies[0])[1]  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr("nnunet_flare.inference.fitting.affordable", noted)
        segmenter.segment(scan)
    return needs[0]


def test_intermediate_results_of_the_network_are_counted(tmp_path, monkeypatch):
    """By hand, at the decoder's last convolution: what it joins and makes, and both again in oneDNN's order."""
    folder = models.write_model(tmp_path / "model", plan=models.plans(patch=(16, 64, 64), features=WIDE))
    segmenter = limited(folder)
    scan = segmenter.prepare([scans.blobs((16, 64, 64), spacing=(4.0, 2.0, 2.0))])
    voxels, joined, made, skipped, lower = 16 * 64 * 64, 64, 32, 32, 64 / 4
    by_hand = 4 * voxels * (2 * (joined + made) + skipped + lower)
    window = needed(segmenter, scan, monkeypatch).window - torch_memory.FIRST_USE
    assert by_hand <= window <= 1.2 * by_hand
    again = needed(segmenter, scan, monkeypatch).window  # the libraries are there now
    assert again == window
    monkeypatch.setattr(torch_runtime, "computes_bf16", lambda device: True)  # counted only, which is never slow
    half = limited(folder, precision="bf16")
    half.load()
    (runtime,) = half._forwards
    counted = runtime.window_bytes((1, 1, 16, 64, 64)).passing - torch_memory.FIRST_USE
    assert 0.5 * by_hand <= counted < 0.9 * by_hand


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_openvino_keeps_for_windows_is_what_was_counted(tmp_path, monkeypatch, precision):
    """Once: the second scan's windows lie where the first one's did."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed (extra: openvino)")
    folder = models.write_model(tmp_path / "model", plan=models.plans(patch=(32, 96, 96), features=WIDE))
    segmenter = limited(folder, backend="openvino", precision=precision)
    segmenter.load()
    (runtime,) = segmenter._forwards
    window = np.zeros((1, 1, 32, 96, 96), np.float32)
    counted = runtime.window_bytes(window.shape)
    before = memory.process_bytes()
    runtime(window)
    took = memory.process_bytes() - before
    assert took <= counted.kept <= 1.5 * took
    assert runtime.window_bytes(window.shape).kept == 0
    runtime.release()
    assert runtime.window_bytes(window.shape).kept == counted.kept


COPIES = {
    "one network": ((0,), {}, {}, 0),
    "folds": ((0, 1), {}, {}, 2),
    "members apart": ((0, 1), {}, {"members": True}, 4),
    "turned windows": ((0,), {"tta": "crop-rotate"}, {}, 3),
}


@pytest.mark.parametrize("what", COPIES)
def test_scores_that_are_added_up_are_counted_beside_the_network(tmp_path, monkeypatch, what):
    folds, options, words, copies = COPIES[what]
    segmenter = limited(models.write_model(tmp_path / "model", folds=folds), **options)
    segmenter.load()
    passing = max(
        one.window_bytes((1, 1, *segmenter.patch)).passing for one in segmenter._networks._runtimes["cpu", "fp32"]
    )
    voxels = int(np.prod(segmenter.patch))
    turned = 4 * voxels if "tta" in options else 0
    apart = "members" in words
    found = segmenter.fitting.window_bytes(apart=apart)
    assert found == passing + turned + copies * 4 * 4 * voxels


def test_a_network_that_cannot_be_counted_is_said(tmp_path, monkeypatch, caplog):
    def depends_on_values(self, x):
        return x if float(x.sum()) > 0 else -x

    segmenter = limited(models.write_model(tmp_path / "model"))
    segmenter.load()
    monkeypatch.setattr(torch.nn.LeakyReLU, "forward", depends_on_values)
    scan = segmenter.prepare([scans.blobs((10, 36, 40))])
    assert needed(segmenter, scan, monkeypatch).window == 4 * 4 * 4 * int(np.prod(segmenter.patch))
    assert "its steps cannot be counted" in caplog.text and "--max_memory counts scores alone" in caplog.text


def looking_twice(folder, device):
    settings = PredictionSettings(backend="torch", precision="fp32", tta="crop-rotate", device=device)
    return Segmenter.from_model_folder(folder, settings)


@pytest.fixture
def twice_model(tmp_path, monkeypatch):
    """A network that takes nothing: what is measured lies around it. What is kept of the crop is most of that."""
    nothing = lambda self, window: window.new_zeros((4, *window.shape[2:]))  # noqa: E731
    monkeypatch.setattr(TorchRuntime, "_scores", nothing)
    plan = models.plans(spacing=(4.0, 2.0, 2.0), patch=(8, 32, 32))
    return models.write_model(tmp_path / "model", plan=plan)


TWICE = scans.blobs((48, 60, 60), spacing=(4.0, 2.0, 2.0))


def test_the_scores_of_the_middle_are_kept_once(twice_model):
    segmenter = looking_twice(twice_model, "cpu")
    scan = segmenter.prepare([TWICE])
    segmenter.segment(scan)
    wanted = segmenter.fitting.need(scan.shape, scan.shape, segmenter.heads, 1, "all")
    tracemalloc.start()
    segmenter.segment(scan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert wanted.kept > 0.5 * wanted.total
    assert wanted.scores < peak < wanted.total


def test_the_scores_of_the_middle_need_room_beside_the_sums(twice_model, caplog):
    """Where the sums alone would fit, nothing is begun on the GPU that cannot be finished there."""
    with gpu() as card:
        segmenter = looking_twice(twice_model, "cuda")
        segmenter.load()
        scan = segmenter.prepare([TWICE])
        scan.prepared.at(CPU)
        wanted = segmenter.fitting.need(scan.shape, scan.shape, segmenter.heads, 1, "all")
        card.room = card.live + int(2.5 * wanted.sums)
        assert wanted.kept > 2.5 * wanted.sums
        segmenter.segment(scan)
    assert "out of GPU memory" not in caplog.text


def test_a_case_over_the_limit_is_set_aside_with_the_figures(tmp_path, capsys):
    folder = models.write_model(tmp_path / "model")
    write_volume(tmp_path / "images" / "a_0000.nii.gz", scans.blobs((10, 36, 40)))
    words = ["-i", tmp_path / "images", "-o", tmp_path / "out", "-m", folder, "--backend", "torch"]
    assert predict.main([str(w) for w in (*words, "--max-memory", 0.001)]) == 1
    line = capsys.readouterr().err
    assert "--max_memory allows 0.001 GB" in line and "a: set aside" in line
    assert predict.main([str(w) for w in (*words, "--max_memory", 64)]) == 0
    with pytest.raises(SystemExit, match="2"):
        predict.main([str(w) for w in (*words, "--max_memory", -1)])
    for flag in ("--gpu_memory", "--gpu-memory", "--gpu-memory-gb"):
        assert predict.main([str(w) for w in (*words, "-device", "cpu", flag, 2)]) == 2


def test_skipping_gives_way_to_a_limit_that_only_block_wise_sums_keep(tmp_path, monkeypatch, caplog):
    folder = models.write_model(tmp_path / "model")
    volume = scans.blobs((60, 60, 60))
    monkeypatch.setattr(memory, "process_bytes", lambda: 0)
    monkeypatch.setattr(torch_memory, "FIRST_USE", 0)
    generous = limited(folder)
    shapes = (generous.prepare([volume]).shape, volume.array.shape, generous.heads, 1)
    generous.load()
    blocks, whole = (generous.fitting.need(*shapes, policy).scores for policy in ("all", "skip-empty"))
    rest = 2 * volume.array.size + generous.fitting.window_bytes(apart=False)
    assert whole > 2 * blocks
    limit = (rest + (blocks + whole) / 2) / memory.GIGABYTE
    settings = PredictionSettings(windows="skip-empty", max_memory_gb=limit, backend="torch", precision="fp32")
    segmenter = Segmenter.from_model_folder(folder, settings)
    labels, _ = segmenter.segment(segmenter.prepare([volume]))
    assert "all windows are predicted instead" in caplog.text
    everything = Segmenter.from_model_folder(folder, PredictionSettings(backend="torch", precision="fp32"))
    np.testing.assert_array_equal(labels, everything.segment(everything.prepare([volume]))[0])
    tight = Segmenter.from_model_folder(folder, PredictionSettings(max_memory_gb=0.0001, backend="torch"))
    with pytest.raises(CaseError, match="needs about"):
        tight.segment(tight.prepare([volume]))


def test_sums_leave_the_network_half_of_the_gpu():
    assert memory.sums_fit_on_gpu(memory.GIGABYTE, 2 * memory.GIGABYTE)
    assert not memory.sums_fit_on_gpu(memory.GIGABYTE + 1, 2 * memory.GIGABYTE)


RESULTS = {
    "a label map": lambda segmenter, scan: segmenter.segment(scan)[0],
    "a label map and the members'": lambda segmenter, scan: np.stack(segmenter.segment(scan, members=True)[1]),
    "a coarse label map": lambda segmenter, scan: segmenter.network_labels(scan),
    "logits": lambda segmenter, scan: segmenter.logits(scan.prepared.data),
    "members for pseudo-labels": lambda segmenter, scan: segmenter.predict_members(scan.prepared.data).mean_softmax,
}


@pytest.mark.parametrize("what", RESULTS)
@pytest.mark.parametrize("windows", [0, 3])
def test_out_of_gpu_memory_is_tried_again_with_sums_on_the_cpu(tmp_path, monkeypatch, caplog, what, windows):
    """Also in the middle of a scan, when a part of it was handed on already: nothing is counted twice."""
    folder = models.write_model(tmp_path / "model", folds=(0, 1))
    on_cpu = Segmenter.from_model_folder(folder, PredictionSettings(backend="torch", precision="fp32"))
    scan = on_cpu.prepare([scans.blobs((24, 36, 40))])
    assert on_cpu.windows(scan) > 4
    expected = RESULTS[what](on_cpu, scan)
    scores, calls, went = TorchRuntime._scores, 0, []

    def full_once(runtime: TorchRuntime, window: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == windows + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return scores(runtime, window)

    with gpu():
        segmenter = Segmenter.from_model_folder(
            folder, PredictionSettings(backend="torch", precision="fp32", device="cuda")
        )
        run = segmenter._slider.run
        noted = lambda *a, device, **more: (went.append(device.type), run(*a, device=device, **more))[1]  # noqa: E731
        monkeypatch.setattr(segmenter._slider, "run", noted)
        monkeypatch.setattr(TorchRuntime, "_scores", full_once)
        found = RESULTS[what](segmenter, scan)
    if np.issubdtype(expected.dtype, np.floating):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, expected)
    assert went[:2] == ["cuda", "cpu"]
    assert "out of GPU memory; predicted again with the sums on the CPU" in caplog.text


def test_a_case_that_needs_too_much_memory_on_the_cpu_too_is_set_aside(tmp_path, monkeypatch, capsys):
    folder = models.write_model(tmp_path / "model")
    for name in "ab":
        write_volume(tmp_path / "images" / f"{name}_0000.nii.gz", scans.blobs((10, 36, 40)))
    real, calls = Segmenter.segment, []

    def segment(self, scan, **more):
        calls.append(scan.name)
        if scan.name == "a":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, scan, **more)

    monkeypatch.setattr(Segmenter, "segment", segment)
    words = ["-i", tmp_path / "images", "-o", tmp_path / "out", "-m", folder, "--backend", "torch"]
    assert predict.main([str(word) for word in words]) == 1
    assert "a: set aside: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.nii.gz"]


def test_limits_must_be_positive():
    with pytest.raises(InputError, match="above 0"):
        PredictionSettings(max_memory_gb=0)
    with pytest.raises(InputError, match="-device cuda"):
        PredictionSettings(gpu_memory_gb=2)
