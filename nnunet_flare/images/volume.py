"""A scan or label map in memory: values and their grid, and what differs between two grids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nnunet_flare.images.geometry import TO_OTHER_WORLD, is_same_grid, matrix_of

GEOMETRY_TOLERANCE_MM = 1e-3
"""Where no spacing, origin or direction entry differs by more, two grids are equal but for rounding."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or label map and its grid: ``array`` (Z, Y, X), ``spacing_mm`` (z, y, x), origin, direction (x, y, z).

    ``affine`` is nibabel's matrix (16 numbers, row-major, RAS) of what a nibabel reader read, with which results on
    this grid are written; ``doubt`` says what another library would have read in the file.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    affine: tuple[float, ...] | None = None
    doubt: str | None = None

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel."""
        return float(np.prod(self.spacing_mm))

    @property
    def matrix(self) -> np.ndarray:
        """From voxel indices (x, y, z) to places in mm (LPS), see :mod:`nnunet_flare.images.geometry`."""
        if self.affine is not None:
            return TO_OTHER_WORLD @ np.reshape(self.affine, (4, 4))
        return matrix_of(self.spacing_mm, self.origin, self.direction)

    def with_array(self, array: np.ndarray) -> Volume:
        """The same grid with other values; the shape must be equal."""
        if array.shape != self.array.shape:
            raise ValueError(f"array of shape {array.shape} does not fit a grid of shape {self.array.shape}")
        return replace(self, array=array)

    def moved(self, array: np.ndarray, old_index: np.ndarray, spacing_mm: tuple[float, float, float]) -> Volume:
        """The same space with another grid: ``old_index`` (4, 4) takes new voxel indices (x, y, z, 1) to old ones.

        It holds flips, swaps and shifts alone, so that ``spacing_mm`` is the old one with its axes swapped.
        """
        direction = np.reshape(self.direction, (3, 3))
        steps = direction * np.asarray(self.spacing_mm[::-1], float)
        origin = np.asarray(self.origin, float) + steps @ old_index[:3, 3]
        affine = None if self.affine is None else np.reshape(self.affine, (4, 4)) @ old_index
        if affine is not None:
            origin = (TO_OTHER_WORLD @ affine)[:3, 3]
        return Volume(
            array,
            spacing_mm,
            tuple(origin.tolist()),
            tuple((direction @ old_index[:3, :3]).ravel().tolist()),
            None if affine is None else tuple(affine.ravel().tolist()),
            self.doubt,
        )


def geometry_difference(one: Volume, other: Volume) -> str | None:
    """What differs between two grids, in words, or None when they are the same within a share of a voxel."""
    if one.array.shape != other.array.shape:
        return f"shape (z, y, x) {one.array.shape} and {other.array.shape}"
    if is_same_grid(one.matrix, other.matrix, one.array.shape):
        return None
    return rounding_difference(one, other) or f"matrix {_listed(one.matrix[:3])} and {_listed(other.matrix[:3])}"


def rounding_difference(one: Volume, other: Volume) -> str | None:
    """What differs by more than 0.001 between two grids that may be the same, in words, or None."""
    for name in ("spacing_mm", "origin", "direction"):
        a, b = getattr(one, name), getattr(other, name)
        if not np.allclose(a, b, rtol=0, atol=GEOMETRY_TOLERANCE_MM):
            return f"{name.replace('_mm', '')} {_listed(a)} and {_listed(b)}"
    return None


def _listed(numbers: Any) -> tuple[Any, ...]:
    return tuple(np.round(np.asarray(numbers, float), 4).tolist())
