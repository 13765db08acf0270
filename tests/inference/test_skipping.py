"""Window skipping on real organs: the network is perfect (its input is the label map), so losses are the rule's."""

from __future__ import annotations

import model_folders as models
import numpy as np
import pytest
import small_scans as scans

from nnunet_flare.errors import InputError
from nnunet_flare.images import read_labels
from nnunet_flare.inference.core import Segmenter
from nnunet_flare.inference.devices import CPU
from nnunet_flare.inference.settings import PredictionSettings
from nnunet_flare.inference.skipping import Huang, slide_growing
from nnunet_flare.inference.windows import slide

CLASSES = 14
BODY = 50


def perfect(window: np.ndarray) -> np.ndarray:
    """Scores that say what is in the window: label ids, ``BODY`` is background."""
    labels = window[0, 0].astype(int)
    labels[labels == BODY] = 0
    return np.moveaxis(np.eye(CLASSES, dtype=np.float32)[labels], -1, 0)


def run(labels: np.ndarray, patch, *, body: np.ndarray | None = None, step: float = 0.5, body_above=None):
    """Label map and number of windows of ``all`` and ``skip-empty``."""
    data = labels.astype(np.float32)
    if body is not None:
        data[(labels == 0) & body] = BODY
    results = []
    for growing in (False, True):
        blocks: list[np.ndarray] = []
        common = {"heads": CLASSES, "patch": patch, "step_size": step, "device": CPU}
        consume = lambda block, blocks=blocks: blocks.append(block.argmax(0))  # noqa: E731
        if growing:
            windows = slide_growing(
                data[None], perfect, consume, foreground=lambda s: s.argmax(0) > 0,
                body_above=body_above, **common,
            )  # fmt: skip
        else:
            windows = slide(data[None], perfect, consume, **common)
        results.append((np.concatenate(blocks), windows))
    return results


def dice(one: np.ndarray, other: np.ndarray) -> float:
    foreground = (one > 0).sum() + (other > 0).sum()
    return 2 * ((one == other) & (one > 0)).sum() / foreground if foreground else 1.0


def resampled(labels: np.ndarray, spacing, target) -> np.ndarray:
    from scipy.ndimage import zoom

    return zoom(labels, np.asarray(spacing) / np.asarray(target), order=0, grid_mode=True, mode="nearest")


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("ts_torso3mm", (32, 48, 64)),
        ("ts_torso3mm", (16, 24, 24)),
        ("ts_slab512", (8, 64, 64)),
        ("chaos3", (16, 64, 96)),
    ],
)
def test_nothing_is_lost_on_real_organs(real_data, name, patch):
    file = real_data / f"{name}_{'liver_gt' if name == 'chaos3' else 'flare13'}.nii.gz"
    volume = read_labels(file)
    labels = resampled(volume.array, volume.spacing_mm, (4.0, 2.5, 2.5))
    (everything, all_windows), (skipping, windows) = run(labels, patch)
    assert dice(everything, skipping) >= 0.999
    assert windows <= all_windows


def lost_on_phantoms(seeds) -> list[float]:
    from nnunet_flare.phantom import make_phantom

    scores = []
    for seed in seeds:
        volume, labels = make_phantom(seed, domain=("narrow", "wide", "between")[seed % 3], size=(48, 96, 96))
        labels = resampled(labels, volume.spacing_mm, (4.0, 4.0, 4.0))
        (everything, _), (skipping, _) = run(labels, (16, 32, 32))
        scores.append(dice(everything, skipping))
    return scores


def test_nothing_is_lost_on_phantoms():
    assert min(lost_on_phantoms(range(3))) >= 0.999


@pytest.mark.slow
def test_nothing_is_lost_on_twenty_phantoms():
    assert min(lost_on_phantoms(range(20))) >= 0.999


def test_windows_are_saved_where_organs_fill_a_part_of_the_scan():
    labels = np.zeros((64, 160, 160), np.uint8)
    labels[20:40, 60:100, 60:100] = 1
    (everything, all_windows), (skipping, windows) = run(labels, (16, 48, 48))
    np.testing.assert_array_equal(everything, skipping)
    assert windows < all_windows / 2


