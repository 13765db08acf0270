"""Agreement of members equals the textbook Dice, organ by organ and pair by pair."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_flare.selection.agreement import MAX_PACKED_BINS, pairwise_dice


def plain_dice(a: np.ndarray, b: np.ndarray, organ: int) -> float:
    """Dice as it is written in papers; an organ absent in both is full agreement."""
    one, other = a == organ, b == organ
    total = one.sum() + other.sum()
    return 1.0 if total == 0 else 2.0 * (one & other).sum() / total


@st.composite
def label_maps(draw):
    num_labels = draw(st.integers(2, 15))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)))
    members = draw(st.integers(2, 6))
    maps = [draw(arrays(np.uint8, shape, elements=st.integers(0, num_labels - 1))) for _ in range(members)]
    return maps, num_labels


@settings(max_examples=60, deadline=None)
@given(label_maps())
def test_every_pair_and_organ_equals_the_textbook_dice(drawn):
    maps, num_labels = drawn
    found = pairwise_dice(maps, num_labels)
    assert found.pairs == tuple(combinations(range(len(maps)), 2))
    for row, (i, j) in enumerate(found.pairs):
        expected = [plain_dice(maps[i], maps[j], organ) for organ in range(1, num_labels)]
        np.testing.assert_allclose(found.dice[row], expected, rtol=0, atol=1e-12)
    for member, array in enumerate(maps):
        assert found.voxels[member].tolist() == [int((array == organ).sum()) for organ in range(1, num_labels)]


def test_many_members_and_labels_are_counted_pair_by_pair_with_the_same_result():
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 30, (6, 7, 8)).astype(np.uint8) for _ in range(8)]
    assert MAX_PACKED_BINS < 30**8
    found = pairwise_dice(maps, 30)
    row = found.pairs.index((2, 5))
    np.testing.assert_allclose(found.dice[row], [plain_dice(maps[2], maps[5], o) for o in range(1, 30)], atol=1e-12)


def test_an_organ_absent_everywhere_agrees_and_in_one_member_alone_does_not():
    a = np.zeros((2, 2, 2), np.uint8)
    b = a.copy()
    b[0, 0, 0] = 2
    found = pairwise_dice([a, b], 4)
    assert found.per_organ.tolist() == [1.0, 0.0, 1.0]
    assert found.present.tolist() == [False, True, False]


def test_spoiling_one_organ_of_one_member_lowers_exactly_that_organ():
    rng = np.random.default_rng(1)
    whole = rng.integers(0, 6, (8, 8, 8)).astype(np.uint8)
    spoiled = whole.copy()
    spoiled[spoiled == 3] = 0
    found = pairwise_dice([whole, whole, spoiled], 6).per_organ
    assert found[2] == pytest.approx(1 / 3)  # one pair of three still agrees
    assert np.delete(found, 2).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([np.zeros((2, 2, 2), np.uint8)], "at least two"),
        ([np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8)], "differ in shape"),
        ([np.full((2, 2, 2), 9, np.uint8), np.zeros((2, 2, 2), np.uint8)], "found 9"),
    ],
)
def test_what_cannot_be_compared_is_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        pairwise_dice(maps, 5)


def test_stability_is_the_mean_dice_of_the_earlier_checkpoints_with_the_last():
    maps = [np.random.default_rng(seed).integers(0, 4, (3, 4, 5)).astype(np.uint8) for seed in range(3)]

    def dice(one, other, organ):
        return 2 * ((one == organ) & (other == organ)).sum() / ((one == organ).sum() + (other == organ).sum())

    found = pairwise_dice(maps, 4)
    expected = [np.mean([dice(early, maps[2], organ) for early in maps[:2]]) for organ in (1, 2, 3)]
    np.testing.assert_allclose(found.with_last, expected)
    assert not np.allclose(found.with_last, found.per_organ), "the pair of the earlier two does not count"
    swapped = pairwise_dice([maps[1], maps[0], maps[2]], 4)
    np.testing.assert_allclose(swapped.with_last, expected)


@settings(max_examples=30, deadline=None)
@given(label_maps())
def test_the_labels_of_a_region_count_as_one(drawn):
    maps, num_labels = drawn
    regions = [tuple(range(1, num_labels)), (1,), tuple(range(2, num_labels)) or (1,)]
    found = pairwise_dice(maps, num_labels, regions)
    for row, (i, j) in enumerate(found.pairs):
        masks = [(np.isin(maps[i], ids), np.isin(maps[j], ids)) for ids in regions]
        np.testing.assert_allclose(found.dice[row], [plain_dice(a, b, True) for a, b in masks], rtol=0, atol=1e-12)
    for member, array in enumerate(maps):
        assert found.voxels[member].tolist() == [int(np.isin(array, ids).sum()) for ids in regions]
