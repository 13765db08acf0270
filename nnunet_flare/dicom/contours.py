"""Outlines of a mask in a plane, as polygons.

A polygon runs through the middles of the pixel edges that part the mask from the rest, as marching squares lays it. A
pixel's centre is inside exactly where the pixel is in the mask; a piece loses half a pixel of area at its corners.
What touches at a corner only is two pieces. A hole is joined to its outline by a channel of no width, as DICOM asks for
a contour that is one closed line.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
"""Directions (row, column) along pixel edges, each a right turn from the one before; the mask lies on the right."""


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """The polygons of a mask (rows, columns), one per piece, each (n, 2) of (row, column); pixel centres are whole.

    No polygon repeats its first point at its end.
    """
    from scipy.ndimage import find_objects, label

    pieces, _ = label(mask)
    found = []
    for number, box in enumerate(find_objects(pieces), start=1):
        loops = [_middles(loop) for loop in _loops(np.pad(pieces[box] == number, 1))]
        polygon = _joined(loops)
        found.append(polygon + [box[0].start - 1, box[1].start - 1])
    return found


def area(polygon: np.ndarray) -> float:
    """The area of a polygon (n, 2), whichever way it runs."""
    return abs(_signed(polygon))


def _signed(polygon: np.ndarray) -> float:
    rows, columns = polygon[:, 0], polygon[:, 1]
    return float(np.dot(columns, np.roll(rows, -1)) - np.dot(rows, np.roll(columns, -1))) / 2


def _loops(mask: np.ndarray) -> Iterator[list[tuple[int, int, int]]]:
    """The closed lines of pixel edges around a padded piece: corner (row, column) and direction of every edge."""
    edges = {}
    shifted = [np.roll(mask, offset, axis) for offset, axis in ((1, 0), (-1, 1), (-1, 0), (1, 1))]
    for direction, neighbour in enumerate(shifted):  # above, right, below, left of the pixel is outside
        rows, columns = np.nonzero(mask & ~neighbour)
        corner = ((0, 0), (0, 1), (1, 1), (1, 0))[direction]
        for row, column in zip((rows + corner[0]).tolist(), (columns + corner[1]).tolist(), strict=True):
            edges[row, column, direction] = True
    while edges:
        start = next(iter(edges))
        loop, edge = [], start
        while True:
            del edges[edge]
            loop.append(edge)
            row, column, direction = edge
            row, column = row + STEPS[direction][0], column + STEPS[direction][1]
            turns = ((direction + turn) % 4 for turn in (1, 0, 3))  # right first: a corner parts what touches there
            following = next(((row, column, turn) for turn in turns if (row, column, turn) in edges), None)
            if following is None:
                break
            edge = following
        yield loop


def _middles(loop: list[tuple[int, int, int]]) -> np.ndarray:
    """The middles of edges, in places of pixel centres, without those on a straight line."""
    corners = np.array(loop, float)
    steps = np.array(STEPS, float)[corners[:, 2].astype(int)]
    points = corners[:, :2] + steps / 2 - 0.5
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    bends = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-9
    return points[bends]


def _joined(loops: list[np.ndarray]) -> np.ndarray:
    """One polygon of an outline and its holes, each entered and left at the same two points."""
    loops = sorted(loops, key=area, reverse=True)
    polygon = loops[0]
    for hole in loops[1:]:
        apart = ((polygon[:, None] - hole[None]) ** 2).sum(axis=-1)
        here, there = np.unravel_index(int(apart.argmin()), apart.shape)
        inside = np.roll(hole, -int(there), axis=0)
        polygon = np.concatenate([polygon[: here + 1], inside, inside[:1], polygon[here:]])
    return polygon
