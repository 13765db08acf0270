"""The label map made slice by slice against stock's, which interpolates all scores to the image's grid first."""

from __future__ import annotations

import threading
from typing import Any

import model_folders as models
import numpy as np
import pytest
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter

from nnunet_flare.errors import InputError
from nnunet_flare.inference import export, planes, torch_planes, workers
from nnunet_flare.inference.export import SliceExporter, labels_on_image_grid
from nnunet_flare.inference.grids import linear
from nnunet_flare.inference.planes import HostPlanes

TIE = 1e-4
"""Scores that are closer than this may be rounded either way."""


def scores(classes: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Smooth scores as a network gives them."""
    rng = np.random.default_rng(seed)
    fields = [gaussian_filter(rng.normal(size=shape), 1.5) * 20 for _ in range(classes)]
    return torch.from_numpy(np.stack(fields).astype(np.float32))


def setting(
    image_spacing: tuple[float, ...], shape: tuple[int, ...], /, *, pad: int = 0, labels: Any = None, **plan: Any
):
    """Managers, and the properties of a scan of this spacing and shape with a zero border."""
    manager = PlansManager(models.plans(**plan))
    forward = manager.transpose_forward
    inside = [shape[axis] for axis in forward]
    properties = {
        "spacing": image_spacing,
        "shape_before_cropping": tuple(n + 2 * pad for n in inside),
        "shape_after_cropping_and_before_resampling": tuple(inside),
        "bbox_used_for_cropping": [[pad, pad + n] for n in inside],
    }
    configuration = manager.get_configuration("3d_fullres")
    return properties, manager, configuration, manager.get_label_manager(models.dataset_json(labels=labels))


def stock(logits: torch.Tensor, properties, manager, configuration, label_manager) -> np.ndarray:
    return np.asarray(
        convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.clone(), manager, configuration, label_manager, properties, num_threads_torch=1
        )
    )


CASES = [
    pytest.param((5.0, 0.9, 1.1), (23, 40, 50), {"spacing": (4.0, 1.5, 1.5)}, (29, 24, 37), id="separate-z"),
    pytest.param((5.0, 0.9, 1.1), (23, 40, 50), {"spacing": (2.0, 1.5, 1.5)}, (58, 24, 37), id="separate-z-by-image"),
    pytest.param((1.0, 0.9, 1.1), (60, 40, 50), {"spacing": (4.0, 1.0, 1.0)}, (15, 36, 55), id="separate-z-upsampled"),
    pytest.param((2.0, 0.9, 1.1), (40, 40, 50), {"spacing": (3.0, 1.5, 1.5)}, (27, 24, 37), id="3d"),
    pytest.param((3.0, 0.9, 1.1), (20, 40, 50), {"spacing": (1.5, 1.5, 1.5)}, (40, 24, 37), id="3d-downsampled-z"),
    pytest.param((1.0, 5.0, 1.0), (40, 23, 50), {"spacing": (1.5, 4.0, 1.5)}, (27, 29, 33), id="separate-y"),
    pytest.param((1.0, 1.0, 5.0), (40, 30, 23), {"spacing": (1.5, 1.5, 4.0)}, (27, 20, 29), id="separate-x"),
    pytest.param((4.0, 1.0, 1.0), (20, 40, 50), {"spacing": (4.0, 1.0, 1.0)}, (20, 40, 50), id="same-grid"),
    pytest.param((4.0, 1.0, 1.0), (20, 40, 50), {"spacing": (4.0, 2.0, 2.0)}, (20, 20, 25), id="same-slices"),
    pytest.param((1.1, 0.9, 5.0), (50, 40, 23), {"spacing": (4.0, 1.5, 1.5), "transpose": (2, 1, 0)}, (29, 24, 37),
                 id="transposed"),
]  # fmt: skip


@pytest.mark.parametrize(("spacing", "shape", "plan", "grid"), CASES)
@pytest.mark.parametrize("resampling", ["resample_data_or_seg_to_shape", "resample_torch_fornnunet"])
@pytest.mark.parametrize("labels", [None, models.REGIONS], ids=["softmax", "regions"])
def test_labels_are_stocks_but_for_ties(spacing, shape, plan, grid, resampling, labels):
    managers = setting(spacing, shape, pad=2, labels=labels, resampling=resampling, **plan)
    logits = scores(2 if labels else 4, grid)
    theirs = stock(logits, *managers)
    ours = labels_on_image_grid(logits, *managers)
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    assert len(np.unique(theirs)) > 2
    differing = ours != theirs
    assert differing.mean() < 1e-3
    if labels is None:  # what differs is a tie: stock's label comes when it is favoured by a hair
        for label in np.unique(theirs[differing]):
            favoured = logits.clone()
            favoured[int(label)] += TIE
            favoured_labels = labels_on_image_grid(favoured, *managers)
            np.testing.assert_array_equal(favoured_labels[differing & (theirs == label)], label)
    else:  # or at the threshold of a region
        more, less = (labels_on_image_grid(logits + sign * TIE, *managers) for sign in (1, -1))
        assert (more != less)[differing].all()


def test_ties_go_to_the_lower_label_as_argmax_does():
    managers = setting((4.0, 1.0, 1.0), (10, 16, 16), spacing=(4.0, 2.0, 2.0))
    assert labels_on_image_grid(torch.zeros(4, 10, 8, 8), *managers).max() == 0


@pytest.mark.parametrize("plan", [{"spacing": (4.0, 1.5, 1.5)}, {"spacing": (3.0, 1.5, 1.5)}])
def test_slices_may_come_in_any_portions_whose_memory_is_used_again(plan):
    managers = setting((2.0, 0.9, 1.1), (30, 40, 50), **plan)
    grid = tuple(round(n * s / p) for n, s, p in zip((30, 40, 50), (2.0, 0.9, 1.1), plan["spacing"], strict=True))
    logits = scores(4, grid)
    exporter = SliceExporter(grid, *managers)
    first = 0
    for count in (1, 3, 2, 100):
        portion = logits[:, first : first + count].clone()
        exporter.consume(portion)
        portion.fill_(99)
        first += count
    np.testing.assert_array_equal(exporter.finish(), labels_on_image_grid(logits, *managers))


@pytest.mark.parametrize(("spacing", "shape", "plan", "grid"), CASES)
@pytest.mark.parametrize("labels", [None, models.REGIONS], ids=["softmax", "regions"])
def test_all_slices_may_come_by_rows(spacing, shape, plan, grid, labels):
    managers = setting(spacing, shape, pad=3, labels=labels, **plan)
    logits = scores(2 if labels else 4, grid).numpy()
    exporter = SliceExporter(grid, *managers)
    first = 0
    for last in (1, 2, 9, 16, grid[1]):
        portion = logits[:, :, first:last].copy()
        exporter.consume(portion, slice(first, last))
        portion.fill(99)
        first = last - 1
        if last < grid[1]:
            with pytest.raises(ValueError, match=f"0 of {grid[0]}"):
                exporter.finish()
    expected = labels_on_image_grid(logits, *managers)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(exporter.finish(), expected)


@pytest.mark.parametrize(
    "plan", [{"spacing": (4.0, 1.5, 1.5)}, {"spacing": (3.0, 1.5, 1.5)}], ids=["nearest", "linear"]
)
def test_threads_that_share_the_slices_make_no_difference(plan, monkeypatch):
    monkeypatch.setattr(workers, "WORTH_A_THREAD", 1)
    managers = setting((2.0, 0.9, 1.1), (30, 40, 50), **plan)
    grid = tuple(round(n * s / p) for n, s, p in zip((30, 40, 50), (2.0, 0.9, 1.1), plan["spacing"], strict=True))
    logits, used = scores(4, grid), set()
    labels = HostPlanes.labels
    noted = lambda self, plane: (used.add(threading.get_ident()), labels(self, plane))[1]  # noqa: E731
    monkeypatch.setattr(HostPlanes, "labels", noted)

    def exported(threads: int) -> np.ndarray:
        monkeypatch.setattr(workers, "thread_count", lambda: threads)
        used.clear()
        exporter = SliceExporter(grid, *managers)
        for first in range(0, grid[0], 6):
            exporter.consume(logits[:, first : first + 6].clone())
        return exporter.finish()

    alone = exported(1)
    assert used == {threading.get_ident()} and len(np.unique(alone)) > 1
    np.testing.assert_array_equal(exported(3), alone)
    assert threading.get_ident() not in used and used


def test_missing_slices_are_noticed():
    managers = setting((4.0, 1.0, 1.0), (10, 16, 16), spacing=(4.0, 2.0, 2.0))
    exporter = SliceExporter((10, 8, 8), *managers)
    exporter.consume(torch.zeros(4, 9, 8, 8))
    with pytest.raises(ValueError, match="9 of 10"):
        exporter.finish()


def test_probabilities_of_softmax_models_interpolated_and_thresholded_for_regions():
    managers = setting((4.0, 1.0, 1.0), (10, 32, 32), labels=models.REGIONS, spacing=(4.0, 2.0, 2.0))
    logits = scores(2, (10, 16, 16))
    labels = labels_on_image_grid(torch.sigmoid(logits), *managers, probabilities=True)
    grown = torch.nn.functional.interpolate(torch.sigmoid(logits).transpose(0, 1), (32, 32), mode="bilinear")
    expected = np.where(grown[:, 1] > 0.5, 2, np.where(grown[:, 0] > 0.5, 1, 0))
    np.testing.assert_array_equal(labels, expected)


def test_no_full_resolution_scores_are_made(monkeypatch):
    managers = setting((1.0, 0.5, 0.5), (100, 64, 64), spacing=(5.0, 1.5, 1.5))
    sizes = []
    resized = planes.HostPlanes._resized_part

    def recorded(self: planes.HostPlanes, *words: Any) -> Any:
        place, result = resized(self, *words)
        sizes.append(result.size)
        return place, result

    monkeypatch.setattr(planes.HostPlanes, "_resized_part", recorded)
    labels_on_image_grid(scores(14, (20, 21, 21)), *managers)
    assert 32 * 32 < max(sizes) <= 64 * 64
    assert len(sizes) <= 14 * 20, "slices were interpolated more than once"


@pytest.mark.parametrize("labels", [None, models.REGIONS], ids=["softmax", "regions"])
@pytest.mark.parametrize("slices", [3, 1000])
@pytest.mark.parametrize(("spacing", "shape", "plan", "grid"), CASES)
def test_a_gpu_gives_the_labels_of_the_cpu_but_for_ties(spacing, shape, plan, grid, labels, slices, monkeypatch):
    """Its operations are tried on the CPU in place of a GPU, in batches of some slices and of all."""
    managers = setting(spacing, shape, pad=2, labels=labels, **plan)
    logits = scores(2 if labels else 4, grid)
    expected = labels_on_image_grid(logits.numpy(), *managers)
    monkeypatch.setattr(export, "is_on_gpu", lambda array: True)
    monkeypatch.setattr(torch_planes, "CHUNK_BYTES", slices * 4 * shape[1] * shape[2])
    found = labels_on_image_grid(logits, *managers)
    assert len(np.unique(found)) > 2
    assert (found != expected).mean() < 1e-4


@pytest.mark.parametrize(
    "kwargs",
    [
        {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        {"is_seg": False, "order": 1, "order_z": 1, "force_separate_z": None},
        {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    ],
)
def test_resampling_of_scores_that_is_not_linear_is_refused(kwargs):
    managers = setting((4.0, 1.0, 1.0), (10, 16, 16), spacing=(4.0, 2.0, 2.0))
    managers[2].configuration["resampling_fn_probabilities_kwargs"] = kwargs
    with pytest.raises(InputError, match="nnUNetv2_predict"):
        labels_on_image_grid(torch.zeros(4, 10, 8, 8), *managers)


def test_a_class_that_wins_by_a_hair_at_one_point_is_not_skipped():
    managers = setting((4.0, 1.0, 1.0), (10, 16, 16), spacing=(4.0, 2.0, 2.0))
    logits = torch.zeros(4, 10, 8, 8)
    logits[2, 5, 3, 3] = 1e-6
    labels = labels_on_image_grid(logits, *managers)
    assert set(np.unique(labels[5])) == {0, 2}
    assert set(np.unique(np.delete(labels, 5, 0))) == {0}


@pytest.mark.parametrize("spacing", [(1.3, 0.9, 0.7), (1.3, 3.1, 2.9)], ids=["finer image", "coarser image"])
@pytest.mark.parametrize("shift", [0.4, 5.0])
def test_organs_in_small_parts_of_the_grid_get_the_labels_of_whole_planes(spacing, shift):
    """Each class is interpolated around where it is above the background alone; corners and single points count."""
    grid = (7, 20, 24)
    shape = tuple(round(n * 2.0 / mm) for n, mm in zip(grid, spacing, strict=True))
    managers = setting(spacing, shape, spacing=(2.0, 2.0, 2.0), force_separate_z=False)
    logits = scores(4, grid, seed=3).numpy()
    organs = np.zeros(grid, bool)
    organs[:2, :3, :4] = organs[3:5, 9:12, 7:15] = organs[6, 19, 23] = organs[2, 5, 20] = True
    logits[0] = np.where(organs, logits[1:].max(0) - shift, 60)
    labels = labels_on_image_grid(torch.from_numpy(logits), *managers)
    whole = logits
    for axis, (size, new_size) in enumerate(zip(grid, shape, strict=True), start=1):
        low, high, weight = linear(size, new_size)
        share = weight.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
        whole = whole.take(low, axis) * (1 - share) + whole.take(high, axis) * share
    order = np.sort(whole, axis=0)
    is_tie = order[-1] - order[-2] < TIE
    assert (labels == whole.argmax(0))[~is_tie].all() and is_tie.mean() < 0.5
    assert len(np.unique(labels)) > 2
