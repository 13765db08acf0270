"""Class weights from label frequencies."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_flare.trainers.losses import count_labels, evenly_spaced, frequencies, inverse_sqrt_frequency


def test_outside_and_ignored_voxels_are_not_counted() -> None:
    maps = [np.array([[-1, 0, 0], [1, 3, 1]], np.int8), np.array([[2, 2, 7]], np.int8)]
    assert count_labels(iter(maps), 3).tolist() == [2, 2, 2]


def test_weights_fall_with_the_square_root_of_the_frequency() -> None:
    weights = inverse_sqrt_frequency(np.array([10000, 100, 1]))
    assert weights / weights[0] == pytest.approx([1, 10, 100])
    assert weights.mean() == pytest.approx(1)


def test_an_absent_class_weighs_as_the_rarest_one() -> None:
    weights = inverse_sqrt_frequency(np.array([400, 0, 4]))
    assert weights[1] == weights[2] == pytest.approx(10 * weights[0])
    assert inverse_sqrt_frequency(np.zeros(3)).tolist() == [1, 1, 1]


def test_many_cases_are_sampled_evenly() -> None:
    cases = [f"case{k:03d}" for k in range(100)]
    chosen = evenly_spaced(cases, 4)
    assert chosen == ["case000", "case025", "case050", "case075"]
    assert evenly_spaced(cases[:3], 4) == cases[:3]


def test_an_organ_is_counted_where_it_is_annotated_and_never_as_background() -> None:
    """A full case of 100 voxels: 80, 15, 5. A partial one of 300 with the first organ alone: 45 of it; where the other
    organ is it says "background".
    """
    counts = [np.array([80, 15, 5]), np.array([255, 45, 0])]
    shares = frequencies(counts, [None, (1,)])
    assert shares == pytest.approx([0.80, 60 / 400, 5 / 100])
    assert frequencies(counts[:1], [None]) == pytest.approx([0.8, 0.15, 0.05])


def test_a_voxel_of_an_organ_that_a_case_does_not_annotate_is_not_counted_either() -> None:
    assert frequencies([np.array([50, 30, 20])], [(1,)]) == pytest.approx([0.7, 0.3, 0.0])
