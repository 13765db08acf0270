"""The sums of one slab of windows, see :mod:`nnunet_flare.inference.windows`: cut out, run, added up, averaged.

Arrays lie anywhere, and nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nnunet_flare.inference.arrays import Array, Place
from nnunet_flare.inference.places import is_on_gpu, place_of

if TYPE_CHECKING:
    from nnunet_flare.inference.windows import Forward

WEIGHED_SLICES = 16
"""Slices whose total weights are known at a time."""


class Slab:
    """The windows that start at one index of the first axis: run the network at a place, and add its scores.

    Attributes:
        z: where they start, in the padded scan.
        counts: how many windows of stock's each one stands for, which is what ``progress`` is told.
        first_row: the row of the padded scan that the sums begin with.
        sums: scores (heads, z, y, x), each times its weight, of the scan alone without what it is padded with.
        windows: how many were run.
    """

    def __init__(
        self,
        heads: int,
        rows: int,
        data: Array,
        kept: Sequence[slice],
        forward: Forward,
        there: Place,
        place: Place,
        weights: Array,
        patch: tuple[int, ...],
        inner: tuple[slice, ...],
        progress: Callable[[int], None] | None,
    ) -> None:
        """``rows``: of the sums; ``weights`` are those of the ``inner`` part of a window.

        Windows go to the network ``there``, the sums are at ``place``.
        """
        self._data, self._kept, self._forward, self._progress = data, kept, forward, progress
        self._there, self._place, self._weights, self._inner = there, place, weights, inner
        self.z, self.first_row, self.patch, self.depth = 0, 0, patch, int(weights.shape[0])
        self.sums = place.zeros((heads, self.depth, rows, data.shape[3]))
        self._added: list[tuple[int, int, int]] = []
        self._first_slice = 0
        self.windows, self.counts = 0, 1

    def run(self, y: int, x: int) -> Array:
        """Scores (K, z, y, x) of the window that starts here, where the network gives them."""
        window = window_at(self._data, (self.z, y, x), self.patch, self._kept)
        scores = self._forward(self._there.packed(window[None]))
        self.windows += 1
        if self._progress is not None:
            self._progress(self.counts)
        return scores

    def add(self, y: int, x: int, scores: Array) -> None:
        """Add a window's scores to the sums."""
        _, height, width = self._weights.shape
        rows, columns = slice(y - self.first_row, y - self.first_row + height), slice(x, x + width)
        inner = (slice(None), *self._inner)
        self._place.add_weighted(self.sums[:, :, rows, columns], scores[inner], self._weights)
        self._added.append((self._first_slice, y, x))

    def averaged(self, part: slice, *, axis: int) -> Array:
        """Scores of some slices (axis 0) or rows (axis 1), in the place of their sums."""
        slices, rows = (part, slice(0, self.sums.shape[2])) if axis == 0 else (slice(0, self.depth), part)
        for first in range(slices.start, slices.stop, WEIGHED_SLICES):
            some = slice(first, min(first + WEIGHED_SLICES, slices.stop))
            self._place.divide(self.sums[:, some, rows], self._total_weights(some, rows))
        return self.sums[:, slices, rows]

    def _total_weights(self, slices: slice, rows: slice) -> Array:
        """The weights (z, y, x) of all windows that were added, summed up anew, since all voxels' would take memory."""
        depth, height, width = self._weights.shape
        total = self._place.zeros((slices.stop - slices.start, rows.stop - rows.start, self.sums.shape[3]))
        for z, y, x in self._added:
            into_z, of_z = _overlap(slices, z - self._first_slice, depth)
            into_y, of_y = _overlap(rows, y - self.first_row, height)
            total[into_z, into_y, x : x + width] += self._weights[of_z, of_y]
        return total

    def drop(self, count: int, *, axis: int) -> None:
        """Drop the first slices (axis 0) or rows (axis 1), and append as many without scores."""
        _shift(self.sums, count, axis=axis + 1)
        self._first_slice += count if axis == 0 else 0
        if axis == 0:
            self._added = [at for at in self._added if at[0] + self.depth > self._first_slice]


def _overlap(part: slice, start: int, length: int) -> tuple[slice, slice]:
    """Where something of some length that starts somewhere lies in a part, and which of it that is."""
    low, high = max(part.start, start), min(part.stop, start + length)
    high = max(low, high)
    return slice(low - part.start, high - part.start), slice(low - start, high - start)


def window_at(data: Array, at: Sequence[int], patch: Sequence[int], kept: Sequence[slice]) -> Array:
    """The window (C, z, y, x) that starts at an index of the padded scan, where ``kept`` is the scan (C, Z, Y, X).

    A view, where it needs no padding.
    """
    parts = tuple(slice(max(0, low - k.start), low - k.start + n) for low, n, k in zip(at, patch, kept, strict=True))
    found = data[:, parts[0], parts[1], parts[2]]
    if tuple(found.shape[1:]) == tuple(patch):
        return found
    before = [max(0, k.start - low) for low, k in zip(at, kept, strict=True)]
    widths = [(low, n - low - size) for low, n, size in zip(before, patch, found.shape[1:], strict=True)]
    return place_of(data).pad(found, [(0, 0), *widths])


def _shift(sums: Array, count: int, *, axis: int) -> None:
    """Drop the first ``count`` entries of an axis and append zeros, in place."""
    slices = sums if axis == 0 else sums.swapaxes(0, axis)
    kept = len(slices) - count
    if not count:
        return
    step = count if is_on_gpu(sums) else 1  # source and target never overlap; NumPy copies several of them first
    for first in range(0, kept, step):
        last = min(first + step, kept)
        slices[first:last] = slices[first + count : last + count]
    slices[max(0, kept) :] = 0
