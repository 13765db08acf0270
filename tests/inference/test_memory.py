"""Memory: what is estimated, what is refused, and that long scans need no more for their scores."""

from __future__ import annotations

import numpy as np
import pytest
import small_scans as scans
import torch
import trained_models as models

from nnunet_flare.cli import predict
from nnunet_flare.errors import CaseError, InputError
from nnunet_flare.images import write_volume
from nnunet_flare.inference import memory
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.settings import Settings
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


def test_sums_really_cover_one_patch_depth():
    """The largest tensor of scores that is handed on at once is one patch deep, however long the scan."""
    depths = []
    slide(
        torch.zeros(1, 200, 24, 24),
        lambda window: torch.zeros(3, *window.shape[2:]),
        lambda block: depths.append((block.shape[1], block.untyped_storage().nbytes())),
        heads=3,
        patch=(8, 24, 24),
        step_size=0.5,
        device=torch.device("cpu"),
    )
    assert sum(depth for depth, _ in depths) == 200
    assert max(size for _, size in depths) == 3 * 8 * 24 * 24 * 4


def test_a_case_over_the_limit_is_set_aside_with_the_figures(tmp_path, capsys):
    folder = models.write_model(tmp_path / "model")
    write_volume(tmp_path / "images" / "a_0000.nii.gz", scans.blobs((10, 36, 40)))
    words = ["-i", tmp_path / "images", "-o", tmp_path / "out", "-m", folder, "--backend", "torch"]
    assert predict.main([str(w) for w in (*words, "--max-memory", 0.001)]) == 1
    line = capsys.readouterr().err
    assert "--max_memory allows 0.001 GB" in line and "a: set aside" in line
    assert predict.main([str(w) for w in (*words, "--max_memory", 64)]) == 0
    assert predict.main([str(w) for w in (*words, "--max_memory", -1)]) == 2
    assert predict.main([str(w) for w in (*words, "-device", "cpu", "--gpu_memory", 2)]) == 2


def test_skipping_gives_way_to_a_limit_that_only_block_wise_sums_keep(tmp_path, monkeypatch, caplog):
    folder = models.write_model(tmp_path / "model")
    volume = scans.blobs((60, 60, 60))
    monkeypatch.setattr("nnunet_flare.inference.core.process_bytes", lambda: 0)
    settings = Settings(windows="skip-empty", max_memory_gb=0.003, backend="torch", precision="fp32")
    segmenter = Segmenter.from_model_folder(folder, settings)
    labels, _ = segmenter.segment(segmenter.prepare([volume]))
    assert "all windows are visited instead" in caplog.text
    everything = Segmenter.from_model_folder(folder, Settings(backend="torch", precision="fp32"))
    np.testing.assert_array_equal(labels, everything.segment(everything.prepare([volume]))[0])
    tight = Segmenter.from_model_folder(folder, Settings(max_memory_gb=0.0001, backend="torch"))
    with pytest.raises(CaseError, match="needs about"):
        tight.segment(tight.prepare([volume]))


def test_sums_leave_the_network_half_of_the_gpu():
    assert memory.sums_fit_on_gpu(memory.GIGABYTE, 2 * memory.GIGABYTE)
    assert not memory.sums_fit_on_gpu(memory.GIGABYTE + 1, 2 * memory.GIGABYTE)


def test_out_of_gpu_memory_is_tried_again_with_sums_on_the_cpu(tmp_path, monkeypatch, caplog):
    folder = models.write_model(tmp_path / "model")
    segmenter = Segmenter.from_model_folder(folder, Settings(backend="torch", precision="fp32"))
    scan = segmenter.prepare([scans.blobs((10, 36, 40))])
    expected, _ = segmenter.segment(scan)
    devices = []
    real = segmenter._segment

    def full_gpu(*args, device, **kwargs):
        devices.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, device=device, **kwargs)

    monkeypatch.setattr(segmenter, "_segment", full_gpu)
    monkeypatch.setattr(segmenter, "_sums_device", lambda wanted: torch.device("meta"))
    labels, _ = segmenter.segment(scan)
    assert devices == ["meta", "cpu"]
    assert "sums on the CPU" in caplog.text
    np.testing.assert_array_equal(labels, expected)


def test_limits_must_be_positive():
    with pytest.raises(InputError, match="above 0"):
        Settings(max_memory_gb=0)
    with pytest.raises(InputError, match="-device cuda"):
        Settings(gpu_memory_gb=2)