def test_organs_after_a_gap_and_in_the_last_slab_are_found():
    labels = np.zeros((96, 120, 120), np.uint8)
    labels[4:10, 50:70, 50:70] = 1
    labels[50:60, 40:80, 40:80] = 2
    labels[90:96, 50:64, 50:64] = 3
    (everything, _), (skipping, _) = run(labels, (16, 40, 40), step=0.9)
    np.testing.assert_array_equal(everything, skipping)
    assert set(np.unique(skipping)) == {0, 1, 2, 3}


def test_organs_that_begin_beside_the_middle_are_followed_in_every_direction():
    labels = np.zeros((64, 160, 160), np.uint8)
    for z in range(64):  # a slanted tube from one corner to the other
        labels[z, 2 * z + 4 : 2 * z + 24, 2 * z + 4 : 2 * z + 24] = 5
    (everything, _), (skipping, _) = run(labels, (16, 40, 40))
    np.testing.assert_array_equal(everything, skipping)


def test_windows_without_body_are_not_visited():
    labels = np.zeros((16, 160, 160), np.uint8)
    labels[:, 60:100, 60:100] = 1
    body = np.zeros(labels.shape, bool)
    body[:, 40:120, 40:120] = True
    (_, all_windows), (skipping, windows) = run(labels, (16, 40, 40), body=body, body_above=0.5)
    np.testing.assert_array_equal(skipping, labels)
    assert windows < all_windows


def test_a_scan_without_foreground_costs_one_window_a_slab():
    (_, all_windows), (skipping, windows) = run(np.zeros((48, 120, 120), np.uint8), (16, 40, 40), step=1.0)
    assert skipping.max() == 0
    assert windows == 3 < all_windows


def huang(labels: np.ndarray, patch) -> tuple[np.ndarray, list[tuple[int, int]]]:
    blocks: list[np.ndarray] = []
    data = labels.astype(np.float32)[None]
    shape = [max(n, p) for n, p in zip(labels.shape, patch, strict=True)]
    visit = Huang(shape, patch)
    windows = slide(data, perfect, lambda b: blocks.append(b.argmax(0)), heads=CLASSES, patch=patch,
                    step_size=0.9, device=CPU, visit=visit)  # fmt: skip
    return np.concatenate(blocks), windows


def test_huang_skips_the_slab_after_an_empty_one_and_sees_a_band_of_two_patches():
    labels = np.zeros((32, 100, 100), np.uint8)
    labels[8:, 30:70, 30:70] = 1
    patch = (8, 40, 40)  # slabs at 0, 4, 8, ...: the first is empty, hence the second is skipped
    found, windows = huang(labels, patch)
    assert windows == 1 + 5 * 9
    np.testing.assert_array_equal(found[8:], labels[8:])
    labels[8:, 2:8, 2:8] = 2
    assert 2 not in huang(labels, patch)[0], "outside the central band of two patches nothing is predicted"


def test_huang_needs_no_windows_at_the_sides_of_tubes():
    labels = np.zeros((8, 100, 100), np.uint8)
    labels[:, 40:58, 40:58] = 5
    found, windows = huang(labels, (8, 40, 40))
    assert windows == 1
    np.testing.assert_array_equal(found, labels)
    labels[:, 25:58, 40:58] = 6  # reaches the window's first row: the one in front is wanted too
    assert huang(labels, (8, 40, 40))[1] == 2


@pytest.mark.parametrize("shape", [(4, 30, 30), (9, 40, 41), (8, 81, 60)])
def test_huang_is_safe_on_small_volumes(shape):
    labels = np.zeros(shape, np.uint8)
    labels[1:, 8:25, 5:25] = 3
    found, windows = huang(labels, (8, 40, 40))
    assert found.shape == shape and windows >= 1


def test_policies_run_with_a_model_and_impossible_ones_are_refused(tmp_path):
    folder = models.write_model(tmp_path / "model")
    volume = scans.blobs((20, 80, 80))
    results = {}
    for policy in ("all", "skip-empty", "huang"):
        segmenter = Segmenter.from_model_folder(
            folder, PredictionSettings(windows=policy, backend="torch", precision="fp32")
        )
        results[policy] = segmenter.segment(segmenter.prepare([volume]))[0]
        assert results[policy].shape == volume.array.shape
    assert (results["all"] == results["skip-empty"]).mean() > 0.5
    with pytest.raises(InputError, match="expected one of all"):
        PredictionSettings(windows="some")
    regions = models.write_model(tmp_path / "regions", labels=models.REGIONS)
    with pytest.raises(InputError, match="exclusive labels"):
        Segmenter.from_model_folder(regions, PredictionSettings(windows="huang"))
