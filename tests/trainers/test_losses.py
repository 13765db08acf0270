"""Class weights from label frequencies."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_flare.trainers.losses import count_labels, evenly_spaced, inverse_sqrt_frequency


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
