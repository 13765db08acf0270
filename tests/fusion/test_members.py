"""From members' label maps to training labels: crop mask, ignored organs and class locations."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_flare.fusion.members import class_locations, ignore_uncertain, training_label


def test_only_background_outside_the_crop_mask_is_marked():
    fused = np.array([[[0, 1], [2, 0]]], np.uint8)
    crop = np.array([[[-1, -1], [0, 0]]], np.int16)
    assert training_label(fused, crop).tolist() == [[[-1, 1], [2, 0]]]


def test_every_members_voxels_of_an_uncertain_organ_become_ignore():
    label = np.array([[[1, 2, 0, 2]]], np.int16)
    members = [np.array([[[1, 2, 2, 1]]], np.uint8), np.array([[[2, 1, 0, 1]]], np.uint8)]
    result, shares = ignore_uncertain(label, members, {"spleen": (2,)}, 9)
    assert result.tolist() == [[[9, 9, 9, 9]]]  # the union of label and members
    assert shares == {"spleen": 1.0}
    untouched, none = ignore_uncertain(label, members, {}, 9)
    assert untouched.tolist() == label.tolist() and none == {}


def test_class_locations_are_true_voxels_of_their_class_without_repetition():
    rng = np.random.default_rng(0)
    label = rng.integers(-1, 4, (20, 21, 22)).astype(np.int16)
    located = class_locations(label, [1, 2, 3, 7], points=100)
    for organ in (1, 2, 3):
        found = located[organ]
        assert found.dtype == np.int16 and found.shape == (100, 4)
        assert (label[tuple(found[:, 1:].T)] == organ).all() and (found[:, 0] == 0).all()
        assert len({tuple(row) for row in found.tolist()}) == 100
    assert located[7].shape == (0, 4)


def test_a_region_is_ignored_and_located_as_the_union_of_its_labels():
    label = np.array([[[1, 2, 3, 0, -1, 4]]], np.int16)
    members = [np.array([[[1, 2, 0, 3, 0, 0]]], np.uint8)]
    result, shares = ignore_uncertain(label, members, {"core": (2, 3)}, 4)
    assert result.tolist() == [[[1, 4, 4, 4, -1, 4]]] and shares == {"core": pytest.approx(1 / 2)}
    located = class_locations(label, [1, (2, 3), (-1, 0, 1, 2, 3)])
    assert {group: sorted(places[:, 3].tolist()) for group, places in located.items()} == {
        1: [0], (2, 3): [1, 2], (-1, 0, 1, 2, 3): [0, 1, 2, 3, 4]}  # fmt: skip


def test_all_voxels_are_given_when_there_are_few():
    label = np.zeros((3, 4, 5), np.int16)
    label[1, 2, 3] = label[2, 0, 4] = 5
    assert sorted(map(tuple, class_locations(label, [5])[5].tolist())) == [(0, 1, 2, 3), (0, 2, 0, 4)]


def test_an_axis_too_long_for_the_coordinates_is_refused():
    with pytest.raises(ValueError, match="too long"):
        class_locations(np.zeros((1, 1, 40000), np.int16), [1])
