"""One slice of scores on the network's grid to one slice of labels, or of scores, on the image's, on the CPU.

A running maximum over the classes needs one plane. A class that is nowhere above the background on the network's grid
cannot win between its points either: interpolation has no negative weights, and rounding is monotone. So a class is
interpolated only around the points where it is above the background, which is a small part of a slice for most organs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nnunet_flare.inference.arrays import Array, sigmoid
from nnunet_flare.inference.grids import Lerp, linear, nearest
from nnunet_flare.inference.labels import REGION_THRESHOLD


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

    def part(self, within: slice) -> tuple[slice, slice, Axis]:
        """What indices of the old axis bear on: a part of the new one, from which part of the old one, and how."""
        if self.mix is not None:
            low, high = self.mix.low, self.mix.high
        elif self.indices is not None:
            low = high = self.indices
        else:
            return within, within, Axis(within.stop - within.start)
        own = slice(int(np.searchsorted(high, within.start)), int(np.searchsorted(low, within.stop)))
        if own.stop <= own.start:
            return slice(own.start, own.start), slice(0, 0), Axis(0)
        first = int(low[own.start])
        old, size = slice(first, int(high[own.stop - 1]) + 1), own.stop - own.start
        if self.mix is None:
            return own, old, Axis(size, indices=low[own] - first)
        return own, old, Axis(size, mix=Lerp(low[own] - first, high[own] - first, self.mix.weight[own]))

    def following(self, within: slice) -> tuple[slice, Axis]:
        """What indices of the old axis add to the new one when those up to the first of them were there before."""
        if self.mix is not None:
            low, high = self.mix.low, self.mix.high
        else:
            low = high = np.arange(self.size) if self.indices is None else self.indices
        start = 0 if within.start == 0 else int(np.searchsorted(high, within.start, "right"))
        own = slice(start, int(np.searchsorted(high, within.stop)))
        size = own.stop - own.start
        if self.mix is None:
            return own, Axis(size, indices=low[own] - within.start)
        return own, Axis(size, mix=Lerp(low[own] - within.start, high[own] - within.start, self.mix.weight[own]))


Part = tuple[slice, slice]
"""Rows and columns of a plane."""

Boxes = list[tuple[int, Part]]
"""Classes and the parts of the network's grid in which they can win."""


class ScorePlanes(Protocol):
    """Makes scores on the image's grid of slices, where their scores lie."""

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

    def of_rows(self, rows: slice) -> tuple[slice, HostPlanes]:
        """The part of the new rows that some old ones add, the first of which was there before, and what makes them."""
        own, axis = self.rows.following(rows)
        return own, HostPlanes(axis, self.columns, self.regions, sigmoid=self.sigmoid)

    def labels(self, plane: np.ndarray) -> np.ndarray:
        """The labels (Y, X), uint8, of scores (K, y, x)."""
        return self._labels(plane, self._winning(plane), lambda k, part: plane[k][part])

    def between(self, one: np.ndarray, other: np.ndarray, shares: np.ndarray) -> Iterator[np.ndarray]:
        """The labels of ``(1 - share) * one + share * other`` for some shares."""
        boxes = self._winning(one, other)
        for share in shares.tolist():
            yield self._labels(one, boxes, _Mixed(one, other, share))

    def _winning(self, *planes: np.ndarray) -> Boxes | None:
        """Where each class is above the background on some plane; None for regions, which do not compete."""
        if self.regions is not None:
            return None
        boxes: Boxes = []
        for k in range(1, len(planes[0])):
            above = planes[0][k] > planes[0][0]
            for plane in planes[1:]:
                above |= plane[k] > plane[0]
            rows = np.flatnonzero(above.any(1))
            if rows.size:
                columns = np.flatnonzero(above[rows[0] : rows[-1] + 1].any(0))
                boxes.append((k, (_span(rows), _span(columns))))
        return boxes

    def _labels(self, plane: np.ndarray, boxes: Boxes | None, values: Callable[[int, Part], np.ndarray]) -> np.ndarray:
        """The labels of what ``values`` gives of each class and part of the grid."""
        if boxes is None:
            whole = (slice(None), slice(None))
            return self._regions(np.stack([values(k, whole) for k in range(len(plane))]))
        labels = np.zeros((self.rows.size, self.columns.size), np.uint8)
        if not boxes:
            return labels
        around = (_around([box[0] for _, box in boxes]), _around([box[1] for _, box in boxes]))
        (top, left), best = self._resized_part(0, around, values)
        best = np.array(best)
        for k, box in boxes:
            (rows, columns), resized = self._resized_part(k, box, values)
            here = best[_shifted(rows, top.start), _shifted(columns, left.start)]
            wins = resized > here
            np.copyto(labels[rows, columns], np.uint8(k), where=wins)
            np.copyto(here, resized, where=wins)
        return labels

    def scores(self, plane: np.ndarray) -> np.ndarray:
        found = np.empty((len(plane), self.rows.size, self.columns.size), np.float32)
        for into, scores in zip(found, plane, strict=True):
            into[...] = self._resized(scores)
        return found

    def _resized_part(self, k: int, box: Part, values: Callable[[int, Part], np.ndarray]) -> tuple[Part, np.ndarray]:
        """Which part of the new plane a part of the old one bears on, and the class's values there."""
        own_rows, old_rows, rows = self.rows.part(box[0])
        own_columns, old_columns, columns = self.columns.part(box[1])
        return (own_rows, own_columns), _along(_along(values(k, (old_rows, old_columns)), columns, 1), rows, 0)

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


class _Mixed:
    """Values between two slices, mixed only in the parts that are asked for."""

    def __init__(self, one: np.ndarray, other: np.ndarray, share: float) -> None:
        self._one, self._other = one, other
        self._keep, self._take = np.float32(1 - share), np.float32(share)

    def __call__(self, k: int, part: Part) -> np.ndarray:
        values = self._one[k][part] * self._keep
        values += self._other[k][part] * self._take
        return values


def _span(indices: np.ndarray) -> slice:
    """From the first to the last of sorted indices."""
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _around(spans: list[slice]) -> slice:
    return slice(min(span.start for span in spans), max(span.stop for span in spans))


def _shifted(span: slice, start: int) -> slice:
    return slice(span.start - start, span.stop - start)


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
