"""Changed copies of a scan, how steady labels are over them, and the rule that goes by it; computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_flare.selection.perturb import labels_of_copies, moved, steadiness
from nnunet_flare.selection.rule import Evidence
from nnunet_flare.selection.rules import RULES


def test_moving_there_and_back_leaves_all_but_the_border():
    stream = np.random.default_rng(0)
    scan = stream.normal(size=(1, 7, 8, 9))
    there = moved(scan, 2)
    np.testing.assert_array_equal(there[:, 2:, 2:, 2:], scan[:, :-2, :-2, :-2])
    np.testing.assert_array_equal(there[:, 0], there[:, 1])  # the border is repeated
    np.testing.assert_array_equal(moved(there, -2)[:, :-2, :-2, :-2], scan[:, :-2, :-2, :-2])


def test_a_label_that_follows_the_anatomy_is_the_same_on_every_copy():
    scan = np.zeros((1, 10, 10, 10))
    scan[0, 4:7, 3:6, 4:7] = 1.0
    maps = labels_of_copies(lambda copy: (copy[0] > 0.5).astype(np.uint8), scan)
    assert len(maps) == 3
    for labels in maps:
        np.testing.assert_array_equal(labels, scan[0] > 0.5)


def test_steadiness_is_the_mean_dice_over_the_copies():
    labels = np.zeros((1, 2, 4), np.uint8)
    labels[0, 0] = 1  # four voxels of organ 1, nobody has organ 3
    half, other = labels.copy(), labels.copy()
    half[0, 0, 2:] = 0
    other[0, 1, 0] = 2
    found, absent = steadiness(labels, [half, other], 4)
    assert found == pytest.approx([(2 * 2 / (4 + 2) + 1) / 2, (1 + 0) / 2, 1])
    assert absent == pytest.approx([0, 0.5, 1])


def test_the_rule_is_the_mean_of_both_agreements():
    evidence = Evidence(np.array([[0.8, 0.4]]), np.array([[0.6, np.nan]]))
    assert RULES["steady"].organs(evidence) == pytest.approx(np.array([[0.7, np.nan]]), nan_ok=True)
    assert RULES["mean-organ"].organs(evidence) == pytest.approx(np.array([[0.8, 0.4]]))
