"""NSD against DeepMind's surface-distance and against cases that one can compute by hand."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_flare.evaluation.surface import ball_rows, corner_areas_mm2, find_corners, surface_dice, surface_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import surface_distance
    from surface_distance import lookup_tables

spacings = st.tuples(*[st.sampled_from([0.5, 0.7, 0.8, 1.0, 1.25, 2.0, 2.5, 3.0, 5.0])] * 3)


def nsd(truth, found, spacing_mm, tolerance_mm):
    surfaces = [surface_of(find_corners(mask.astype(np.uint8)), [1]) for mask in (truth, found)]
    return surface_dice(*surfaces, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)


def deepmind_nsd(truth, found, spacing_mm, tolerance_mm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distances = surface_distance.compute_surface_distances(
            truth.astype(bool).transpose(2, 1, 0), found.astype(bool).transpose(2, 1, 0), spacing_mm[::-1]
        )
    return surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm)


@given(spacings)
@settings(max_examples=20, deadline=None)
def test_the_derived_surface_areas_are_those_of_the_published_table(spacing_mm):
    published = lookup_tables.create_table_neighbour_code_to_surface_area(spacing_mm)
    np.testing.assert_allclose(corner_areas_mm2(spacing_mm), published, rtol=1e-12)


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 10_000),
    density=st.sampled_from([0.02, 0.2, 0.5, 0.9]),
    spacing_mm=spacings,
    tolerance_mm=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0]),
)
@settings(max_examples=150, deadline=None)
def test_noise_masks_score_as_deepmind_scores_them(shape, seed, density, spacing_mm, tolerance_mm):
    rng = np.random.default_rng(seed)
    truth, found = (rng.random((2, *shape)) < density).astype(np.uint8)
    truth[0, 0, 0] = found[-1, -1, -1] = 1
    expected = deepmind_nsd(truth, found, spacing_mm, tolerance_mm)
    assert nsd(truth, found, spacing_mm, tolerance_mm) == pytest.approx(expected, abs=1e-9)


@given(
    size=st.tuples(*[st.integers(1, 6)] * 3),
    shift=st.tuples(*[st.integers(-3, 3)] * 3),
    spacing_mm=spacings,
    tolerance_mm=st.sampled_from([1.0, 2.0, 3.0, 5.0]),
)
@settings(max_examples=100, deadline=None)
def test_shifted_boxes_score_as_deepmind_scores_them_also_where_distances_tie(size, shift, spacing_mm, tolerance_mm):
    truth, found = np.zeros((2, 13, 13, 13), dtype=np.uint8)
    truth[tuple(slice(4, 4 + s) for s in size)] = 1
    found[tuple(slice(4 + d, 4 + d + s) for s, d in zip(size, shift, strict=True))] = 1
    expected = deepmind_nsd(truth, found, spacing_mm, tolerance_mm)
    assert nsd(truth, found, spacing_mm, tolerance_mm) == pytest.approx(expected, abs=1e-9)


def test_a_stray_voxel_in_the_far_corner_costs_its_own_surface_only():
    truth, found = np.zeros((2, 40, 50, 60), dtype=np.uint8)
    truth[5:15, 5:15, 5:15] = found[5:15, 5:15, 5:15] = 1
    found[39, 49, 59] = 1
    areas = corner_areas_mm2((1.0, 1.0, 1.0))
    cube = areas[surface_of(find_corners(truth), [1]).code].sum()
    voxel = 8 * areas[1]
    assert nsd(truth, found, (1.0, 1.0, 1.0), 2.0) == pytest.approx(2 * cube / (2 * cube + voxel))


@pytest.mark.parametrize("gap, expected", [(2, 1.0), (3, 0.5), (4, 0.0)])
def test_a_distance_equal_to_the_tolerance_counts_as_within(gap, expected):
    truth, found = np.zeros((2, 3, 3, 12), dtype=np.uint8)
    truth[1, 1, 3] = found[1, 1, 3 + gap] = 1
    assert nsd(truth, found, (2.5, 0.7, 1.0), 2.0) == expected


def test_rows_of_the_ball_hold_exactly_the_voxels_within_the_tolerance():
    spacing_mm, tolerance_mm = (2.5, 0.8, 0.7), 5.0
    inside = {(dz, dy, x) for dz, dy, radius in ball_rows(spacing_mm, tolerance_mm) for x in range(-radius, radius + 1)}
    z, y, x = np.mgrid[-9:10, -9:10, -9:10]
    near = np.sqrt((x * 0.7) ** 2 + (y * 0.8) ** 2 + (z * 2.5) ** 2) <= tolerance_mm
    assert inside == set(zip(z[near].tolist(), y[near].tolist(), x[near].tolist(), strict=True))


def test_rows_of_the_ball_come_nearest_first():
    rows = ball_rows((2.5, 0.8, 0.7), 5.0)
    distances = [np.hypot(dz * 2.5, dy * 0.8) for dz, dy, _ in rows]
    assert rows[0][:2] == (0, 0)
    assert distances == sorted(distances)


@given(seed=st.integers(0, 10_000), start=st.integers(0, 5), length=st.integers(1, 6), several=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_cut_surface_is_the_surface_of_the_cut_volume(seed, start, length, several):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.repeat(rng.integers(0, 3, (6, 2, 3), dtype=np.uint8), 3, axis=1), 2, axis=2)
    stop = min(start + length, labels.shape[0])
    members = [1, 2] if several else [2]
    cut = surface_of(find_corners(labels), members, labels=labels, slices=slice(start, stop))
    alone = np.zeros_like(labels)
    alone[start:stop] = labels[start:stop]
    expected = surface_of(find_corners(alone), members)
    np.testing.assert_array_equal(cut.position, expected.position)
    np.testing.assert_array_equal(cut.code, expected.code)


def test_volumes_larger_than_one_slab_give_the_same_corners(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 3, (9, 7, 5), dtype=np.uint8)
    whole = find_corners(labels)
    monkeypatch.setattr("nnunet_flare.evaluation.surface.SLAB_CORNERS", 1)
    np.testing.assert_array_equal(find_corners(labels).position, whole.position)
