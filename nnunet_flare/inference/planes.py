"""One slice of scores on the network's grid to one slice of labels, or of scores, on the image's, on the CPU.

A running maximum over the classes needs one plane. A class that is nowhere above the background on the network's grid
cannot win between its points either: interpolation has no negative weights, and rounding is monotone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nnunet_flare.inference.arrays import Array
from nnunet_flare.inference.grids import Lerp, linear, nearest
from nnunet_flare.inference.labels import REGION_THRESHOLD, sigmoid


@dataclass(frozen=True)
class Axis:
    """How one axis of a plane comes to its new size: by nearest neighbours (source indices), linearly, or as it is."""

    size: int
    indices: np.ndarray | None = None
    mix: Lerp | None = None

    @classmethod
    def of(cls, size: int, new_size: int, *, by_nearest: bool) -> Axis:
        """From one size to another."""
        if by_nearest:
            return cls(new_size, indices=nearest(size, new_size))
        if size == new_size:
            return cls(new_size)
        return cls(new_size, mix=linear(size, new_size))


class Planes(Protocol):
    """Makes labels, or scores on the image's grid, of slices, where their scores lie."""

    def labels(self, plane: Array) -> np.ndarray:
        """The labels (Y, X), uint8, of scores (K, y, x)."""
        ...

    def scores(self, plane: Array) -> np.ndarray:
        """All scores (K, Y, X), single precision on the CPU, of scores (K, y, x)."""
        ...


class HostPlanes:
    """On the CPU."""

    def __init__(self, rows: Axis, columns: Axis, regions: Sequence[int] | None, *, sigmoid: bool) -> None:
        """``regions``: the label of each region, in the order in which they are painted; None for exclusive labels.

        ``sigmoid``: whether scores of regions are not probabilities yet.
        """
        self.rows, self.columns = rows, columns
        self.regions, self.sigmoid = regions, sigmoid

    def labels(self, plane: np.ndarray) -> np.ndarray:
        if self.regions is not None:
            return self._regions(plane)
        best = self._resized(plane[0])
        labels = np.zeros(best.shape, np.uint8)
        wins = np.empty(best.shape, bool)
        best = best.copy()
        for k in np.flatnonzero((plane[1:] > plane[0]).any((1, 2))) + 1:
            resized = self._resized(plane[k])
            np.greater(resized, best, out=wins)
            np.copyto(labels, np.uint8(k), where=wins)
            np.maximum(best, resized, out=best)
        return labels

    def scores(self, plane: np.ndarray) -> np.ndarray:
        found = np.empty((len(plane), self.rows.size, self.columns.size), np.float32)
        for into, scores in zip(found, plane, strict=True):
            into[...] = self._resized(scores)
        return found

    def _regions(self, plane: np.ndarray) -> np.ndarray:
        labels = np.zeros((self.rows.size, self.columns.size), np.uint8)
        for label, region in zip(self.regions or (), plane, strict=True):
            resized = self._resized(region)
            probability = sigmoid(resized) if self.sigmoid else resized
            labels[probability > REGION_THRESHOLD] = label
        return labels

    def _resized(self, plane: np.ndarray) -> np.ndarray:
        """Columns first, while there are few rows."""
        return _along(_along(plane, self.columns, 1), self.rows, 0)


def _along(plane: np.ndarray, axis: Axis, number: int) -> np.ndarray:
    """A plane with one of its axes at its new size."""
    if axis.indices is not None:
        return plane.take(axis.indices, number)
    if axis.mix is None:
        return plane
    low, high, weight = axis.mix
    share = weight.astype(np.float32)[:, None] if number == 0 else weight.astype(np.float32)
    mixed = plane.take(low, number)
    mixed *= 1 - share
    other = plane.take(high, number)
    other *= share
    mixed += other
    return mixed
