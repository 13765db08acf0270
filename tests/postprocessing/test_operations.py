"""Every operation against its slow SciPy twin on random label maps, and on maps that one can read."""

import numpy as np
import pytest
import slow_reference as slow
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_flare.postprocessing import operations as ours

SPACING_MM = (2.5, 0.8, 0.7)

shapes = st.tuples(*[st.integers(2, 18)] * 3)
spacings = st.tuples(*[st.sampled_from([0.7, 1.0, 2.5, 5.0])] * 3)
seeds = st.integers(0, 100_000)


def organs_map(seed, shape, n_labels=4, sparse=False):
    """Crowded boxes that touch each other and every border, with stray voxels and holes; or only a few voxels."""
    rng = np.random.default_rng(seed)
    if sparse:
        labels = np.zeros(shape, dtype=np.uint8)
    else:
        coarse = rng.integers(0, n_labels + 1, tuple(-(-size // 3) for size in shape), dtype=np.uint8)
        labels = np.kron(coarse, np.ones((3, 3, 3), dtype=np.uint8))[: shape[0], : shape[1], : shape[2]]
    noise = rng.random(shape) < 0.03
    labels[noise] = rng.integers(0, n_labels + 1, int(noise.sum()))
    return labels


def same(found, expected, original, before):
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(original, before)  # the input is never changed
    assert found.dtype == np.uint8


@given(shapes, seeds, spacings, st.floats(0, 500), st.booleans())
@settings(max_examples=40, deadline=None)
def test_small_organs(shape, seed, spacing_mm, minimum, sparse):
    labels = organs_map(seed, shape, sparse=sparse)
    before, minima = labels.copy(), {1: minimum, 3: 2 * minimum, 9: 50.0}
    found = ours.remove_small_organs(labels, spacing_mm, minimum_mm3=minima)
    same(found, slow.remove_small_organs(labels, spacing_mm, minima), labels, before)


@given(shapes, seeds, st.sampled_from([(5, 5, 5), (3, 3, 3), (1, 3, 5), (1, 1, 1)]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_closing(shape, seed, size, sparse):
    labels = organs_map(seed, shape, sparse=sparse)
    before = labels.copy()
    found = ours.close_organs(labels, SPACING_MM, organs=[2, 4, 1], size_voxels=size)
    same(found, slow.close_organs(labels, [2, 4, 1], size), labels, before)


@given(shapes, seeds, spacings, st.sampled_from([None, 0.0, 3.0, 20.0]), st.sampled_from([0.0, 2.0, 20.0]))
@settings(max_examples=60, deadline=None)
def test_axial_field(shape, seed, spacing_mm, gap_mm, below_mm):
    labels = organs_map(seed, shape, sparse=True)
    labels[np.random.default_rng(seed).random(shape[0]) < 0.5] = 0  # slices without anything
    before = labels.copy()
    found = ours.keep_axial_field(labels, spacing_mm, references=[2, 3], gap_mm=gap_mm, below_mm=below_mm)
    same(found, slow.keep_axial_field(labels, spacing_mm, [2, 3], gap_mm, below_mm), labels, before)


@given(shapes, seeds, st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 5.0, 60.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_small_components(shape, seed, share, minimum, sparse):
    labels = organs_map(seed, shape, sparse=sparse)
    before = labels.copy()
    found = ours.remove_small_components(labels, SPACING_MM, organs=[1, 3], share=share, minimum_mm3=minimum)
    same(found, slow.remove_small_components(labels, SPACING_MM, [1, 3], share, minimum), labels, before)


@given(shapes, seeds, st.sampled_from([0.0, 5.0, 60.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_largest_component(shape, seed, minimum, sparse):
    labels = organs_map(seed, shape, sparse=sparse)
    before = labels.copy()
    found = ours.keep_largest(labels, SPACING_MM, organs=[1, 2, 7], minimum_mm3=minimum)
    same(found, slow.keep_largest(labels, SPACING_MM, [1, 2, 7], minimum), labels, before)


@given(shapes, seeds, st.sampled_from([0.0, 5.0, 60.0]), st.integers(1, 12), st.booleans())
@settings(max_examples=40, deadline=None)
def test_single_label_components(shape, seed, minimum, at_most, sparse):
    labels = organs_map(seed, shape, sparse=sparse)
    before = labels.copy()
    found = ours.keep_largest_pooled(labels, SPACING_MM, organs=[1, 2, 3], minimum_mm3=minimum, at_most=at_most)
    same(found, slow.keep_largest_pooled(labels, SPACING_MM, [1, 2, 3], minimum, at_most), labels, before)


@given(shapes, seeds, st.booleans(), st.sampled_from([0.02, 0.1, 0.4]))
@settings(max_examples=60, deadline=None)
def test_enclosed_components(shape, seed, only_if_several, density):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(shape) < density, 2, 1).astype(np.uint8)
    labels[rng.random(shape) < 0.05] = 0
    before = labels.copy()
    found = ours.absorb_enclosed(labels, SPACING_MM, organ=2, into=1, only_if_several=only_if_several)
    same(found, slow.absorb_enclosed(labels, 2, 1, only_if_several), labels, before)


@given(shapes, seeds, st.sampled_from([None, 0.0, 3.0, 20.0]), st.sampled_from([0.6, 0.85]))
@settings(max_examples=40, deadline=None)
def test_holes(shape, seed, maximum, density):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(shape) < density, rng.integers(1, 3), 0).astype(np.uint8)
    labels[rng.random(shape) < 0.05] = 3
    before = labels.copy()
    found = ours.fill_holes(labels, SPACING_MM, organs=[1, 2, 3], maximum_mm3=maximum)
    same(found, slow.fill_holes(labels, SPACING_MM, [1, 2, 3], maximum), labels, before)


@pytest.mark.parametrize("distance", [3, 4, 5, 6, 15, 16, 17, 31, 33])
def test_closing_joins_what_is_near_and_no_cluster_border_changes_that(distance):
    labels = np.zeros((5, 5, 80), dtype=np.uint8)
    labels[2, 2, [20, 20 + distance]] = 7
    found = ours.close_organs(labels, SPACING_MM, organs=[7], size_voxels=(5, 5, 5))
    np.testing.assert_array_equal(found, slow.close_organs(labels, [7], (5, 5, 5)))
    assert (found[2, 2, 21] == 7) == (distance <= 5)


@pytest.mark.parametrize("distance", [16, 17, 20, 24, 25, 26])
def test_closing_with_a_box_larger_than_the_cells_joins_across_them(distance):
    labels = np.zeros((3, 3, 80), dtype=np.uint8)
    labels[1, 1, [15, 15 + distance]] = 7
    found = ours.close_organs(labels, SPACING_MM, organs=[7], size_voxels=(3, 3, 25))
    np.testing.assert_array_equal(found, slow.close_organs(labels, [7], (3, 3, 25)))
    assert (found[1, 1, 16] == 7) == (distance <= 25)


def test_the_topmost_slice_of_the_vessels_is_kept():
    labels = np.zeros((20, 4, 4), dtype=np.uint8)
    labels[:, 0, 0] = 1
    labels[5:15, 2, 2] = 5
    found = ours.keep_axial_field(labels, (5.0, 1.0, 1.0), references=[5], gap_mm=20, below_mm=20)
    # the first slice without the aorta is 4; four slices (20 mm) under it are kept
    assert np.flatnonzero(found.any(axis=(1, 2))).tolist() == list(range(15))
    found = ours.keep_axial_field(labels, (5.0, 1.0, 1.0), references=[5], gap_mm=20, below_mm=5)
    assert np.flatnonzero(found.any(axis=(1, 2))).tolist() == list(range(3, 15))


def test_without_vessels_nothing_is_erased():
    labels = np.zeros((6, 4, 4), dtype=np.uint8)
    labels[2, 1:3, 1:3] = 1
    found = ours.keep_axial_field(labels, SPACING_MM, references=[5, 6, 10], gap_mm=20, below_mm=20)
    np.testing.assert_array_equal(found, labels)


def test_vessels_on_the_lowest_slice_alone_keep_that_slice():
    labels = np.ones((4, 3, 3), dtype=np.uint8)
    labels[0, 1, 1] = 5
    found = ours.keep_axial_field(labels, SPACING_MM, references=[5], gap_mm=20, below_mm=20)
    assert found[0].all() and not found[1:].any()


def test_a_component_of_exactly_the_share_stays():
    labels = np.zeros((3, 3, 14), dtype=np.uint8)
    labels[1, 1, :9] = 4
    labels[1, 1, 12] = 4  # one voxel of ten
    found = ours.remove_small_components(labels, SPACING_MM, organs=[4], share=0.1)
    np.testing.assert_array_equal(found, labels)


def test_lesions_and_other_labels_outside_the_list_are_left_alone():
    labels = np.zeros((5, 9, 9), dtype=np.uint8)
    labels[1:4, 1:4, 1:4], labels[2, 7, 7] = 14, 14
    labels[2, 7, 1] = 1
    for found in (
        ours.keep_largest(labels, SPACING_MM, organs=[1]),
        ours.keep_largest_pooled(labels, SPACING_MM, organs=[1], minimum_mm3=0, at_most=1),
        ours.remove_small_components(labels, SPACING_MM, organs=[1], share=0.5),
    ):
        np.testing.assert_array_equal(found, labels)


def test_neighbouring_organs_are_separate_components():
    labels = np.zeros((3, 3, 8), dtype=np.uint8)
    labels[1, 1, :3], labels[1, 1, 3], labels[1, 1, 4:] = 1, 2, 1
    found = ours.keep_largest(labels, SPACING_MM, organs=[1, 2])
    assert found[1, 1].tolist() == [0, 0, 0, 2, 1, 1, 1, 1]
