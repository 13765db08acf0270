"""Turning volumes between orientations: exact, reversible, and at the same places in space."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_flare.images import Volume, from_sitk, geometry_difference, to_sitk
from nnunet_flare.images.geometry import LPS, describe
from nnunet_flare.images.orientation import turn_between, turn_volume

ORIENTATIONS = [
    "".join(letters) for axes in itertools.permutations(["LR", "PA", "SI"]) for letters in itertools.product(*axes)
]


def volume():
    array = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.uint8)
    return Volume(array, (2.5, 0.8, 0.7), (10.0, -20.0, 30.0), LPS)


def stored_as(code):
    return from_sitk(sitk.DICOMOrient(to_sitk(volume()), code), "case")


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_every_orientation_turns_back_to_the_original(code):
    stored = stored_as(code)
    assert describe(stored.direction) == code
    turned = turn_volume(stored, turn_between(stored.direction))
    assert geometry_difference(turned, volume()) is None
    np.testing.assert_array_equal(turned.array, volume().array)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_turns_are_those_of_simpleitk(code):
    turned = turn_volume(volume(), turn_between(LPS, stored_as(code).direction))
    assert geometry_difference(turned, stored_as(code)) is None
    np.testing.assert_array_equal(turned.array, stored_as(code).array)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_undoing_a_turn_restores_the_array(code):
    stored = stored_as(code)
    turn = turn_between(stored.direction)
    np.testing.assert_array_equal(turn.undo(turn.apply(stored.array)), stored.array)


def test_a_tilted_gantry_is_turned_to_its_nearest_axes():
    tilt = np.deg2rad(20)
    direction = (-1, 0, 0, 0, -np.cos(tilt), np.sin(tilt), 0, np.sin(tilt), np.cos(tilt))
    turn = turn_between(direction)
    assert (turn.axes, turn.flipped) == ((0, 1, 2), (False, True, True))
