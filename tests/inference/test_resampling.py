"""Image preprocessing against stock nnU-Net's, on real CT and on every kind of plan."""

from __future__ import annotations

import model_folders as models
import numpy as np
import pytest
import small_scans as scans
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, determine_do_sep_z_and_axis
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import zoom
from threadpoolctl import threadpool_info, threadpool_limits

from nnunet_flare.inference import grids, windows, workers
from nnunet_flare.inference.preprocessing import network_shape, nonzero_box, preprocess
from nnunet_flare.inference.resampling import resample_image

HU_TOLERANCE = 0.05
"""Largest difference in one voxel from stock, HU; the mean is far below 0.001."""

HU_MEAN_TOLERANCE = 0.001

SPACINGS = st.tuples(*[st.sampled_from([0.5, 0.8, 1.0, 1.5, 2.5, 3.0, 4.0, 5.0])] * 3)


def compare(volume, *, std: float = 140.0, **plan) -> np.ndarray:
    """Our network input beside stock's, differences in HU."""
    manager = PlansManager(models.plans(**plan))
    configuration = manager.get_configuration("3d_fullres")
    theirs, _, expected = DefaultPreprocessor(verbose=False).run_case_npy(
        volume.array[None], None, {"spacing": volume.spacing_mm}, manager, configuration, models.dataset_json()
    )
    ours = preprocess([volume.array], volume.spacing_mm, manager, configuration)
    assert ours.data.shape == theirs.shape
    assert ours.data.dtype == np.float32
    for key in ("shape_before_cropping", "shape_after_cropping_and_before_resampling"):
        assert tuple(ours.properties[key]) == tuple(expected[key])
    assert np.array_equal(ours.properties["bbox_used_for_cropping"], expected["bbox_used_for_cropping"])
    difference = np.abs(ours.data - theirs) * std
    assert difference.max() <= HU_TOLERANCE
    assert difference.mean() <= HU_MEAN_TOLERANCE
    return ours.data


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param({"spacing": (4.0, 1.2, 1.2)}, id="flare-plan"),
        pytest.param({"spacing": (3.0, 1.5, 1.5)}, id="splines-along-all-axes"),
        pytest.param({"spacing": (1.0, 0.6, 0.6)}, id="finer-than-the-scan"),
        pytest.param({"spacing": (4.0, 1.2, 1.2), "transpose": (2, 1, 0)}, id="transposed"),
        pytest.param({"spacing": (4.0, 1.2, 1.2), "force_separate_z": False}, id="separation-switched-off"),
        pytest.param({"spacing": (2.0, 1.2, 1.2), "force_separate_z": True}, id="separation-forced"),
        pytest.param({"spacing": (4.0, 1.2, 1.2), "resampling": "resample_torch_fornnunet"}, id="torch"),
    ],
)
def test_real_ct_preprocessed_as_stock_does(plan):
    compare(scans.crop(scans.real_ct("chaos3"), (20, 44), (150, 330), (120, 300)), **plan)


@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "RescaleTo01Normalization", "NoNormalization"])
@pytest.mark.parametrize("masked", [False, True])
def test_other_normalisations_are_stocks(scheme, masked):
    std = 1.0 if scheme == "NoNormalization" else 140.0
    compare(scans.blobs(pad=3), normalisation=scheme, masked=masked, std=std)


def test_overshoot_of_splines_is_clipped_slice_by_slice():
    """A bright needle rings under cubic splines; stock clips every slice to its own range."""
    volume = scans.blobs((6, 40, 40), spacing=(5.0, 1.0, 1.0))
    volume.array[:] = 0
    volume.array[2, 20, 20], volume.array[4, 10:30, 10:30] = 3000, 500
    data = compare(volume, spacing=(5.0, 1.7, 1.7), normalisation="NoNormalization", std=1.0)
    assert data.min() >= 0


