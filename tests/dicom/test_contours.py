"""Outlines of masks: they hold the pixels that they were made of, and the area."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis.extra.numpy import arrays
from scipy.ndimage import label

from nnunet_flare.dicom.contours import area, outlines


def filled(polygons: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The pixels whose centres an odd number of polygon edges lies to the right of, the textbook's way."""
    inside = np.zeros(shape, bool)
    rows, columns = np.indices(shape)
    rows = rows + 1e-7  # off the corners
    for polygon in polygons:
        for (r0, c0), (r1, c1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            crosses = (r0 > rows) != (r1 > rows)
            with np.errstate(divide="ignore", invalid="ignore"):
                at = c0 + (rows - r0) / (r1 - r0) * (c1 - c0)
            inside ^= crosses & (columns < at)
    return inside


def holes(mask: np.ndarray) -> int:
    """Pieces of background, corners joined, that a mask encloses, counted piece by piece of the mask."""
    pieces, count = label(mask)
    return sum(label(np.pad(pieces != n, 1, constant_values=True), np.ones((3, 3)))[1] - 1 for n in range(1, count + 1))


@hypothesis.given(arrays(bool, (7, 8)))
def test_polygons_hold_the_pixels_they_were_made_of(mask):
    polygons = outlines(mask)
    np.testing.assert_array_equal(filled(polygons, mask.shape), mask)
    assert len(polygons) == label(mask)[1]
    assert sum(map(area, polygons)) == pytest.approx(mask.sum() - len(polygons) / 2 + holes(mask) / 2)


def test_a_ring_is_one_closed_line():
    mask = np.ones((9, 9), bool)
    mask[3:6, 3:6] = False
    (ring,) = outlines(mask)
    assert area(ring) == pytest.approx(72)
    np.testing.assert_array_equal(filled([ring], mask.shape), mask)


def test_straight_edges_have_no_points_between_their_ends():
    assert len(outlines(np.ones((20, 30), bool))[0]) == 8


def test_polygons_are_those_of_marching_squares():
    measure = pytest.importorskip("skimage.measure")
    rows, columns = np.indices((40, 50))
    mask = (rows - 20) ** 2 + (columns - 22) ** 2 < 150
    (found,) = outlines(mask)
    (theirs,) = measure.find_contours(np.pad(mask, 1).astype(float), 0.5)
    assert area(found) == pytest.approx(area(theirs[:-1]))
    assert set(map(tuple, found)) <= set(map(tuple, theirs - 1))
