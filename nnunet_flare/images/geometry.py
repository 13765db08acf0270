"""Where the voxels of a grid lie in space, and how far two grids lie apart.

A grid's matrix (4, 4) takes a voxel's index (x, y, z, 1) to its place in mm, in SimpleITK's world: to the left, to the
back and upwards (LPS). nibabel's world, that of NIfTI, runs to the right, to the front and upwards (RAS).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

LPS: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
"""The direction in which array axis 0 runs to the head, 1 to the back and 2 to the patient's left."""

TO_OTHER_WORLD = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From LPS to RAS, and back."""

CENTRE_SHARE, CORNER_SHARE = 0.4, 0.8
"""Two grids are the same while their centres lie no more voxels apart, and their corners no more than that."""


def matrix_of(spacing_mm: Sequence[float], origin: Sequence[float], direction: Sequence[float]) -> np.ndarray:
    """The matrix of a grid: spacing (z, y, x), origin and row-major direction in SimpleITK's order and world."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing_mm[::-1], float)
    matrix[:3, 3] = origin
    return matrix


def displacement(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> tuple[float, float]:
    """How many of the first grid's voxels two grids of one shape (z, y, x) lie apart, along the worst axis.

    Returns:
        At their centre, and at the corner where it is most. Infinite where a matrix is singular or not finite.
    """
    last = np.asarray(shape[::-1], float) - 1
    places = np.array([np.append(last / 2, 1.0), *(np.append(last * c, 1.0) for c in product((0, 1), repeat=3))]).T
    if not (np.isfinite(one).all() and np.isfinite(other).all()) or abs(np.linalg.det(one)) < 1e-12:
        return np.inf, np.inf
    moved = np.abs((np.linalg.solve(one, other @ places) - places)[:3]).max(axis=0)
    return float(moved[0]), float(moved[1:].max())


def is_same_grid(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two grids of one shape differ by no more than a share of a voxel, as rounded headers do."""
    centre, corner = displacement(one, other, shape)
    return centre <= CENTRE_SHARE and corner <= CORNER_SHARE


def describe(direction: Sequence[float]) -> str:
    """Where (x, y, z) of a direction run, as three letters such as ``LPS`` or ``RAS``."""
    matrix = np.reshape(direction, (3, 3))
    names = (("L", "R"), ("P", "A"), ("S", "I"))
    letters = []
    for column in matrix.T:
        axis = int(np.argmax(np.abs(column)))
        letters.append(names[axis][0 if column[axis] > 0 else 1])
    return "".join(letters)