def test_slices_that_are_not_wanted_are_not_normalised():
    image = scans.blobs((40, 20, 20)).array
    seen: list[int] = []
    manager = PlansManager(models.plans())

    def normalise(array: np.ndarray) -> np.ndarray:
        seen.append(len(array))
        return array.astype(np.float32)

    resample_image(image, (10, 15, 15), (1, 1, 1), (4.0, 1.3, 1.3), manager.get_configuration("3d_fullres"), normalise)
    assert sum(seen) == 10


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 90), new_size=st.integers(1, 90), order=st.sampled_from([1, 2, 3, 4, 5]))
def test_the_spline_of_one_axis_is_what_scipy_makes_of_unit_vectors(size, new_size, order):
    options = {"order": order, "mode": "nearest", "grid_mode": True, "prefilter": order > 1}
    expected = np.eye(size)
    if size != new_size:
        expected = np.stack([zoom(unit, new_size / size, **options) for unit in np.eye(size)], axis=1)
    np.testing.assert_allclose(grids.spline_matrix(size, new_size, order), expected, rtol=0, atol=1e-7)
    banded = np.zeros_like(expected)
    for band in grids.spline_bands(size, new_size, order):
        banded[band.out, band.into] = band.matrix
    np.testing.assert_allclose(banded, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("spacing", [(5.0, 1.1, 1.3), (0.6, 1.1, 1.3), (1.5, 1.0, 0.8)], ids=["fewer", "more", "fine"])
def test_threads_make_no_difference(monkeypatch, spacing):
    configuration = PlansManager(models.plans(force_separate_z=False)).get_configuration("3d_fullres")
    image = scans.blobs((40, 45, 50)).array
    shape = grids.new_shape(image.shape, (1.0, 1.0, 1.0), spacing)

    def resampled(threads: int) -> np.ndarray:
        monkeypatch.setattr(workers, "thread_count", lambda: threads)
        return resample_image(image, shape, (1.0, 1.0, 1.0), spacing, configuration)

    np.testing.assert_array_equal(resampled(1), resampled(4))


def test_products_are_computed_on_one_thread_and_the_setting_is_restored():
    with threadpool_limits(2, user_api="blas"):
        seen: list[int] = []

        def look(part: int) -> None:
            seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
            if part == 3:
                raise ValueError("part 3")

        with pytest.raises(ValueError, match="part 3"):
            workers.in_parallel(look, range(6))
        assert set(seen) == {1}
        assert {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"} == {2}


def test_the_image_is_not_changed():
    volume = scans.blobs()
    before = volume.array.copy()
    compare(volume, spacing=(4.0, 1.2, 1.2))
    compare(volume, spacing=volume.spacing_mm)
    np.testing.assert_array_equal(volume.array, before)


@settings(max_examples=300, deadline=None)
@given(current=SPACINGS, new=SPACINGS, force=st.sampled_from([None, True, False]))
def test_separate_axis_is_stocks(current, new, force):
    do_separate, axis = determine_do_sep_z_and_axis(force, current, new)
    assert grids.separate_axis(current, new, force=force) == (axis if do_separate else None)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 600)] * 3),
    current=st.tuples(*[st.floats(0.3, 8)] * 3),
    new=st.tuples(*[st.floats(0.3, 8)] * 3),
)
def test_new_shape_is_stocks(shape, current, new):
    assert grids.new_shape(shape, current, new) == tuple(compute_new_shape(shape, current, new))


@pytest.mark.parametrize(("spacing", "why"), [((0.1, 1, 1), "no voxel"), ((5.0, 900.0, 900.0), "too large to predict")])
def test_a_scan_that_has_no_voxel_or_too_many_for_the_network_says_which(spacing, why):
    with pytest.raises(ValueError, match=f"which is {why}; check the spacing"):
        network_shape((4, 400, 400), spacing, (4.0, 1.0, 1.0))


@settings(max_examples=200, deadline=None)
@given(patch=st.integers(2, 60), extra=st.integers(0, 200), step=st.sampled_from([0.25, 0.5, 0.7, 0.9, 1.0]))
def test_window_starts_are_stocks_and_cover_everything(patch, extra, step):
    (starts,) = windows.window_starts([patch + extra], [patch], step)
    assert [starts] == compute_steps_for_sliding_window((patch + extra,), (patch,), step)
    covered = np.zeros(patch + extra, bool)
    for start in starts:
        covered[start : start + patch] = True
    assert covered.all()


@pytest.mark.parametrize("patch", [(32, 128, 192), (40, 224, 192), (7, 33, 50)])
def test_window_weights_are_stocks(patch):
    import torch

    stock = compute_gaussian(patch, value_scaling_factor=10, device=torch.device("cpu")).float()
    np.testing.assert_array_equal(windows.gaussian_weights(patch), stock.numpy())


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.tuples(*[st.integers(2, 9)] * 3))
def test_nonzero_box_is_stocks(seed, shape):
    rng = np.random.default_rng(seed)
    arrays = [(rng.random(shape) < 0.03).astype(np.int16) for _ in range(2)]
    if not any(array.any() for array in arrays):
        arrays[0][1, 1, 1] = 5
    _, _, box = crop_to_nonzero(np.stack(arrays))
    assert [list(b) for b in nonzero_box(arrays)] == [list(b) for b in box]
